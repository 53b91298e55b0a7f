"""The recipe of a comparison: tables that all arms share, and what each arm lays over them."""

import re
from typing import Any

from pydantic import Field

from exports.images import ImageSpec
from trainer import variants
from trainer.config import Config as BaseConfig
from trainer.config import validate
from trainer.errors import ConfigError
from trainer.loop import Loop
from trainer.optim import Optim
from trainer.probes import ProbeConfig
from trainer.run import PretrainRecipe, RawData, TokenizerConfig
from trainer.transforms import Augment


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


class Config(BaseConfig):
    """A recipe that compares encoders."""

    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    baseline: str | None = None
    """The arm that the others are compared with; by default the one without a method."""
    data: RawData
    image: ImageSpec
    """The same for all arms."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    augment: Augment = Augment()
    second_view: Augment | None = None
    optim: Optim = Optim()
    loop: Loop
    probe: ProbeConfig
    arms: dict[str, dict[str, Any]]


def read_arms(config: Config) -> dict[str, Arm]:
    """Returns the arms, each of which can be built and trained as far as the recipe tells."""
    if len(config.arms) < 2:
        raise ConfigError(
            f"{len(config.arms)} arm(s); a comparison needs two: write [arms.frozen] with an "
            "encoder, and another with an encoder and a method"
        )
    if len(set(config.seeds)) < len(config.seeds):
        raise ConfigError(f"seeds = {list(config.seeds)}: one is there twice")
    if config.probe.captioned is None or config.probe.dev is None:
        raise ConfigError(
            "the caption probe decides, and needs captions: name probe.captioned, which it may "
            "copy from, and probe.dev, which it is measured on"
        )
    arms = {}
    for name, table in config.arms.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(
                f"arm {name!r}: its runs get a folder of this name; use letters, digits, - and _"
            )
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
        if config.baseline not in arms:
            raise ConfigError(f"baseline = {config.baseline!r}; the arms are {', '.join(arms)}")
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
