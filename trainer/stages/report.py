"""`python -m trainer report RECIPE`: one page about a run.

Takes the folders that `pretrain`, `finetune` and `evaluate` wrote and writes `report.html`, and its
numbers as `report.json`: what each step bought, curves, a contact sheet, who wrote the captions,
and, from evaluations at several label counts, what more labels would bring.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trainer.config import Config as BaseConfig
from trainer.errors import ConfigError, DataError
from trainer.label_budget import advice_of
from trainer.learning_curve import Measurement, fit
from trainer.report import Report, write_report
from trainer.report_parts import LabelBudget, Overall, Provenance, Step
from trainer.stages._evaluated import Evaluated, read_evaluation
from trainer.stages._trained import Trained, panels_of, read_trained
from trainer.verdict import judge, successive

_COPIED = "copied captions"
_FEW = 30  # test images


class Folders(BaseConfig):
    """Keys of `[[before]]`: an earlier run, of which at least one folder is known."""

    name: str
    run: Path | None = None
    evaluation: Path | None = None


class Count(BaseConfig):
    """Keys of `[[budget.counts]]`: what was found after so many labels."""

    labels: int = Field(ge=1)
    evaluations: tuple[Path, ...] = Field(min_length=1)
    """Folders of `evaluate`, one for each seed, all of the same images."""


class Budget(BaseConfig):
    """Keys of `[budget]`: what more labels would bring."""

    counts: tuple[Count, ...]
    more: int = Field(default=30, ge=1)
    worthwhile: float = Field(default=0.02, gt=0)
    """The gain in CIDEr-D that is worth their writing."""


class Config(BaseConfig):
    """A recipe that reports; it needs a run, an evaluation, or both."""

    title: str = ""
    name: str = ""
    """What the page calls the run; by default its folder's name."""
    run: Path | None = None
    """What `pretrain` or `finetune` wrote."""
    evaluation: Path | None = None
    """What `evaluate` wrote of it."""
    before: tuple[Folders, ...] = ()
    """Earlier steps, in their order."""
    budget: Budget | None = None
    notes: tuple[str, ...] = ()
    """What else a reader must know; stands beside the page's own warnings."""
    sheet_images: int = Field(default=60, ge=1)


@dataclass(frozen=True, slots=True)
class _Read:
    """A step's folders, read back."""

    name: str
    trained: Trained | None
    evaluated: Evaluated | None


def run(config: Config, out_dir: Path) -> None:
    """Writes `report.html` and `report.json` to `out_dir`.

    Raises:
        ConfigError: No folder is named, or two steps have one name.
        DataError: A folder does not hold what it should; CheckpointError: no run.
    """
    folder = config.run or config.evaluation
    if folder is None:
        raise ConfigError("nothing to report: name run, evaluation, or both")
    last = Folders(name=config.name or folder.name, run=config.run, evaluation=config.evaluation)
    read = [_read(one) for one in (*config.before, last)]
    names = [one.name for one in read]
    if len(set(names)) < len(names) or _COPIED in names:
        raise ConfigError(f"steps called {', '.join(names)}: each needs a name of its own")
    report = _report(config, read)
    write_report(out_dir / "report.html", report)
    print(f"{report.verdict}")
    for warning in report.warnings:
        print(f"WARNING: {warning}")
    print(f"wrote {out_dir}/report.html and report.json")


def _read(folders: Folders) -> _Read:
    if folders.run is None and folders.evaluation is None:
        raise ConfigError(f"step {folders.name!r}: name run, evaluation, or both")
    return _Read(
        folders.name,
        None if folders.run is None else read_trained(folders.run),
        None if folders.evaluation is None else read_evaluation(folders.evaluation),
    )


