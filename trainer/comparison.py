"""A comparison of encoders or captioners as one page and one file of numbers.

The page holds everything it shows and works without JavaScript: the verdict, the differences with
their intervals, a table of the arms, the caption probe over the epochs or what captioners say of
a few images, and what was spent.
"""

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.charts import Curve, curve_chart, difference_chart
from trainer.sheet import thumbnail
from trainer.verdict import Judgement, p_words


@dataclass(frozen=True, slots=True)
class Kind:
    """What the page calls the things that it compares.

    Attributes:
        score: What CIDEr-D is of, with a place for the number of images.
        figure: The name of a second figure of every run.
        heading: What the page calls it.
        digits: How it is written.
        meaning: What it says.
    """

    score: str
    figure: str
    heading: str
    digits: str
    meaning: str


ENCODERS = Kind(
    score="The score is CIDEr-D of captions that are copied from the most similar captioned image, "
    "on {images} images of dev. Similarity is the encoder's own: nothing but the encoder differs "
    "between the arms.",
    figure="probe/rankme",
    heading="RankMe",
    digits=".1f",
    meaning="RankMe, the effective rank of the features, needs no captions, but compares only "
    "encoders of one architecture and method.",
)
CAPTIONERS = Kind(
    score="The score is CIDEr-D of the captions that the captioner of each arm's last step gives "
    "{images} images of dev, from which no arm has learnt.",
    figure="distinct",
    heading="distinct",
    digits=".2f",
    meaning="Distinct is the number of different captions by that of images: low where a captioner "
    "says the same of most images.",
)


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run was allowed, and what it took.

    Attributes:
        images: How many it learnt from.
        epochs: How often it saw each.
        batch_size: Images of a step.
        steps: Optimiser steps.
        seconds: All of the run, its probes included; None where it was not measured.

    Epochs, batch and steps are 0 of work that trains nothing.
    """

    images: int
    epochs: int
    batch_size: int
    steps: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class RunFigures:
    """What one run of an arm came to.

    Attributes:
        seed: Of the run.
        before: Figures of the encoder that it began with.
        after: Those of what it kept; the same where nothing was trained.
        cider_d: (n,), CIDEr-D of the caption that each image of dev gets.
        curve: The caption probe by epoch.
        budgets: Of its steps by title, "" where there is only one; none where nothing was trained.
    """

    seed: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    cider_d: NDArray[np.float64]
    curve: Curve
    budgets: Mapping[str, Budget]

    @property
    def allowance(self) -> tuple[int, int]:
        """What must be equal for a fair comparison: steps, and images seen in them."""
        parts = self.budgets.values()
        return sum(one.steps for one in parts), sum(one.steps * one.batch_size for one in parts)

    @property
    def seconds(self) -> float | None:
        """Of all steps; None where one was not measured."""
        times = [one.seconds for one in self.budgets.values()]
        known = [time for time in times if time is not None]
        return sum(known) if len(known) == len(times) else None


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """What an arm is, in lines with a name each, and what its runs came to, one a seed."""

    about: Mapping[str, str]
    runs: Sequence[RunFigures]


@dataclass(frozen=True, slots=True)
class Sample:
    """An image of dev, what one of its people and what each arm say of it."""

    image: Path
    reference: str
    captions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that the page tells.

    Attributes:
        kind: Of what is compared.
        arms: By name, in the order of the recipe.
        judgement: Of their scores.
        seen: How many images of dev are also among those that are learnt from.
        subject: What the verdict calls the baseline.
        command: That made the comparison.
        place: Where it ran, e.g. "cpu".
        samples: What captioners say of a few images; without any the page has the curves.
    """

    kind: Kind
    arms: Mapping[str, ArmFigures]
    judgement: Judgement
    seen: int
    subject: str
    command: str
    place: str
    samples: Sequence[Sample] = ()

    @property
    def verdict(self) -> str:
        """One sentence."""
        return self.judgement.verdict(self.subject)

    @property
    def notes(self) -> list[str]:
        """What a reader must know before believing the verdict."""
        runs = next(iter(self.arms.values())).runs
        images, seeds, tests = len(runs[0].cider_d), len(runs), len(self.judgement.differences)
        corrected = f" and corrected for {tests} tests (Holm)" if tests > 1 else ""
        drawn = (
            f"95 % intervals are over images and the {seeds} seeds"
            if seeds > 1
            else "One seed: 95 % intervals are over images alone, another seed may fall elsewhere"
        )
        notes = [
            self.kind.score.format(images=images),
            f"{drawn}; p values are two-sided{corrected}. A coloured difference has p < 0.05.",
            self.kind.meaning,
        ]
        if self.seen:
            notes.append(
                f"{self.seen} images of dev are also learnt from, without their captions: trained "
                "arms know them, and will not know the photographs to come."
            )
        trained = [run for arm in self.arms.values() for run in arm.runs if run.budgets]
        if len({run.allowance for run in trained}) > 1:
            notes.append("The arms were not given the same budget: see what was spent.")
        return notes


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Writes `compare.html` and `compare.json`."""
    arms, judgement = comparison.arms, comparison.judgement
    label = f"CIDEr-D minus that of {judgement.baseline}"
    template = Template(resources.files("trainer").joinpath("comparison.html").read_text("utf-8"))
    page = template.substitute(
        title=html.escape(comparison.verdict),
        verdict=re.sub(r"\[.*?\]", r"<span>\g<0></span>", html.escape(comparison.verdict)),
        notes="\n".join(f"<li>{html.escape(note)}</li>" for note in comparison.notes),
        differences=difference_chart(judgement.differences, label=label),
        heading=comparison.kind.heading,
        rows="\n".join(_row(name, arm, comparison) for name, arm in arms.items()),
        closer=_samples(comparison) if comparison.samples else _curves(arms),
        budgets="\n".join(_budgets(name, arm) for name, arm in arms.items()),
        place=html.escape(comparison.place),
        command=html.escape(comparison.command),
    )
    (folder / "compare.html").write_text(page, encoding="utf-8")
    numbers = json.dumps(_as_json(comparison), indent=2, allow_nan=False)
    (folder / "compare.json").write_text(numbers + "\n", encoding="utf-8")


def _row(name: str, arm: ArmFigures, comparison: Comparison) -> str:
    judgement = comparison.judgement
    score, by_seed = judgement.scores[name], [run.cider_d.mean() for run in arm.runs]
    seeds = " ".join(f"{value:.3f}" for value in by_seed) if len(by_seed) > 1 else ""
    found = judgement.differences.get(name)
    if found is None:
        difference = "<td>baseline</td><td></td>"
    else:
        mark = "better" if found.better else "worse" if found.worse else ""
        bounds = f"{found.interval.low:+.3f} to {found.interval.high:+.3f}"
        difference = (
            f'<td><b class="{mark}">{found.interval.value:+.3f}</b><small>{bounds}</small></td>'
            f"<td>{html.escape(p_words(found.p_value).removeprefix('= '))}</td>"
        )
    about = "".join(f"<small>{html.escape(line)}</small>" for line in arm.about.values())
    return (
        f'<tr><th scope="row">{html.escape(name)}{about}</th>'
        f"<td><b>{score.value:.3f}</b><small>{score.low:.3f} to {score.high:.3f}</small></td>"
        f"<td>{seeds}</td>{difference}<td>{_figure(arm, comparison.kind)}</td></tr>"
    )


def _figure(arm: ArmFigures, kind: Kind) -> str:
    """Returns the runs' mean of a figure, and what it was before where that is known."""
    after = format(np.mean([run.after[kind.figure] for run in arm.runs]), kind.digits)
    if not all(kind.figure in run.before and run.budgets for run in arm.runs):
        return after
    before = format(np.mean([run.before[kind.figure] for run in arm.runs]), kind.digits)
    return f"{before} \N{RIGHTWARDS ARROW} {after}"


