"""What comparisons of every kind share: arms by name, each run once a seed, kept in its folder."""

import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from exports.images import ImageSpec
from trainer.checkpoint import CHECKPOINT, load_checkpoint
from trainer.comparison import Kind, RunFigures, Sample
from trainer.config import Config as BaseConfig
from trainer.config import validate
from trainer.data import Example
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.loop import Loop
from trainer.metrics import cider
from trainer.optim import Optim
from trainer.run import TokenizerConfig
from trainer.transforms import Augment

RESULT = "result.json"


class ArmsConfig(BaseConfig):
    """Keys of every comparison; those of its kind stand beside them."""

    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    baseline: str | None = None
    """The arm that the others are compared with; by default the one without a method, and of
    captioners the first."""
    image: ImageSpec
    """The same for all arms."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    augment: Augment = Augment()
    optim: Optim = Optim()
    loop: Loop
    arms: dict[str, dict[str, Any]]


class Config(ArmsConfig):
    """A recipe that compares, whatever its kind."""

    model_config = ConfigDict(extra="allow")


class Result(BaseConfig):
    """`result.json` of a run that is done: what it learnt from and took."""

    images: int
    steps: int
    seconds: float | None
    """Of all steps, at the speed of those that were measured: a run that was killed counts as fast
    as its last part. None where all steps were made before."""


class Bench(ABC):
    """Makes and measures the runs of one comparison.

    Attributes:
        config: The recipe, with defaults.
        baseline: The arm that the others are compared with.
        subject: What the verdict calls it.
        seen: How many images of dev are also learnt from.
    """

    kind: Kind
    config: ArmsConfig
    baseline: str
    subject: str
    seen: int = 0

    def __init__(self, out_dir: Path) -> None:
        self._out_dir = out_dir

    def folder_of(self, name: str, seed: int) -> Path:
        """Returns where a run of an arm stands."""
        return self._out_dir / name / str(seed)

    @abstractmethod
    def prepare(self) -> None:
        """Reads the data, before anything is written."""

    @abstractmethod
    def about(self, name: str) -> Mapping[str, str]:
        """Returns what an arm is, in lines with a name each."""

    @abstractmethod
    def is_done(self, name: str, seed: int) -> bool:
        """Whether nothing of a run is left to be trained."""

    @abstractmethod
    def run_of(self, name: str, seed: int) -> RunFigures:
        """Returns what an arm's run comes to; trains it unless it has been."""

    def samples(self) -> list[Sample]:
        """Returns images with what every arm says of them, where arms say something."""
        return []


def check_arms(config: ArmsConfig, example: str) -> None:
    """Raises ConfigError unless there are arms to compare, by names that folders may have."""
    if len(config.arms) < 2:
        raise ConfigError(f"{len(config.arms)} arm(s); a comparison needs two: write {example}")
    if len(set(config.seeds)) < len(config.seeds):
        raise ConfigError(f"seeds = {list(config.seeds)}: one is there twice")
    for name in config.arms:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(
                f"arm {name!r}: its runs get a folder of this name; use letters, digits, - and _"
            )
    if config.baseline is not None and config.baseline not in config.arms:
        raise ConfigError(f"baseline = {config.baseline!r}; the arms are {', '.join(config.arms)}")


def captioned(examples: Sequence[Example]) -> list[Example]:
    """Returns the examples that have captions."""
    return [example for example in examples if example.captions]


def check_informative(source: Path, dev: Sequence[Example]) -> None:
    """Raises DataError where CIDEr-D cannot tell good captions of `dev` from bad ones."""
    if not cider.DocumentFrequencies.of([example.captions for example in dev]).informative:
        raise DataError(
            f"{source}: CIDEr-D says nothing of its {len(dev)} captioned image(s); it needs "
            "several, with different captions"
        )


def words(table: Mapping[str, Any]) -> str:
    """Returns a variant's table in a line."""
    keys = [f"{key} {value}" for key, value in table.items() if key != "name"]
    return ", ".join([table["name"], *keys])


def read_result(folder: Path, images: int) -> Result:
    """Returns what a run that is done took.

    Raises:
        CheckpointError: it learnt from another number of images.
    """
    path = folder / RESULT
    result = validate(Result, json.loads(path.read_text(encoding="utf-8")), str(path))
    if result.images != images:
        raise CheckpointError(
            f"{folder}: learnt from {result.images} images, now there are {images}; choose "
            "another folder with --out, or remove this one"
        )
    return result


def timed(folder: Path, work: Callable[[], None]) -> tuple[int, float | None]:
    """Does a run's work; returns its optimiser steps and seconds as `Result` has them.

    Work that trains nothing has no steps, and counts as long as its last part took.
    """
    checkpoint = folder / CHECKPOINT
    begun = load_checkpoint(checkpoint)[1]["step"] if checkpoint.exists() else 0
    since = time.perf_counter()
    work()
    elapsed = time.perf_counter() - since
    if not checkpoint.exists():
        return 0, elapsed
    steps = load_checkpoint(checkpoint)[1]["total"]
    return steps, elapsed * steps / (steps - begun) if begun < steps else None
