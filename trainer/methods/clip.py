"""CLIP: an image and its caption find each other among those of a batch.

Radford et al., 2021, "Learning Transferable Visual Models From Natural Language Supervision",
https://arxiv.org/abs/2103.00020, figure 3:

    logits = exp(s) I T',  loss = (CE over rows + CE over columns) / 2,

with I and T the unit-length projections of both towers. s begins at ln(1 / 0.07) and never exceeds
ln 100.

Departure: where captions of a batch are the same, each is a right answer for the images of all of
them, in equal shares. In a hundred captions some do repeat, and the paper's targets would teach
that a caption does not describe the image that it describes.
"""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.distributed import gathered
from trainer.methods._contrastive import REMEDIES, Pooled, in_chunks
from trainer.methods._method import Method as BaseMethod
from trainer.methods._method import MethodConfig, Setting
from trainer.text_encoder import TextEncoder, TextEncoderConfig


class Config(MethodConfig):
    """Keys of `[method] name = "clip"`."""

    width: int = Field(default=256, ge=1)
    """Of the space that images and captions share."""
    temperature: float = Field(default=0.07, gt=0)
    """What exp(-s) is at the start."""
    text: TextEncoderConfig = TextEncoderConfig()
    chunk: int = Field(default=0, ge=0)
    """Images encoded at a time, for batches larger than memory; 0 encodes all together."""


class Method(BaseMethod):
    """See the module."""

    reads_captions = True
    divisible = False
    remedies = REMEDIES

    def __init__(self, config: Config, encoder: Any, setting: Setting) -> None:
        super().__init__(config, encoder, setting)
        assert setting.text is not None
        self._chunk = config.chunk
        self.text_encoder = TextEncoder(
            config.text, vocab_size=setting.text.vocab_size, max_length=setting.text.max_length
        )
        self.image_projection = nn.Linear(encoder.width, config.width, bias=False)
        self.text_projection = nn.Linear(self.text_encoder.width, config.width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the loss, exp(s), and how often the nearest caption is a right one.

        At chance an image takes any caption of the batch for its own.
        """
        images = self.embed_images(batch["images"])
        captions = self.embed_captions(batch["token_ids"], batch["lengths"])
        scale = self.logit_scale.clamp(max=math.log(100)).exp()
        images, captions = gathered(images), gathered(captions)
        logits = scale * images @ captions.T
        targets = same_captions(gathered(self._full_length(batch["token_ids"])))
        with torch.no_grad():
            hits = targets.gather(1, logits.argmax(1, keepdim=True)).gt(0).float().mean()
        loss = clip_loss(logits, targets)
        return {
            "loss": loss,
            "of_chance": loss.detach() / math.log(len(logits)),
            "logit_scale": scale.detach(),
            "caption_accuracy": hits,
        }

    def embed_images(self, images: Tensor) -> Tensor:
        """Returns unit vectors (B, E) of pixels (B, 3, H, W) in 0..255."""
        return self.project_images(in_chunks(Pooled(self.encoder), images, self._chunk))

    def project_images(self, pooled: Tensor) -> Tensor:
        """Returns unit vectors (B, E) of the encoder's pooled features (B, D)."""
        return F.normalize(self.image_projection(pooled).float(), dim=1)

    def embed_captions(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns unit vectors (B, E) of captions (B, T) of `lengths` (B,)."""
        captions = self.text_encoder(token_ids, lengths)
        return F.normalize(self.text_projection(captions).float(), dim=1)

    def _full_length(self, token_ids: Tensor) -> Tensor:
        """Returns (B, longest), as wide as every other worker's."""
        return F.pad(token_ids, (0, len(self.text_encoder.position) - token_ids.shape[1]))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Keeps s at ln 100 at most."""
        del step
        self.logit_scale.clamp_(max=math.log(100))


def same_captions(token_ids: Tensor) -> Tensor:
    """Returns (B, B): in each row equal shares for the captions (B, T) that are the row's own."""
    same = (token_ids[:, None] == token_ids[None]).all(2).float()
    return same / same.sum(1, keepdim=True)


def clip_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean of the cross-entropies over rows and over columns.

    Args:
        logits: (B, B), images by captions.
        targets: (B, B), symmetric, rows that sum to 1; the identity where no caption repeats.
    """
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
