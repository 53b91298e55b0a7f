"""The schedule: typical images while labels are few, then what is far from them, then doubts.

Hacohen, Dekel and Weinshall, 2022, https://arxiv.org/abs/2202.02794, show that opposite strategies
suit small and large budgets: the first labels are best spent on typical images, later ones on those
that the model is unsure of. Here the labels that there are, picks included, decide:

| labels     | by default | method        |
|------------|------------|---------------|
| the first  | up to 60   | `typiclust`   |
| then       | up to 80   | `kcenter`     |
| from there |            | `badge`       |

The last takes a captioner that was trained on the labels so far; without one `kcenter` goes on. On
Flickr8k, with fifty labels of a hundred spent, `badge` did no worse than chance and `uncertainty`
did (docs/hundred-labels.md). The thresholds are a choice, not a measurement.
"""

from typing import Any, Self

from pydantic import Field, model_validator

from trainer import variants
from trainer.acquisition._acquisition import Acquisition as Base
from trainer.acquisition._pool import Pick, Pool
from trainer.config import Config as BaseConfig


class Config(BaseConfig):
    """Keys of `[method] name = "schedule"`."""

    typical_until: int = Field(default=60, ge=0)
    """Labels up to which typical images are picked."""
    spread_until: int = Field(default=80, ge=0)
    """Labels up to which k-center picks."""
    last: dict[str, Any] = Field(default_factory=lambda: {"name": "badge"})
    """The method that picks from there on, a table as `[method]`."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.spread_until < self.typical_until:
            raise ValueError(
                f"spread_until = {self.spread_until} is less than typical_until = "
                f"{self.typical_until}"
            )
        variants.parse("acquisition", self.last)  # before anything is encoded
        return self


class Acquisition(Base):
    """See the module. A pick's score is that of the method that picked it."""

    def choose(self, pool: Pool, count: int) -> list[Pick]:
        """See `Base`."""
        places = {int(row): place for place, row in enumerate(pool.rows)}
        picks: list[Pick] = []
        for table, until in self._phases(pool):
            room = count if until is None else max(0, until - int(pool.labelled.sum()))
            due = min(count - len(picks), room)
            if due:
                module, config = variants.parse("acquisition", table)
                found: list[Pick] = module.Acquisition(config).pick(pool, due)
                pool = pool.plus([places[pick.row] for pick in found])
                picks += found
        return picks

    def _phases(self, pool: Pool) -> list[tuple[dict[str, Any], int | None]]:
        """Returns tables of methods, each with the labels up to which it picks."""
        last = self.config.last if pool.speaker is not None else {"name": "kcenter"}
        return [
            ({"name": "typiclust"}, self.config.typical_until),
            ({"name": "kcenter"}, self.config.spread_until),
            (last, None),
        ]
