"""The recipe of an alignment."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator

from trainer.config import Config as BaseConfig
from trainer.data import Example
from trainer.loop import Loop
from trainer.optim import Optim
from trainer.stages._towers import Tables
from trainer.transforms import Augment


class Captioned(BaseConfig):
    """Keys of `[general]`: images with captions."""

    data: Path
    images: Path | None = None
    """The folder that image names are relative to; by default found beside the file."""
    split: str | None = None


class Unlabelled(Captioned):
    """Keys of `[unlabelled]`: images that tell what was forgotten."""

    sample: int = Field(default=1000, ge=2)
    """How many of them are looked at."""


class Data(BaseConfig):
    """Keys of `[data]`."""

    train: Path
    """The few captioned images."""
    train_split: str | None = None
    dev: Path | None = None
    """Captioned images on which the result is measured; by default the folds held out."""
    dev_split: str | None = None
    images: Path | None = None
    """The folder that image names are relative to; by default found beside the files."""
    scale: float = Field(default=1.25, ge=1)
    """Decoded images are kept this much larger than the towers take, so that crops stay sharp."""


class Folds(BaseConfig):
    """Keys of `[folds]`."""

    count: int = Field(default=5, ge=2)


class SmallOptim(Optim):
    """Keys of `[optim]`, with defaults for the weights of a large CLIP.

    From 1e-6 to 5e-6 such weights bend to a few hundred pairs; at 1e-4 they break. Small towers
    from a run of one's own take, and need, ten to a hundred times as much.
    """

    lr: float = 5e-6
    weight_decay: float = 0.01
    warmup: float = 0.1


class ShortLoop(Loop):
    """Keys of `[loop]`; more than ten epochs over a few images teach these images."""

    epochs: int = Field(default=10, ge=1)


class Config(BaseConfig):
    """A recipe that fine-tunes a CLIP."""

    seed: int = 0
    start: str
    """A run of `pretrain` with method clip, or of `align`; or a CLIPModel of transformers: the
    folder that `save_pretrained` wrote, tokenizer and processor included, or `hub:NAME`."""
    data: Data
    trained_blocks: int = Field(default=1, ge=0)
    """How many of the last blocks of each tower are trained (layers of a transformer, stages of a
    CNN), beside the projections; 0: the projections alone."""
    trained: tuple[str, ...] = ()
    """Parameter prefixes that are trained instead of these; norms below them are not."""
    alphas: tuple[float, ...] = Field(default=tuple(n / 10 for n in range(11)), min_length=1)
    """What may be chosen; 0 and 1, the original and the fine-tuned weights, always may."""
    folds: Folds = Folds()
    augment: Augment = Augment()
    optim: SmallOptim = SmallOptim()
    loop: ShortLoop = ShortLoop()
    general: Captioned | None = None
    """Captioned images of another kind, on which the original's retrieval should not be lost."""
    unlabelled: Unlabelled | None = None
    """By default the images of `data.dev`, or else of `data.train`."""
    neighbours: int = Field(default=10, ge=1)
    """Of an image, that are compared with those that it had."""

    @field_validator("alphas")
    @classmethod
    def _all_alphas(cls, alphas: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= alpha <= 1 for alpha in alphas):
            raise ValueError("each alpha lies between 0, the original, and 1, the fine-tuned")
        return tuple(sorted({0.0, 1.0, *alphas}))

    @field_validator("augment")
    @classmethod
    def _keeps_captions_true(cls, augment: Augment) -> Augment:
        augment.check_upright()
        return augment


class Resolved(Config, Tables):
    """`recipe.json`: the recipe, and the tables of its start, which are those of the result."""

    train_sha256: str
    """Of the captioned images: folds of others would not have held these out."""

    @classmethod
    def of(cls, config: Config, tables: Tables, examples: Sequence[Example]) -> Self:
        """Returns all of it as one."""
        rows = [[str(example.image), *example.captions] for example in examples]
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return cls.model_validate(
            {**config.model_dump(), **tables.model_dump(), "train_sha256": digest}
        )
