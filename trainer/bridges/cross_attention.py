"""Image tokens projected to the decoder's width, which every decoder layer cross-attends to.

The projection is followed by a learned position a token and by pre-norm self-attention layers
(Vaswani et al., 2017, https://arxiv.org/abs/1706.03762; as refinement of grid features for
captioning: Cornia et al., 2020, https://arxiv.org/abs/1912.08226).
"""

from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import Config as BaseConfig


class Config(BaseConfig):
    """Keys of `[bridge] name = "cross_attention"`."""

    layers: int = 1
    heads: int = 4
    dropout: float = 0.1


class Bridge(nn.Module):
    """Projects, places and refines the image tokens.

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
        self.project = nn.Sequential(
            nn.LayerNorm(encoder_width),
            nn.Linear(encoder_width, decoder_width),
            nn.Dropout(config.dropout),
        )
        self.position = nn.Parameter(torch.zeros(1, tokens, decoder_width))
        nn.init.normal_(self.position, std=0.02)
        self.layers = nn.ModuleList(
            _Layer(decoder_width, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(decoder_width)

    def forward(self, image_tokens: Tensor) -> Tensor:
        """Returns (B, N, D_decoder) from image_tokens (B, N, D_encoder)."""
        hidden = self.project(image_tokens) + self.position
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        name = f"{prefix}position"
        if name in state:
            state[name] = resize_positions(state[name], self.position.shape[1])
        super()._load_from_state_dict(state, prefix, *rest)


def resize_positions(position: Tensor, tokens: int) -> Tensor:
    """Returns positions (1, N, D) of a square grid for another one of `tokens`, bilinearly.

    So a run may start from one at another image size, as vision transformers do (Dosovitskiy et
    al., 2020, section 3.2, https://arxiv.org/abs/2010.11929). Where either grid is no square they
    are returned as they are.
    """
    old, new = isqrt(position.shape[1]), isqrt(tokens)
    if old == new or old**2 != position.shape[1] or new**2 != tokens:
        return position
    grid = position.transpose(1, 2).unflatten(2, (old, old))  # (1, D, h, w)
    resized = nn.functional.interpolate(grid, (new, new), mode="bilinear", align_corners=False)
    return resized.flatten(2).transpose(1, 2)


class _Layer(nn.Module):
    """A pre-norm transformer encoder layer, written out so that it traces into a plain graph."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, tokens, width = hidden.shape
        qkv = self.qkv(self.norm_1(hidden)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, D / H)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, width)
        hidden = hidden + self.dropout(self.out(mixed))
        return hidden + self.dropout(self.mlp(self.norm_2(hidden)))
