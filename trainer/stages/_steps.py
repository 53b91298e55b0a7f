"""Steps that make a captioner one after the other, each in a folder of its own.

A step is a recipe of `finetune`, or of the verb that its key `stage` names, laid over the tables
that all steps of that stage share. A finetuning begins with the weights of the one before it.
Where the comparison says how many optimiser steps an arm has, its finetunings divide them: each
takes its `share`, in as many epochs as come nearest to it, however many images there are.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from trainer import variants
from trainer.comparison import Budget
from trainer.config import Config as BaseConfig
from trainer.config import validate, write_resolved
from trainer.data import read_examples
from trainer.errors import ConfigError
from trainer.run import Data, Recipe
from trainer.stages._arms import RESULT, Result, captioned, read_result, timed, words
from trainer.stages.bootstrap import Source

_NAME = re.compile(r"\{([A-Za-z0-9_-]+)\}")


class Own(BaseConfig):
    """The keys of a finetuning step that are not `finetune`'s."""

    share: float = Field(default=1.0, gt=0, le=1)
    """Of the arm's optimiser steps."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step: a stage, its recipe, and where it runs."""

    stage: str
    config: Any
    folder: Path
    share: float = 0.0
    """Of the arm's optimiser steps."""

    @property
    def title(self) -> str:
        """What it does, in a line."""
        return words(self.config.objective) if isinstance(self.config, Recipe) else self.stage

    @property
    def sources(self) -> list[tuple[Path, Data | Source]]:
        """The data sets that it learns from or captions, and where each is."""
        if isinstance(self.config, Recipe):
            return [(self.config.data.train, self.config.data)]
        return [(table.data, table) for _, table in self.config if isinstance(table, Source)]

    @property
    def images(self) -> int:
        """How many images it learns from, or has found captions for."""
        if isinstance(self.config, Recipe):
            return len(captioned(self.config.data.read()))
        found = self.folder / "captions.csv"
        return len(read_examples(found)) if found.exists() else 0

    def sized(self, total: int | None) -> Any:
        """Returns the recipe, with as many epochs as its share of `total` steps comes to."""
        config = self.config
        if total is None or not self.share:
            return config
        batches = max(1, self.images // config.loop.batch_size) // config.loop.accumulate
        loop = {"epochs": max(1, round(self.share * total / max(1, batches)))}
        return config.model_copy(update={"loop": config.loop.model_copy(update=loop)})

    def made(self, total: int | None) -> Budget:
        """Makes what has not been made; returns what it took in all.

        Args:
            total: the arm's optimiser steps, where the comparison says how many.

        Raises:
            CheckpointError: another recipe or other images have begun in its folder.
        """
        config, folder = self.sized(total), self.folder
        if not ((folder / RESULT).exists() and _is_of(folder, config)):
            # A stage goes on where it was, and refuses what another recipe has begun.
            stage = variants.load("stages", self.stage)
            steps, seconds = timed(folder, lambda: stage.run(config, folder))
            if not (folder / RESULT).exists():
                result = Result(images=self.images, steps=steps, seconds=seconds)
                write_resolved(result, folder / RESULT)
        result = read_result(folder, self.images)
        loop = getattr(config, "loop", None)
        epochs, batch_size = (loop.epochs, loop.batch_size) if loop else (0, 0)
        return Budget(result.images, epochs, batch_size, result.steps, result.seconds)


def read_step(
    table: Mapping[str, Any],
    shared: Mapping[str, Mapping[str, Any]],
    before: Sequence[Step],
    *,
    seed: int,
    folder: Path,
    where: str,
) -> Step:
    """Returns the step that a table describes.

    Args:
        table: of the step.
        shared: by stage, the tables that those of the step are laid over.
        before: the steps that come before.
        seed: of the run.
        folder: where it runs.
        where: names the step in errors.

    Raises:
        ConfigError: a key is wrong, or a variant does not exist.
    """
    own = dict(table)
    stage = own.pop("stage", "finetune")
    model, tables = variants.load("stages", stage).Config, shared.get(stage, {})
    keys = {key: own.pop(key) for key in Own.model_fields if key in own and model is Recipe}
    laid = {
        key: {**(tables.get(key) or {}), **value} if isinstance(value, dict) else value
        for key, value in own.items()
    }
    given: dict[str, Any] = {"seed": seed} if "seed" in model.model_fields else {}
    if model is Recipe:
        given["start"] = next((one.folder for one in reversed(before) if one.stage == stage), None)
    config = validate(model, {**tables, **given, **laid}, where)
    if isinstance(config, Recipe):
        for part in ("encoder", "bridge", "decoder", "objective"):
            variants.parse(f"{part}s", getattr(config, part))
        return Step(stage, config, folder, validate(Own, keys, where).share)
    return Step(stage, config, folder)


def with_values(value: Any, known: Mapping[str, object], where: str) -> Any:
    """Returns a step's table with what is known in place of its names in braces.

    Raises:
        ConfigError: there is no such name.
    """
    if isinstance(value, dict):
        return {key: with_values(part, known, where) for key, part in value.items()}
    if isinstance(value, list):
        return [with_values(part, known, where) for part in value]
    if not isinstance(value, str):
        return value
    for name in _NAME.findall(value):
        if name not in known:
            raise ConfigError(
                f"{where}: {{{name}}} is no step and no arm before this one; there are "
                f"{', '.join(known) or 'none'}"
            )
    return _NAME.sub(lambda found: str(known[found[1]]), value)


def _is_of(folder: Path, config: BaseConfig) -> bool:
    """Whether what stands in a folder is of this very recipe."""
    path = folder / "recipe.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return bool(kept == config.model_dump(mode="json"))
