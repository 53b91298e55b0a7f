"""What bridges are made of: transformer layers, positions of image tokens."""

from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn


class Layer(nn.Module):
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
        """Returns (B, N, D) from hidden (B, N, D)."""
        batch, tokens, width = hidden.shape
        qkv = self.qkv(self.norm_1(hidden)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, D / H)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, width)
        hidden = hidden + self.dropout(self.out(mixed))
        return hidden + self.dropout(self.mlp(self.norm_2(hidden)))


class Positioned(nn.Module):
    """Base of bridges with a learned `position`, which may come from another grid of tokens."""

    position: nn.Parameter

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        name = f"{prefix}position"
        if name in state:
            state[name] = resize_positions(state[name], self.position.shape[1])
        super()._load_from_state_dict(state, prefix, *rest)


def positions(tokens: int, width: int) -> nn.Parameter:
    """Returns (1, N, D), a vector for each image token."""
    return nn.Parameter(torch.zeros(1, tokens, width).normal_(std=0.02))


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
