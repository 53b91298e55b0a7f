"""`python -m trainer auto DIR --labels 100`: from a folder of photographs to a published captioner.

An encoder from raw images (where the preset has one), images to label, the page where a person
labels them, fine-tuning, captions for the images that nobody labelled, reinforcement learning,
evaluation, export and publication: the stages of `python -m trainer`, each in a folder of `--out`
that can be read, and run again, by itself. A command that was killed goes on where it was. From a
captioner that knows much (`start`) every model begins with that one.

Of the labels, `test_share` go to images that are drawn at random and never learnt from; their
near-duplicates are neither. After each step the model captions them: what more labels made is kept
unless they tell, with a paired 95 % interval, that it did harm; what other steps made, and whatever
begins with a `start`, where it scores higher. `report.html` says what each step bought.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from exports.manifest import check_name
from trainer.config import Config as BaseConfig
from trainer.config import validate
from trainer.errors import ConfigError
from trainer.run import BUILT, Run, claimed
from trainer.stages import report
from trainer.stages._auto_estimate import estimate
from trainer.stages._auto_pipeline import Pipeline, Step
from trainer.stages._auto_steps import planned

_CHANGEABLE: Any = {"registry", "answers", "port", "open_browser"}


class Pseudo(BaseConfig):
    """Keys of `[pseudo]`: captions for the images that nobody labelled."""

    filter: dict[str, Any]
    """What the recipe of the filter, a run with a [matcher], has otherwise than `[finetune]`."""
    finetune: dict[str, Any] = Field(default_factory=dict)
    """What the recipe that learns from human and synthetic captions has otherwise."""
    precision: float = Field(default=0.9, gt=0, lt=1)
    """Share of the synthetic captions that shall be true."""
    images: int = Field(default=1000, ge=1)
    """At most so many images are captioned."""


class Config(BaseConfig):
    """A preset with the folder and the number of labels laid over it."""

    images: Path
    """The folder of photographs."""
    labels: int = Field(default=100, ge=8)
    """How many images a person captions."""
    answers: Path | None = None
    """A data set whose captions stand in for the person."""
    captions_per_image: int = Field(default=1, ge=1, le=10)
    """That the person writes."""
    rounds: int = Field(default=2, ge=1)
    """How often images are picked, labelled and learnt from."""
    test_share: float = Field(default=0.2, gt=0, lt=1)
    seed: int = 0
    name: str = "mine"
    """Of the model in the registry."""
    registry: Path = Path("runs/registry")
    port: int = Field(default=0, ge=0, le=65535)
    """Of the label page; 0 takes any that is free."""
    open_browser: bool = False
    start: Path | None = None
    """A run that captions already, which every model begins with; of a bundle, `python -m trainer
    import` makes one."""
    pretrain: dict[str, Any] | None = None
    """A recipe of `pretrain` without data; the captioner's encoder begins with it."""
    acquire: dict[str, Any] = Field(default_factory=dict)
    """Keys of `acquire`: the method."""
    finetune: dict[str, Any]
    """A recipe of `finetune` without data."""
    pseudo: Pseudo | None = None
    scst: dict[str, Any] | None = None
    """What the recipe of reinforcement learning has otherwise than `[finetune]`."""
    export: dict[str, Any]
    """Keys of `export` but for run, name and data."""

    @property
    def test_labels(self) -> int:
        """How many of the labels are for testing."""
        return round(self.labels * self.test_share)

    @property
    def round_labels(self) -> list[int]:
        """How many images there are to learn from after each round."""
        own = self.labels - self.test_labels
        return [round(own * number / self.rounds) for number in range(1, self.rounds + 1)]


def run(config: Config, out_dir: Path) -> None:
    """Prints the plan, takes the steps that are not done, and writes the report.

    Raises:
        ConfigError: the preset does not make a plan.
        DataError: there are too few images or answers.
        CheckpointError: another process works in `out_dir`, or on other images or labels.
    """
    check_name(config.name)
    if not config.images.is_dir():
        raise ConfigError(f"{config.images}: no folder; auto takes the folder of the photographs")
    if config.test_labels < 2 or config.labels - config.test_labels < config.rounds:
        raise ConfigError(
            f"labels = {config.labels} with test_share = {config.test_share} and rounds = "
            f"{config.rounds}: at least 2 images are tested on, and one is learnt from each round"
        )
    _check_start(config)
    with claimed(config, out_dir, changeable=_CHANGEABLE, state="auto.json"):
        pipeline = Pipeline(config, out_dir)
        steps = planned(pipeline)
        print(estimate(pipeline, steps))
        for number, step in enumerate(steps, start=1):
            print(f"\n== step {number} of {len(steps)}: {step.words}", flush=True)
            pipeline.take(step)
        report.run(_report(pipeline, steps), out_dir)


def _check_start(config: Config) -> None:
    """Raises ConfigError where the preset wants another captioner than that at the start."""
    if config.start is None:
        return
    own = Run(config.start).recipe
    built = [f"[finetune.{key}]" for key in BUILT if key in config.finetune]
    if config.pretrain is not None:
        built.append("[pretrain]")
    if config.pseudo is not None and own.matcher is None:
        built.append("[pseudo], whose filter has a matcher")
    if built:
        raise ConfigError(
            f"{config.start} is a whole captioner, but the preset makes one too: leave "
            f"{', '.join(built)} out of it (auto_from_start.toml does)"
        )


def _report(pipeline: Pipeline, steps: Sequence[Step]) -> report.Config:
    """Returns what the report is about: every model in its order, the best one last."""
    done = pipeline.state.done
    names = [step.name for step in steps if done[step.name].run is not None]
    *before, last = [name for name in names if done[name].kept]
    config = pipeline.config
    table: dict[str, Any] = {
        "title": f"{config.name}: {config.labels} labels",
        "run": done[last].run,
        "evaluation": pipeline.folder / last / "evaluation",
        "before": [
            {
                "name": name,
                "run": done[name].run,
                "evaluation": pipeline.folder / name / "evaluation",
            }
            for name in before
        ],
        "notes": pipeline.not_kept(),
    }
    if len(config.round_labels) > 1:
        table["budget"] = {
            "counts": [
                {"labels": count, "evaluations": [pipeline.folder / f"model-{number}/evaluation"]}
                for number, count in enumerate(config.round_labels, start=1)
            ]
        }
    return validate(report.Config, table, "auto, the report")
