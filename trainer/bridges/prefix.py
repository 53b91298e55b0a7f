"""ClipCap: the image becomes the first words of a language model.

Mokady et al., 2021, "ClipCap: CLIP Prefix for Image Captioning", https://arxiv.org/abs/2111.09734,
section 3.2: a mapping network makes k vectors of the width of word embeddings; either an MLP with
one hidden layer (k = 10, the language model is trained too) or a transformer that reads the image
beside k learned constants (8 layers, k = 40, the language model may stay frozen).

1. The MLP maps the mean of the image tokens: not every encoder has a vector that means the image.
2. The transformer reads the image tokens themselves, not pieces of one vector.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.bridges._transformer import Layer, Positioned, positions
from trainer.config import Config as BaseConfig
from trainer.reading import Reading


class Config(BaseConfig):
    """Keys of `[bridge] name = "prefix"`."""

    mapper: Literal["mlp", "transformer"] = "mlp"
    length: int = Field(default=10, ge=1)
    """k, how many vectors the image becomes."""
    layers: int = Field(default=8, ge=1)
    """Of the transformer."""
    heads: int = 8
    dropout: float = 0.0

    def reading(self) -> Reading:
        """Returns what becomes of the tokens in the decoder."""
        return Reading("prefix", room=self.length)


class Bridge(nn.Module):
    """See the module.

    Args:
        config: the recipe's table.
        encoder_width: D of the encoder.
        decoder_width: D of the decoder.
        tokens: N, fixed by the image size and the encoder.
    """

    def __init__(
        self, config: Config, *, encoder_width: int, decoder_width: int, tokens: int
    ) -> None:
        super().__init__()
        made = _Mlp if config.mapper == "mlp" else _Transformer
        self.mapper = made(config, encoder_width, decoder_width, tokens)

    def forward(self, image_tokens: Tensor) -> Tensor:
        """Returns (B, k, D_decoder) from image_tokens (B, N, D_encoder)."""
        mapped: Tensor = self.mapper(image_tokens)
        return mapped


class _Mlp(nn.Sequential):
    def __init__(self, config: Config, encoder_width: int, decoder_width: int, tokens: int) -> None:
        del tokens
        out = config.length * decoder_width
        super().__init__(
            nn.LayerNorm(encoder_width),
            nn.Linear(encoder_width, out // 2),
            nn.Tanh(),
            nn.Dropout(config.dropout),
            nn.Linear(out // 2, out),
            nn.Unflatten(1, (config.length, decoder_width)),
        )

    def forward(self, image_tokens: Tensor) -> Tensor:
        mapped: Tensor = super().forward(image_tokens.mean(1))
        return mapped


class _Transformer(Positioned):
    def __init__(self, config: Config, encoder_width: int, decoder_width: int, tokens: int) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.LayerNorm(encoder_width), nn.Linear(encoder_width, decoder_width)
        )
        self.position = positions(tokens, decoder_width)
        self.constants = nn.Parameter(torch.randn(1, config.length, decoder_width) * 0.02)
        self.layers = nn.ModuleList(
            Layer(decoder_width, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(decoder_width)

    def forward(self, image_tokens: Tensor) -> Tensor:
        seen = self.project(image_tokens) + self.position
        hidden = torch.cat([seen, self.constants.expand(seen.shape[0], -1, -1)], dim=1)
        for layer in self.layers:
            hidden = layer(hidden)
        mapped: Tensor = self.norm(hidden[:, seen.shape[1] :])
        return mapped
