"""Image-text matching: captions with their own images, and with those that nearly fit.

Li et al., 2021, "Align before Fuse", https://arxiv.org/abs/2107.07651, equation 5 and the hard
negatives of section 3.2. Each text gets an image of the batch and each image a text of it that is
not its own, drawn in proportion to softmax(similarity / t) + 1e-4. Of three pairs one is right, so
the best answer that ignores its input costs ln 3 - 2/3 ln 2 = 0.6365: only a loss below that is
learnt, and `itm_gain` is by how much.

Departures:

1. All C captions of an image take part, and the image gets as many other texts.
2. `easy_negatives` draws a share of the negatives without regard to similarity. The hardest of a
   small batch, all hard from the start, can keep a small model at the constant answer for good.
3. A caption of the image itself, or one that reads the same, is never a negative.
4. Both sides of a similarity come from the captioner itself, not from a slower copy.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from trainer.attention import Memory
from trainer.captioner import Captioner
from trainer.errors import ConfigError
from trainer.objectives._captioning import IGNORE_INDEX, CaptioningConfig
from trainer.objectives._pairs import matcher_of

_FLOOR = 1e-4


class MatchingConfig(CaptioningConfig):
    """Keys of the objectives that match."""

    easy_negatives: float = Field(default=0.0, ge=0, le=1)
    """Share of the negatives that are drawn without regard to similarity."""


def matching_loss(
    captioner: Captioner,
    memory: Memory,
    batch: dict[str, Any],
    similarity: Tensor,
    right: Tensor,
    *,
    easy: float,
) -> dict[str, Tensor]:
    """Returns the cross-entropy, what it gains on a constant answer, and the accuracy.

    Args:
        captioner: with a matcher.
        memory: of B images.
        batch: their captions, as `CaptionDataset.collate` makes it.
        similarity: (B, R), of images to captions, divided by the temperature.
        right: (B, R), whether a caption describes an image.
        easy: share of easy negatives.

    Raises:
        ConfigError: a batch of one image, which has no negatives.
    """
    images, rows = similarity.shape
    if images < 2:
        raise ConfigError(
            "matching needs images that a caption does not fit: raise loop.batch_size"
        )
    other_images, image_found = hard_negatives(similarity.T, right.T, easy=easy)
    captions = rows // images
    other_texts, text_found = hard_negatives(
        *(part.repeat_interleave(captions, dim=0) for part in (similarity, right)),
        easy=easy,
    )
    own = torch.arange(rows, device=similarity.device)
    # Image by image, its own captions and then others; below, every caption with another image.
    texts = torch.cat([own.view(images, -1), other_texts.view(images, -1)], dim=1).flatten()
    yes, no = torch.ones_like(own), torch.zeros_like(own)
    by_image = (yes, no.masked_fill(~text_found, IGNORE_INDEX))
    labels = torch.cat([part.view(images, -1) for part in by_image], dim=1).flatten()
    labels = torch.cat([labels, no.masked_fill(~image_found, IGNORE_INDEX)])
    logits = torch.cat(
        [
            _match(captioner, batch, texts, memory),
            _match(captioner, batch, own, _memory_of(memory, other_images)),
        ]
    )
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)
    counted = labels != IGNORE_INDEX
    share = labels[counted].float().mean()
    constant = F.binary_cross_entropy(share, share)
    hits = (logits.argmax(1) == labels)[counted].float().mean()
    return {"loss": loss, "itm_gain": (constant - loss).detach(), "itm_accuracy": hits}


def _match(captioner: Captioner, batch: dict[str, Any], texts: Tensor, memory: Memory) -> Tensor:
    """Returns logits (N, 2) of the batch's captions numbered `texts` (N,)."""
    matcher = matcher_of(captioner)
    token_ids, lengths = batch["token_ids"][texts], batch["lengths"][texts]
    return matcher.match_logits(captioner.decoder, token_ids, lengths, memory)


def hard_negatives(
    similarity: Tensor, right: Tensor, *, easy: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Returns a wrong column for every row, the likelier the more similar, and where there is one.

    Args:
        similarity: (N, M), logits.
        right: (N, M), columns that are never drawn.
        easy: share of the wrong columns that are drawn without regard to similarity.

    Returns:
        Columns (N,), and truth values (N,): False where all columns are right.
    """
    found = ~right.all(1)
    hard = (similarity.detach().softmax(1) + _FLOOR).masked_fill(right, 0.0)
    any_wrong = (~right).float()
    weights = (1 - easy) * _shares(hard) + easy * _shares(any_wrong)
    drawn = torch.multinomial(weights + (~found).unsqueeze(1).float(), 1).squeeze(1)
    return drawn, found


def _shares(weights: Tensor) -> Tensor:
    """Returns each row (N, M) divided by its sum, which may be 0."""
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-12)


def _memory_of(memory: Memory, images: Tensor) -> Memory:
    """Returns the memory of the images (N,), as numbered in `memory`."""
    return Memory.of({name: part[images] for name, part in memory.named().items()})
