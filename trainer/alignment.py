"""An alignment of image and text towers as one page and one file of numbers.

The page holds everything it shows and works without JavaScript: what became of retrieval, why this
alpha, and what was forgotten.
"""

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from trainer.charts import Curve, interpolation_chart
from trainer.intervals import Interval, bootstrap, paired_difference
from trainer.metrics._scores import Scores

Figures = dict[str, Interval]

ORIGINAL, TUNED, KEPT = "original", "fine-tuned", "interpolated"
MEAN_RECALL = "mean recall"


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What weights find on one set of images and captions.

    Attributes:
        title: Whose images, in words.
        images: How many.
        figures: By weights, by name.
        differences: By weights, from the original's, on the same images.
    """

    title: str
    images: int
    figures: Mapping[str, Figures]
    differences: Mapping[str, Figures]

    @classmethod
    def of(cls, title: str, scores: Mapping[str, Sequence[Scores]]) -> "Retrieval":
        """Returns the figures of scores, by weights, of the same metrics and images."""
        first = scores[ORIGINAL]
        figures: dict[str, Figures] = {name: {} for name in scores}
        differences: dict[str, Figures] = {name: {} for name in scores if name != ORIGINAL}
        for name, own in scores.items():
            for one, before in zip(own, first, strict=True):
                figures[name] |= bootstrap(one)
                if name != ORIGINAL:
                    differences[name] |= paired_difference(one, before)
        return cls(title, len(first[0].statistics), figures, differences)


@dataclass(frozen=True, slots=True)
class Forgetting:
    """How far weights see images as the original does (see `trainer.forgetting`).

    Attributes:
        source: Whose images, in words.
        images: How many.
        neighbours: How many of an image's nearest others were compared.
        figures: By weights, by name.
    """

    source: str
    images: int
    neighbours: int
    figures: Mapping[str, Figures]


@dataclass(frozen=True, slots=True)
class Alignment:
    """All that the page tells.

    Attributes:
        start: The CLIP that was fine-tuned.
        images: How many with captions it was fine-tuned on.
        alpha: That of the weights that are kept.
        gains: Points (alpha, gain in mean recall over the original in the folds held out).
        folds: Of every fold, points (alpha, mean recall).
        trained: How many numbers were trained, and of how many.
        retrieval: On held-out images, first those that the verdict is about.
        forgetting: Of the encoder that came.
        command: That made it.
        place: Where it ran, e.g. "cpu".
    """

    start: str
    images: int
    alpha: float
    gains: Sequence[tuple[float, Interval]]
    folds: Sequence[Curve]
    trained: tuple[int, int]
    retrieval: Sequence[Retrieval]
    forgetting: Forgetting
    command: str
    place: str

    @property
    def verdict(self) -> str:
        """One or two sentences."""
        if not self.alpha:
            return (
                f"Keep the original: on {self.images} captioned images no fine-tuned weights, nor "
                "any between, find more in the folds held out."
            )
        table = self.retrieval[0]
        figure, gain = table.figures[KEPT][MEAN_RECALL], table.differences[KEPT][MEAN_RECALL]
        kept = self.forgetting.figures[KEPT]["neighbours"].value
        sure = "" if gain.excludes_zero else ", which may be chance"
        return (
            f"Alpha {self.alpha:g}: mean recall {figure} on {table.images} images ({table.title}), "
            f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] from the original{sure}. "
            f"{kept:.0%} of an image's {self.forgetting.neighbours} nearest neighbours stay."
        )

    @property
    def notes(self) -> list[str]:
        """What a reader must know before believing the verdict."""
        some, all_of_them = self.trained
        chance = self.forgetting.neighbours / (self.forgetting.images - 1)
        return [
            f"{some:,} of {all_of_them:,} numbers were trained, no norm among them; the weights "
            f"kept are (1 - {self.alpha:g}) original + {self.alpha:g} fine-tuned.",
            f"Alpha has the largest mean recall over {self.images} images, each in the one of "
            f"{len(self.folds)} folds that held it out. A fold is a small gallery: recalls in it "
            "are higher than among many images.",
            "Mean recall is the mean of R@1, R@5 and R@10 of both directions: TR finds an image's "
            "captions, IR a caption's image. 95 % intervals are over images; another fine-tuning "
            "may fall elsewhere. Coloured differences exclude 0.",
            f"Agreement is with the original, on {self.forgetting.images} images "
            f"({self.forgetting.source}): 1 is the same. Of strangers {chance:.2f} of the "
            "neighbours would be the same.",
        ]


def write_alignment(folder: Path, found: Alignment) -> None:
    """Writes `align.html` and `report.json`."""
    template = Template(resources.files("trainer").joinpath("alignment.html").read_text("utf-8"))
    page = template.substitute(
        verdict=html.escape(found.verdict),
        notes="\n".join(f"<li>{html.escape(note)}</li>" for note in found.notes),
        curve=interpolation_chart(
            found.gains,
            [[(alpha, value - fold[0][1]) for alpha, value in fold] for fold in found.folds],
            chosen=found.alpha,
            label="mean recall gained, folds held out",
        ),
        retrieval="\n".join(_retrieval(table) for table in found.retrieval),
        forgetting=_table(found.forgetting.figures, {}),
        start=html.escape(found.start),
        command=html.escape(found.command),
        place=html.escape(found.place),
    )
    numbers = json.dumps(_as_json(found), indent=2, allow_nan=False) + "\n"
    for name, text in (("align.html", page), ("report.json", numbers)):
        partial = folder / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def _retrieval(table: Retrieval) -> str:
    head = f"{html.escape(table.title)}, {table.images:,} images"
    return f"<h2>Retrieval: {head}</h2>\n{_table(table.figures, table.differences)}"


def _table(figures: Mapping[str, Figures], differences: Mapping[str, Figures]) -> str:
    names = list(next(iter(figures.values())))
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = "\n".join(
        f'<tr><th scope="row">{html.escape(arm)}</th>'
        + "".join(_cell(name, own[name], differences.get(arm, {}).get(name)) for name in names)
        + "</tr>"
        for arm, own in figures.items()
    )
    return (
        f'<div class="card"><table>\n<thead><tr><th>Weights</th>{heads}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _cell(name: str, figure: Interval, difference: Interval | None) -> str:
    digits = 0 if name.endswith("median") else 3
    bounds = f"{figure.low:.{digits}f} to {figure.high:.{digits}f}"
    cell = f"<b>{figure.value:.{digits}f}</b>"
    if not math.isnan(figure.low):
        cell += f"<small>{bounds}</small>"
    if difference is not None:
        # Of a rank less is better.
        gain = -difference.value if name.endswith("median") else difference.value
        mark = ("better" if gain > 0 else "worse") if difference.excludes_zero else ""
        cell += (
            f'<small class="{mark}">{difference.value:+.{digits}f}<br/>'
            f"{difference.low:+.{digits}f} to {difference.high:+.{digits}f}</small>"
        )
    return f"<td>{cell}</td>"


def _as_json(found: Alignment) -> dict[str, Any]:
    forgetting = found.forgetting
    return {
        "verdict": found.verdict,
        "notes": found.notes,
        "start": found.start,
        "alpha": found.alpha,
        "images": found.images,
        "trained": list(found.trained),
        "gains": [[alpha, *_numbers(gain)] for alpha, gain in found.gains],
        "folds": [[list(point) for point in fold] for fold in found.folds],
        "retrieval": [
            {
                "data": table.title,
                "images": table.images,
                "figures": _by_arm(table.figures),
                "differences": _by_arm(table.differences),
            }
            for table in found.retrieval
        ],
        "forgetting": {
            "data": forgetting.source,
            "images": forgetting.images,
            "neighbours": forgetting.neighbours,
            "figures": _by_arm(forgetting.figures),
        },
        "command": found.command,
        "place": found.place,
    }


def _by_arm(figures: Mapping[str, Figures]) -> dict[str, Any]:
    return {
        arm: {name: _numbers(figure) for name, figure in own.items()}
        for arm, own in figures.items()
    }


def _numbers(figure: Interval) -> list[float | None]:
    """Returns [value, low, high], None where there is no bound."""
    numbers = (figure.value, figure.low, figure.high)
    return [None if math.isnan(number) else number for number in numbers]