def _report(config: Config, read: Sequence[_Read]) -> Report:
    last = read[-1]
    steps, overall, warnings = _steps(read)
    pictures = [] if last.evaluated is None else last.evaluated.rows
    there = [row for row in pictures if row.image.is_file()]
    if len(there) < len(pictures):
        warnings.append(
            f"{len(pictures) - len(there)} of {len(pictures)} pictures are no longer where they "
            f"were, such as {next(row.image for row in pictures if row not in there)}."
        )
    return Report(
        title=config.title or f"Report of {last.name}",
        subject="The encoder" if last.trained and not last.trained.captions else "The captioner",
        steps=steps,
        overall=overall,
        budget=None if config.budget is None else _budget(config.budget),
        panels=panels_of({one.name: one.trained for one in read if one.trained}),
        pictures=there,
        limit=config.sheet_images,
        provenance=_provenance(last),
        warnings=[*config.notes, *warnings, *_warnings(last)],
        command=shlex.join(["python", *sys.orig_argv[1:]]),
    )


def _steps(read: Sequence[_Read]) -> tuple[list[Step], Overall | None, list[str]]:
    """Returns the steps with what each bought, what all of them bought, and warnings."""
    steps: list[Step] = []
    scores: dict[str, NDArray[np.float64]] = {}
    warnings: list[str] = []
    final = next((one.evaluated for one in reversed(read) if one.evaluated), None)
    if final is not None and final.copied is not None:
        sentence = "Each image got a caption of the labelled image that looks most like it."
        steps.append(Step(_COPIED, sentence, figures=final.copied_figures))
        scores[_COPIED] = final.copied
    for one in read:
        steps.append(_step(one))
        if one.evaluated is None or final is None:
            continue
        if one.evaluated.images == final.images:
            scores[one.name] = one.evaluated.scores
        else:
            warnings.append(
                f"{one.name} was evaluated on other images than the last step, so that nothing "
                "tells what came of it."
            )
    known = {name: found[None] for name, found in scores.items() if np.isfinite(found).all()}
    gains, names = successive(known), list(known)
    against = dict(zip(names[1:], names[:-1], strict=True))
    steps = [
        replace(step, difference=gains[step.name], against=against[step.name])
        if step.name in gains
        else step
        for step in steps
    ]
    if len(names) < 2:
        return steps, None, warnings
    ends = {name: known[name] for name in (names[0], names[-1])}
    total = judge(ends, names[0]).differences[names[-1]]
    return steps, Overall(total, names[0]), warnings


def _step(one: _Read) -> Step:
    if one.trained is None:
        assert one.evaluated is not None
        return Step(one.name, f"{one.evaluated.model} as it is.", figures=one.evaluated.figures)
    figures = one.evaluated.figures if one.evaluated else one.trained.figures
    return Step(one.name, one.trained.sentence, one.trained.seconds, figures)


def _provenance(last: _Read) -> Provenance | None:
    learnt = last.trained.learnt if last.trained else None
    if learnt is None and last.evaluated is None:
        return None
    return Provenance(
        learnt={} if learnt is None else learnt.captions,
        images=0 if learnt is None else learnt.images,
        test={} if last.evaluated is None else last.evaluated.sources,
        test_images=0 if last.evaluated is None else len(last.evaluated.rows),
    )


def _warnings(last: _Read) -> list[str]:
    """Returns what speaks against believing the figures."""
    trained, evaluated = last.trained, last.evaluated
    if evaluated is None:
        return []
    found, images = [], len(evaluated.rows)
    others = sum(count for source, count in evaluated.sources.items() if source != "human")
    if others:
        found.append(f"{others} captions of the test images were not written by people.")
    seen = trained.seen(evaluated.images) if trained else 0
    if seen:
        found.append(f"{seen} of the {images} test images were trained on: the figures flatter.")
    if trained and trained.folder.name != evaluated.model:
        found.append(f"The evaluation is of {evaluated.model}, the run is {trained.folder.name}.")
    if images < _FEW:
        found.append(f"{images} test images are few: intervals are wide, and rough.")
    return found


def _budget(config: Budget) -> LabelBudget:
    measurements, first = [], None
    for count in config.counts:
        evaluations = [read_evaluation(folder) for folder in count.evaluations]
        for one in evaluations:
            first = first or one
            if one.images != first.images:
                raise DataError(
                    f"{one.folder}: of other images than {first.folder}; evaluate all label counts "
                    "on the same"
                )
        scores = np.stack([one.scores for one in evaluations])
        measurements.append(Measurement(count.labels, scores))
    curve = fit(measurements)
    return LabelBudget(curve, advice_of(curve, more=config.more, worthwhile=config.worthwhile))
