"""Does a caption belong to an image? Two answers: a classifier's, and nearness in a shared space.

Li et al., 2022, "BLIP", https://arxiv.org/abs/2201.12086, section 3.2: image-text matching (ITM)
reads the caption together with the image and classifies; image-text contrast (ITC) embeds both
apart.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from exports.manifest import Reranking
from trainer.attention import Memory
from trainer.config import Config as BaseConfig
from trainer.errors import ConfigError


class MatcherConfig(BaseConfig):
    """Keys of `[matcher]`."""

    width: int = Field(default=256, ge=1)
    """E, of the space that images and captions share."""
    temperature: float = Field(default=0.07, gt=0)
    """Of similarities in it, at the start."""


class Matcher(nn.Module):
    """The heads on an encoder and on a decoder that can `read`; it holds neither.

    Args:
        config: the recipe's table.
        encoder_width: D of the encoder's pooled vector.
        decoder: which reads; it is passed again to every call.

    Raises:
        ConfigError: the decoder cannot read, or does not see images by cross-attention.
    """

    def __init__(self, config: MatcherConfig, *, encoder_width: int, decoder: Any) -> None:
        super().__init__()
        if not getattr(decoder, "reading_attention", ()):
            raise ConfigError(
                "[matcher] needs a decoder that also reads both ways: "
                '[decoder] name = "bert", text_encoder = true'
            )
        if decoder.reading.kind != "cross_attention":
            raise ConfigError(
                f"[matcher] reads captions together with the image by cross-attention, not as "
                f'{decoder.reading.kind}: [bridge] name = "cross_attention"'
            )
        self.itm_head = nn.Linear(decoder.width, 2)
        self.image_projection = nn.Linear(encoder_width, config.width)
        self.text_projection = nn.Linear(decoder.width, config.width)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))

    @property
    def reranking(self) -> Reranking:
        """How its numbers weigh against a search's, while no data have told."""
        return Reranking(temperature=self.temperature.item())

    def embed_images(self, pooled: Tensor) -> Tensor:
        """Returns unit vectors (B, E) of pooled (B, D)."""
        return F.normalize(self.image_projection(pooled).float(), dim=1)

    def embed_captions(self, decoder: Any, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns unit vectors (R, E) of captions (R, T), `<bos>` ... `<eos>` and padding."""
        first = decoder.read(token_ids, lengths)[:, 0]
        return F.normalize(self.text_projection(first).float(), dim=1)

    def match_logits(
        self, decoder: Any, token_ids: Tensor, lengths: Tensor, memory: Memory
    ) -> Tensor:
        """Returns logits (R, 2), of no match and of a match.

        Args:
            decoder: reads.
            token_ids: (R, T), `<bos>` ... `<eos>` and padding; the R / B captions of an image
                together.
            lengths: (R,), tokens without padding.
            memory: of B images.
        """
        first = decoder.read(token_ids, lengths, memory)[:, 0]
        logits: Tensor = self.itm_head(first).float()
        return logits
