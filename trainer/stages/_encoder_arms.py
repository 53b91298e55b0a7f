"""Arms that are encoders, kept as they are or trained by a method; the caption probe decides."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from trainer import variants
from trainer.checkpoint import CHECKPOINT
from trainer.comparison import ENCODERS, Budget, RunFigures
from trainer.config import Config as BaseConfig
from trainer.config import validate, write_resolved
from trainer.data import check_apart, describe, read_examples
from trainer.errors import ConfigError, DataError
from trainer.loop import device_of, load_kept_weights
from trainer.photos import usable_examples
from trainer.probes import ProbeConfig, Probes
from trainer.run import PretrainRecipe, RawData, claimed
from trainer.runlog import read_log
from trainer.stages import pretrain
from trainer.stages._arms import (
    RESULT,
    ArmsConfig,
    Bench,
    Result,
    captioned,
    check_arms,
    check_informative,
    read_result,
    timed,
    words,
)
from trainer.transforms import Augment

_CAPTION_PROBE = "probe/caption_cider"


class Arm(BaseConfig):
    """Keys of `[arms.NAME]`."""

    encoder: dict[str, Any]
    method: dict[str, Any] | None = None
    """None keeps the encoder as it is."""
    augment: dict[str, Any] = Field(default_factory=dict)
    second_view: dict[str, Any] = Field(default_factory=dict)
    optim: dict[str, Any] = Field(default_factory=dict)
    loop: dict[str, Any] = Field(default_factory=dict)
    """Keys that differ from the tables that all arms share."""

    @property
    def changes(self) -> dict[str, dict[str, Any]]:
        """Returns the keys that differ, by table."""
        tables = self.model_dump(include={"augment", "second_view", "optim", "loop"})
        return {name: table for name, table in tables.items() if table}


class Config(ArmsConfig):
    """A recipe that compares encoders."""

    data: RawData
    second_view: Augment | None = None
    probe: ProbeConfig


def read_arms(config: Config) -> dict[str, Arm]:
    """Returns the arms, each of which can be built and trained as far as the recipe tells."""
    check_arms(config, "[arms.frozen] with an encoder, and another with an encoder and a method")
    if config.probe.captioned is None or config.probe.dev is None:
        raise ConfigError(
            "the caption probe decides, and needs captions: name probe.captioned, which it may "
            "copy from, and probe.dev, which it is measured on"
        )
    arms = {}
    for name, table in config.arms.items():
        arm = arms[name] = validate(Arm, table, f"arms.{name}")
        variants.parse("encoders", arm.encoder)
        if arm.method is not None:
            variants.parse("methods", arm.method)
            pretrain_recipe(config, name, arm, config.seeds[0])
        elif arm.changes:
            raise ConfigError(
                f"arms.{name}: without a method nothing is trained, and {list(arm.changes)} mean "
                "nothing; remove them or name a method"
            )
    return arms


def baseline_of(config: Config, arms: dict[str, Arm]) -> str:
    """Returns the arm that the others are compared with."""
    if config.baseline is not None:
        return config.baseline
    untrained = [name for name, arm in arms.items() if arm.method is None]
    if len(untrained) != 1:
        raise ConfigError(
            f"{len(untrained)} of the arms have no method; set baseline to the arm that the "
            f"others are compared with: {', '.join(arms)}"
        )
    return untrained[0]


def pretrain_recipe(config: Config, name: str, arm: Arm, seed: int) -> PretrainRecipe:
    """Returns the recipe of one run: the shared tables with the arm's keys laid over."""
    table = config.model_dump(exclude={"seeds", "baseline", "arms"})
    table |= {"seed": seed, "encoder": arm.encoder, "method": arm.method}
    for section, changes in arm.changes.items():
        table[section] = {**(table[section] or {}), **changes}
    return validate(PretrainRecipe, table, f"arms.{name}")


