"""A comparison of encoders as one page and one file of numbers.

The page holds everything it shows and works without JavaScript: the verdict, the differences with
their intervals, a table of the arms, the caption probe over the epochs, and what was spent.
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
from trainer.verdict import Judgement, p_words

RANKME = "probe/rankme"


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run was allowed, and what it took.

    Attributes:
        images: How many it learnt from.
        epochs: How often it saw each.
        batch_size: Images of a step.
        steps: Optimiser steps.
        seconds: All of the run, its probes included; None where it was not measured.
    """

    images: int
    epochs: int
    batch_size: int
    steps: int
    seconds: float | None

    @property
    def allowance(self) -> tuple[int, int, int, int]:
        """What must be equal for a fair comparison."""
        return self.images, self.epochs, self.batch_size, self.steps


@dataclass(frozen=True, slots=True)
class RunFigures:
    """What one run of an arm came to.

    Attributes:
        seed: Of the run.
        before: The probes of the encoder that it began with.
        after: Those of the encoder that it kept; the same where nothing was trained.
        cider_d: (n,), CIDEr-D of the caption that the probe gives each image of dev.
        curve: The caption probe by epoch.
        budget: None where nothing was trained.
    """

    seed: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    cider_d: NDArray[np.float64]
    curve: Curve
    budget: Budget | None


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """What an arm is and what its runs came to, one a seed."""

    encoder: str
    method: str
    runs: Sequence[RunFigures]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that the page tells.

    Attributes:
        arms: By name, in the order of the recipe.
        judgement: Of their scores.
        seen: How many images of dev are also among those that are learnt from.
        subject: What the verdict calls the baseline.
        command: That made the comparison.
        place: Where it ran, e.g. "cpu".
    """

    arms: Mapping[str, ArmFigures]
    judgement: Judgement
    seen: int
    subject: str
    command: str
    place: str

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
            "The score is CIDEr-D of captions that are copied from the most similar captioned "
            f"image, on {images} images of dev. Similarity is the encoder's own: nothing but the "
            "encoder differs between the arms.",
            f"{drawn}; p values are two-sided{corrected}. A coloured difference has p < 0.05.",
            "RankMe, the effective rank of the features, needs no captions, but compares only "
            "encoders of one architecture and method.",
        ]
        if self.seen:
            notes.append(
                f"{self.seen} images of dev are also learnt from, without their captions: trained "
                "arms know them, and will not know the photographs to come."
            )
        budgets = [run.budget for arm in self.arms.values() for run in arm.runs if run.budget]
        if len({budget.allowance for budget in budgets}) > 1:
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
        rows="\n".join(_row(name, arm, judgement) for name, arm in arms.items()),
        curves=curve_chart(
            {name: [run.curve for run in arm.runs] for name, arm in arms.items()},
            label="CIDEr-D of the caption probe",
        ),
        budgets="\n".join(_budget(name, arm) for name, arm in arms.items()),
        place=html.escape(comparison.place),
        command=html.escape(comparison.command),
    )
    (folder / "compare.html").write_text(page, encoding="utf-8")
    numbers = json.dumps(_as_json(comparison), indent=2, allow_nan=False)
    (folder / "compare.json").write_text(numbers + "\n", encoding="utf-8")


def _row(name: str, arm: ArmFigures, judgement: Judgement) -> str:
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
    return (
        f'<tr><th scope="row">{html.escape(name)}'
        f"<small>{html.escape(arm.method)}</small><small>{html.escape(arm.encoder)}</small></th>"
        f"<td><b>{score.value:.3f}</b><small>{score.low:.3f} to {score.high:.3f}</small></td>"
        f"<td>{seeds}</td>{difference}<td>{_rankme(arm)}</td></tr>"
    )


def _rankme(arm: ArmFigures) -> str:
    before, after = (
        np.mean([run[RANKME] for run in runs])
        for runs in ([run.before for run in arm.runs], [run.after for run in arm.runs])
    )
    trained = any(run.budget for run in arm.runs)
    return f"{before:.1f} \N{RIGHTWARDS ARROW} {after:.1f}" if trained else f"{before:.1f}"


def _budget(name: str, arm: ArmFigures) -> str:
    budgets = [run.budget for run in arm.runs if run.budget]
    if not budgets:
        cells = "<td>none</td><td></td><td></td><td></td><td></td>"
    else:
        first = budgets[0]
        counts = (first.images, first.epochs, first.batch_size, first.steps)
        times = [budget.seconds for budget in budgets]
        words = ["not measured" if time is None else f"{time:,.0f} s" for time in times]
        cells = "".join(f"<td>{count:,}</td>" for count in counts)
        cells += f"<td>{', '.join(words)}</td>"
    return f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>'


def _as_json(comparison: Comparison) -> dict[str, Any]:
    judgement = comparison.judgement
    arms: dict[str, Any] = {}
    for name, arm in comparison.arms.items():
        found = judgement.differences.get(name)
        arms[name] = {
            "encoder": arm.encoder,
            "method": arm.method,
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
        "budget": asdict(run.budget) if run.budget else None,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
