"""How text attends: to itself, and to the image.

Every decoder family is written once, over `Attention`; what lies behind it differs:

- `SequenceAttention` has all tokens at once, for training;
- `GrowingCache` has the newest token and what the others left, for the trainer's own decoding;
- `trainer.tree_cache.TreeCache` is what the exported graph does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Relative = Callable[[Tensor], Tensor]
"""Distances (...), position of a key minus that of a query, to biases (..., H)."""

_PREFIX_VISIBLE = "prefix_visible"


@dataclass(frozen=True, slots=True)
class Memory:
    """What text attends to beside itself, computed once an image.

    Attributes:
        image: `[k0, v0, ...]` of the layers that attend to the image, each (B, H, M, D / H).
        prefix: `[k0, v0, ...]` of what stands before the text in each layer, (B, H, P, D / H).
        prefix_visible: (B, 1, 1, P), 0 for what counts, -inf for padding; None: all of it counts.
    """

    image: tuple[Tensor, ...] = ()
    prefix: tuple[Tensor, ...] = ()
    prefix_visible: Tensor | None = None

    @property
    def images(self) -> int:
        """B."""
        return (self.image or self.prefix)[0].shape[0]

    def named(self) -> dict[str, Tensor]:
        """Returns the tensors by the names that graphs give them."""
        found = dict(zip(pair_names("memory", len(self.image) // 2), self.image, strict=True))
        found |= zip(pair_names("prefix", len(self.prefix) // 2), self.prefix, strict=True)
        if self.prefix_visible is not None:
            found[_PREFIX_VISIBLE] = self.prefix_visible
        return found

    @staticmethod
    def of(named: Mapping[str, Tensor]) -> "Memory":
        """Returns what `named` gave, put together again."""

        def those(kind: str) -> tuple[Tensor, ...]:
            starts = (f"{kind}_k.", f"{kind}_v.")
            return tuple(value for name, value in named.items() if name.startswith(starts))

        return Memory(those("memory"), those("prefix"), named.get(_PREFIX_VISIBLE))


def pair_names(kind: str, layers: int) -> tuple[str, ...]:
    """Returns `kind_k.0`, `kind_v.0`, `kind_k.1` ...: a key and a value for each layer."""
    return tuple(f"{kind}_{part}.{layer}" for layer in range(layers) for part in "kv")


class Attention(Protocol):
    """What a decoder asks, for the tokens (...) that it computes: one a row, or a sequence."""

    def text(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        relative: Relative | None = None,
    ) -> Tensor:
        """Returns (..., D): each token attends to what stands before the text, and to the text.

        Args:
            layer: which decoder layer.
            query: (..., D).
            key: (..., D'), D' = D or a whole fraction of it: heads may share keys (Ainslie et al.,
                2023, https://arxiv.org/abs/2305.13245).
            value: likewise.
            scale: of the products; by default the square root of a head's width, inverted.
            relative: added to them within the text.
        """

    def image(self, layer: int, query: Tensor, *, scale: float | None = None) -> Tensor:
        """Returns (..., D): queries (..., D) attend to the image of their row.

        Args:
            layer: which of the layers that do so.
            query: (..., D).
            scale: as above.
        """


@dataclass(slots=True)
class SequenceAttention:
    """All tokens at once: queries are (R, T, D); the R / B rows of an image stand together.

    Attributes:
        memory: of the B images.
        head_dim: D / H.
        causal: whether a token is hidden from those before it.
        dropout: of the attention weights.
        visible: (R, T, M), which image tokens each token sees; None: all.
        text_visible: (R, 1, 1, T), 0 for what counts of the text, else -inf; None: all of it.
        written: keys and values of the text, layer by layer, each (R, H, T, D / H).
    """

    memory: Memory
    head_dim: int
    causal: bool = True
    dropout: float = 0.0
    visible: Tensor | None = None
    text_visible: Tensor | None = None
    written: list[Tensor] = field(default_factory=list)

    def text(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        relative: Relative | None = None,
    ) -> Tensor:
        """See `Attention`."""
        tokens = query.shape[1]
        keys, values = split_heads(key, self.head_dim), split_heads(value, self.head_dim)
        self.written += [keys, values]
        bias = None
        behind = self.memory.prefix and self.causal
        if relative is not None or behind or self.text_visible is not None:
            bias = self._bias(tokens, relative, query)
        if self.memory.prefix:
            keys, values = with_prefix(self.memory, layer, keys, values)
        mixed = F.scaled_dot_product_attention(
            split_heads(query, self.head_dim),
            keys,
            values,
            attn_mask=bias,
            dropout_p=self.dropout,
            is_causal=self.causal and bias is None,
            scale=scale,
            enable_gqa=query.shape != key.shape,
        )
        return _join_heads(mixed)

    def image(self, layer: int, query: Tensor, *, scale: float | None = None) -> Tensor:
        """See `Attention`. The rows of an image are queries against one copy of its keys."""
        keys, values = self.memory.image[2 * layer : 2 * layer + 2]
        grid = query.reshape(keys.shape[0], -1, query.shape[-1])
        visible = self.visible
        if visible is not None:
            visible = visible.reshape(keys.shape[0], 1, -1, visible.shape[-1])
        mixed = F.scaled_dot_product_attention(
            split_heads(grid, self.head_dim),
            keys,
            values,
            attn_mask=visible,
            dropout_p=self.dropout,
            scale=scale,
        )
        return _join_heads(mixed).reshape(query.shape)

    def _bias(self, tokens: int, relative: Relative | None, like: Tensor) -> Tensor:
        """Returns what is added to the products: (R or 1, H or 1, T, P + T)."""
        place = torch.arange(tokens, device=like.device)
        distance = place[None, :] - place[:, None]
        bias = like.new_zeros(1, 1, tokens, tokens)
        if relative is not None:
            bias = bias + relative(distance).permute(2, 0, 1)
        if self.causal:
            bias = bias.masked_fill(distance > 0, float("-inf"))
        if self.text_visible is not None:
            bias = bias + self.text_visible
        if self.memory.prefix:
            before = prefix_bias(self.memory, like.shape[0]).expand(-1, -1, tokens, -1)
            before = before.expand(-1, bias.shape[1], -1, -1)
            bias = torch.cat([before, bias.expand(before.shape[0], -1, -1, -1)], dim=3)
        return bias.to(like.dtype)


@dataclass(slots=True)
class GrowingCache:
    """The newest token of every row, all at one position: queries are (R, D).

    Attributes:
        past: `[k0, v0, ...]`, each (R, H, T, D / H).
        memory: of the B images; the R / B rows of an image stand together.
        present: what `past` becomes, each (R, H, T + 1, D / H); filled layer by layer.
    """

    past: Sequence[Tensor]
    memory: Memory
    present: list[Tensor] = field(default_factory=list)

    def text(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        relative: Relative | None = None,
    ) -> Tensor:
        """See `Attention`."""
        head_dim = self.past[0].shape[3]
        keys, values = (
            torch.cat([self.past[2 * layer + part], split_heads(new[:, None], head_dim)], dim=2)
            for part, new in enumerate((key, value))
        )
        self.present += [keys, values]
        tokens, bias = keys.shape[2], None
        if relative is not None:
            distance = torch.arange(1 - tokens, 1, device=query.device)
            bias = relative(distance).T[None, :, None]  # (1, H, 1, T)
        if self.memory.prefix:
            keys, values = with_prefix(self.memory, layer, keys, values)
            before = prefix_bias(self.memory, len(query))
            bias = torch.cat([before, before.new_zeros(len(before), 1, 1, tokens)], dim=3)
        mixed = F.scaled_dot_product_attention(
            split_heads(query[:, None], head_dim),
            keys,
            values,
            attn_mask=bias,
            scale=scale,
            enable_gqa=query.shape != key.shape,
        )
        return _join_heads(mixed)[:, 0]

    def image(self, layer: int, query: Tensor, *, scale: float | None = None) -> Tensor:
        """See `Attention`."""
        sequence = SequenceAttention(self.memory, self.past[0].shape[3])
        return sequence.image(layer, query[:, None], scale=scale)[:, 0]


def split_heads(values: Tensor, head_dim: int) -> Tensor:
    """Returns (B, H, N, D / H) for values (B, N, D)."""
    return values.unflatten(2, (-1, head_dim)).transpose(1, 2)


def _join_heads(values: Tensor) -> Tensor:
    """Returns (B, N, D) for values (B, H, N, D / H)."""
    return values.transpose(1, 2).flatten(2)


def with_prefix(memory: Memory, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns keys and values (R, H, T, D / H) behind those of each row's prefix."""
    first, second = (
        torch.cat([part.repeat_interleave(len(own) // len(part), dim=0), own], dim=2)
        for part, own in zip(memory.prefix[2 * layer : 2 * layer + 2], (keys, values), strict=True)
    )
    return first, second


def prefix_bias(memory: Memory, rows: int) -> Tensor:
    """Returns what hides the padding of prefixes: (R, 1, 1, P), or (1, 1, 1, P) where none is."""
    if memory.prefix_visible is None:
        return memory.prefix[0].new_zeros(1, 1, 1, memory.prefix[0].shape[2])
    return memory.prefix_visible.repeat_interleave(rows // memory.images, dim=0)
