"""What the objectives on pairs share: which captions belong to which image.

B images, C captions of each; R = B * C rows, the captions of an image together.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.captioner import Captioner
from trainer.errors import ConfigError
from trainer.matching import Matcher

_MULTIPLIER = 6364136223846793005  # of Knuth's 64-bit congruential generator


def check_reads(captioner: Captioner, objective: str) -> None:
    """Raises ConfigError unless the decoder reads captions in both directions, with the image."""
    decoder = captioner.decoder
    if not getattr(decoder, "reading_attention", ()):
        raise ConfigError(
            f"objective {objective} reads captions in both directions: "
            'set [decoder] name = "bert", text_encoder = true'
        )
    if decoder.reading.kind != "cross_attention":
        raise ConfigError(
            f"objective {objective} reads captions by cross-attention to the image, not by "
            f'{decoder.reading.kind}: set [bridge] name = "cross_attention"'
        )


def check_matcher(captioner: Captioner, objective: str) -> None:
    """Raises ConfigError unless the captioner has a matcher, and its decoder reads."""
    check_reads(captioner, objective)
    if captioner.matcher is None:
        raise ConfigError(
            f"objective {objective} trains heads that tell whether a caption belongs to an image: "
            "add a [matcher] table"
        )


def matcher_of(captioner: Captioner) -> Matcher:
    """Returns the captioner's matcher, which was checked (`check_matcher`)."""
    assert captioner.matcher is not None
    return captioner.matcher


@dataclass(frozen=True, slots=True)
class Labels:
    """What tells whose captions are whose.

    Attributes:
        indices: (B,), which image.
        keys: (B, C), a number for each caption, the same where the words are the same.
    """

    indices: Tensor
    keys: Tensor

    @staticmethod
    def of(batch: dict[str, Any]) -> "Labels":
        """Returns those of a batch as `CaptionDataset.collate` makes it."""
        keys = caption_keys(batch["token_ids"], batch["lengths"])
        return Labels(batch["indices"], keys.view(len(batch["indices"]), -1))


def belongs(images: Labels, captions: Labels) -> Tensor:
    """Returns (B, R), whether a caption describes an image.

    It does where it was written for the image, or reads the same as one that was.

    Args:
        images: of B images with whatever captions.
        captions: of R / C images with C captions each.
    """
    own = (images.indices[:, None] == captions.indices).repeat_interleave(
        captions.keys.shape[1], dim=1
    )
    same = torch.zeros_like(own)
    for keys in images.keys.unbind(1):
        same |= keys[:, None] == captions.keys.flatten()
    return own | same


def caption_keys(token_ids: Tensor, lengths: Tensor) -> Tensor:
    """Returns a 64-bit hash (R,) of captions (R, T) of `lengths` (R,); padding does not count."""
    keys = torch.zeros_like(lengths)
    for position, column in enumerate(token_ids.unbind(1)):
        keys = torch.where(position < lengths, keys * _MULTIPLIER + column + 1, keys)
    return keys