class EncoderBench(Bench):
    """Encoders over the same seeds, images and budget, each measured by the same probes.

    Raises:
        ConfigError: there is nothing to compare, or an arm cannot be built.
    """

    kind = ENCODERS

    def __init__(self, config: Config, out_dir: Path) -> None:
        super().__init__(out_dir)
        self.config: Config = config
        self.arms = read_arms(config)
        self.baseline = baseline_of(config, self.arms)
        untrained = [name for name, arm in self.arms.items() if arm.method is None]
        self.subject = "the frozen encoder" if untrained == [self.baseline] else self.baseline

    def prepare(self) -> None:
        """Reads what is learnt from, and makes the probes.

        Raises:
            DataError: the images of dev have been seen, or say nothing.
        """
        data, probe = self.config.data, self.config.probe
        assert probe.dev is not None  # `read_arms` has seen to it
        dev = captioned(read_examples(probe.dev, images=probe.images, split=probe.dev_split))
        check_informative(probe.dev, dev)
        examples = data.read()
        print(describe(data.train, examples))
        if any(_reads_captions(arm) for arm in self.arms.values()):
            check_apart(captioned(examples), dev, "data.train with captions", "probe.dev")
        known = {example.image.resolve() for example in dev}
        self._examples = usable_examples(examples)
        self.seen = sum(example.image.resolve() in known for example in self._examples)
        self._probes = Probes(probe, self.config.image, self._examples, seed=self.config.seeds[0])

    def about(self, name: str) -> Mapping[str, str]:
        """Returns the method and the encoder of an arm."""
        arm = self.arms[name]
        method = words(arm.method) if arm.method else "no method: the encoder as it is"
        return {"method": method, "encoder": words(arm.encoder)}

    def is_done(self, name: str, seed: int) -> bool:
        """Whether nothing of a run is left to be trained."""
        return self.arms[name].method is None or (self.folder_of(name, seed) / RESULT).exists()

    def run_of(self, name: str, seed: int) -> RunFigures:
        """Returns what an arm's run comes to; trains it unless it has been."""
        config, arm, probes = self.config, self.arms[name], self._probes
        torch.manual_seed(seed)  # as `pretrain` does: the encoder that the run begins with
        module, encoder_config = variants.parse("encoders", arm.encoder)
        encoder = module.Encoder(encoder_config, (config.image.height, config.image.width))
        # Laid out as in training, so that the same encoder gives the same figures.
        encoder.to(device=device_of(config.loop), memory_format=torch.channels_last).eval()
        budgets = {}
        if arm.method is None:
            figures = [(0.0, probes.measure(encoder))]
        else:
            recipe, folder = pretrain_recipe(config, name, arm, seed), self.folder_of(name, seed)
            images = len(captioned(self._examples) if _reads_captions(arm) else self._examples)
            result = _train(recipe, folder, images, probes)
            load_kept_weights(encoder, folder / CHECKPOINT, "encoder.")
            epochs, batch_size = recipe.loop.epochs, recipe.loop.batch_size
            figures = _logged(folder, epochs / result.steps)
            budgets[""] = Budget(images, epochs, batch_size, result.steps, result.seconds)
        before, after = figures[0][1], figures[-1][1]
        if not math.isfinite(before.get(_CAPTION_PROBE, math.nan)):
            raise DataError(
                f"arm {name!r}: the features that its encoder begins with are not finite"
            )
        curve = [(epoch, row[_CAPTION_PROBE]) for epoch, row in figures if _CAPTION_PROBE in row]
        scores = probes.caption_scores(encoder)
        return RunFigures(seed, before, after, scores.per_image[:, 0], curve, budgets)


def _train(recipe: PretrainRecipe, folder: Path, images: int, probes: Probes) -> Result:
    """Trains a run to its end, unless `result.json` says that this has been done."""
    if (folder / RESULT).exists() and (folder / CHECKPOINT).exists():
        with claimed(recipe, folder, changeable=pretrain.CHANGEABLE):
            return read_result(folder, images)
    steps, seconds = timed(folder, lambda: pretrain.run(recipe, folder, probes=probes))
    result = Result(images=images, steps=steps, seconds=seconds)
    write_resolved(result, folder / RESULT)
    return result


def _logged(folder: Path, epochs_per_step: float) -> list[tuple[float, dict[str, float]]]:
    """Returns what the probes of a run said, each time with the epochs trained by then."""
    return [
        (row["step"] * epochs_per_step, {k: v for k, v in row.items() if k.startswith("probe/")})
        for row in read_log(folder)
        if "probe/rankme" in row
    ]


def _reads_captions(arm: Arm) -> bool:
    if arm.method is None:
        return False
    return bool(variants.load("methods", arm.method["name"]).Method.reads_captions)
