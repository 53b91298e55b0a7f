"""Labelled images for an exported captioner to take examples from."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from trainer.captioner import Captioner
from trainer.config import Config as BaseConfig
from trainer.data import Example, check_apart
from trainer.dataset import framed
from trainer.photos import load_all, read_captioned
from trainer.run import Run


class FewShot(BaseConfig):
    """Keys of `[few_shot]`: labelled images that the encoder graph takes examples from.

    They go into the bundle, captions included: name only what may be published.
    """

    shots: int = Field(ge=1)
    """How many of them stand before each text; at most `[bridge] shots` of the run."""
    data: Path
    """Captioned images, those of training or others; the first caption of each counts."""
    images: Path | None = None
    split: str | None = None
    limit: int = Field(default=1000, ge=1)
    """How many of them, drawn at random: each takes as much room as its latents."""


def show_examples(
    config: FewShot, captioner: Captioner, source: Run, examples: Sequence[Example]
) -> dict[str, Any]:
    """Gives the captioner labelled images, none of them among the `examples` to be captioned.

    Returns what a bundle's provenance says of them.

    Raises:
        ConfigError: there are too few, or the run has no room for so many examples.
        DataError: one of them is among those to be captioned.
    """
    labelled = read_captioned(config.data, config.images, config.split)
    check_apart(labelled, examples, "few_shot.data", "data")
    chosen = random.Random(0).sample(labelled, min(config.limit, len(labelled)))
    captions = [framed(source.tokenizer.encode(e.captions[0]), source.text) for e in chosen]
    pixels = load_all(chosen, source.recipe.image)
    captioner.show_examples(pixels, captions, shots=config.shots)
    return {"shots": config.shots, "data": config.data.name, "images": len(chosen)}