def _curves(arms: Mapping[str, ArmFigures]) -> str:
    curves = {name: [run.curve for run in arm.runs] for name, arm in arms.items()}
    chart = curve_chart(curves, label="CIDEr-D of the caption probe")
    return f'<h2>The caption probe over the epochs</h2>\n<figure class="card">\n{chart}\n</figure>'


def _samples(comparison: Comparison) -> str:
    rows = []
    for sample in comparison.samples:
        width, height, source = thumbnail(sample.image)
        lines = {"a person": sample.reference, **sample.captions}
        said = "".join(
            f"<dt>{html.escape(who)}</dt><dd>{html.escape(_printable(text)) or '(no words)'}</dd>"
            for who, text in lines.items()
        )
        rows.append(
            f'<tr><td><img src="{source}" width="{width}" height="{height}" alt=""/></td>'
            f"<td><dl>{said}</dl></td></tr>"
        )
    seed = next(iter(comparison.arms.values())).runs[0].seed
    return (
        f"<h2>What they say, with seed {seed}</h2>\n"
        f'<div class="card"><table>\n<tbody>\n{"".join(rows)}\n</tbody>\n</table></div>'
    )


def _printable(text: str) -> str:
    """Returns text without control characters, which a captioner of little training may say."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)


def _budgets(name: str, arm: ArmFigures) -> str:
    head = f'<tr><th scope="row">{html.escape(name)}'
    if not arm.runs[0].budgets:
        return f"{head}</th><td>none</td><td></td><td></td><td></td><td></td></tr>"
    rows = []
    for title, first in arm.runs[0].budgets.items():
        counts = (first.images, first.epochs, first.batch_size, first.steps)
        times = [run.budgets[title].seconds for run in arm.runs]
        shown = ["not measured" if time is None else f"{time:,.0f} s" for time in times]
        cells = "".join(f"<td>{count:,}</td>" if count else "<td></td>" for count in counts)
        step = f"<small>{html.escape(title)}</small>" if title else ""
        rows.append(f"{head}{step}</th>{cells}<td>{', '.join(shown)}</td></tr>")
    return "\n".join(rows)


def _as_json(comparison: Comparison) -> dict[str, Any]:
    judgement = comparison.judgement
    arms: dict[str, Any] = {}
    for name, arm in comparison.arms.items():
        found = judgement.differences.get(name)
        arms[name] = {
            **arm.about,
            "cider_d": asdict(judgement.scores[name]),
            "difference": asdict(found.interval) if found else None,
            "p_value": found.p_value if found else None,
            "runs": [_run_as_json(run) for run in arm.runs],
        }
    return {
        "verdict": comparison.verdict,
        "notes": comparison.notes,
        "baseline": judgement.baseline,
        "command": comparison.command,
        "place": comparison.place,
        "arms": arms,
    }


def _run_as_json(run: RunFigures) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "cider_d": float(run.cider_d.mean()),
        "cider_d_per_image": run.cider_d.tolist(),
        "before": {name: _number(value) for name, value in run.before.items()},
        "after": {name: _number(value) for name, value in run.after.items()},
        "curve": [list(point) for point in run.curve],
        "budget": _budgets_as_json(run.budgets),
    }


def _budgets_as_json(budgets: Mapping[str, Budget]) -> dict[str, Any] | None:
    """Returns that of a single step as it is, those of several by title."""
    by_title = {title: asdict(budget) for title, budget in budgets.items()}
    return by_title.get("", by_title) or None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
