"""How one decode step attends: to the tokens so far, and to the image.

Every decoder family writes its step once, over `StepAttention`; what lies behind it differs:

- `GrowingCache` concatenates keys and values as they come, for the trainer's own decoding;
- `TreeCache` is what the exported graph does (see `exports/README.md`): the keys and values of all
  beams of an image are nodes of one tree, written once and never moved; a row sees the nodes that
  lead to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class StepAttention(Protocol):
    """What a decoder's step asks of its caches."""

    def text(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns (R, D): rows attend to their own tokens so far, the newest included.

        Args:
            layer: which decoder layer.
            query: (R, D), of the newest token.
            key: likewise.
            value: likewise.
        """

    def image(self, layer: int, query: Tensor) -> Tensor:
        """Returns (R, D): queries (R, D) attend to the image of their row."""


@dataclass(slots=True)
class GrowingCache:
    """Keys and values by concatenation; every row stands at the same position.

    Attributes:
        past: `[k0, v0, ...]`, each (R, H, T, D / H).
        memory: likewise, each (B, H, N, D / H); the R / B rows of an image stand together.
        present: what `past` becomes, each (R, H, T + 1, D / H); filled layer by layer.
    """

    past: Sequence[Tensor]
    memory: Sequence[Tensor]
    present: list[Tensor] = field(default_factory=list)

    def text(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `StepAttention`."""
        _, heads, _, head_dim = self.past[0].shape
        rows = (-1, heads, 1, head_dim)
        keys = torch.cat([self.past[2 * layer], key.view(rows)], dim=2)
        values = torch.cat([self.past[2 * layer + 1], value.view(rows)], dim=2)
        self.present += [keys, values]
        return _attend(query.view(rows), keys, values).reshape(query.shape)

    def image(self, layer: int, query: Tensor) -> Tensor:
        """See `StepAttention`. The rows of an image are queries against one copy of its keys."""
        keys, values = self.memory[2 * layer], self.memory[2 * layer + 1]
        images, heads, _, head_dim = keys.shape
        grid = query.reshape(images, -1, heads, head_dim).transpose(1, 2)
        return _attend(grid, keys, values).transpose(1, 2).reshape(query.shape)


@dataclass(slots=True)
class TreeCache:
    """The caches of the exported step, for tracing alone: its operators exist only in the graph.

    Rows (R, D) are what the dense layers see; attention sees a grid of slots by columns, (S, W, D),
    in which the rows of one image are queries against one set of keys. Writing is a scatter into
    the cache itself. `MultiHeadAttention` is ONNX Runtime's: it takes keys where they lie.

    Attributes:
        cache: `[k0, v0, ...]`, each (S, H, N, D / H).
        memory: likewise, each (S, H, M, D / H).
        write: (R, H, 3), slot, head and node of each row's new keys and values.
        row_cell: (R, 2), slot and column of each row.
        cell_row: (S, W), the row of each cell; any for a cell without one.
        visible: (S, 1, W, N), 0 for the nodes that a cell sees, -inf for the others.
        written: the caches afterwards; filled layer by layer.
    """

    cache: Sequence[Tensor]
    memory: Sequence[Tensor]
    write: Tensor
    row_cell: Tensor
    cell_row: Tensor
    visible: Tensor
    written: list[Tensor] = field(default_factory=list)

    def text(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `StepAttention`."""
        keys, values = (
            self._scatter(self.cache[2 * layer + part], new)
            for part, new in enumerate((key, value))
        )
        self.written += [keys, values]
        return self._attend(query, keys, values, self.visible)

    def image(self, layer: int, query: Tensor) -> Tensor:
        """See `StepAttention`."""
        return self._attend(query, self.memory[2 * layer], self.memory[2 * layer + 1], None)

    def _scatter(self, cache: Tensor, new: Tensor) -> Tensor:
        updates = new.reshape(-1, cache.shape[1], cache.shape[3])  # (R, H, D / H)
        return _onnx("ScatterND", [cache, self.write, updates], cache)

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None
    ) -> Tensor:
        width = query.shape[1]
        grid = query.new_empty(*self.cell_row.shape, width)
        grid = _onnx("Gather", [query, self.cell_row], grid, axis=0)
        inputs = [grid, keys, values, *((None, None, visible) if visible is not None else ())]
        mixed = _onnx("com.microsoft::MultiHeadAttention", inputs, grid, num_heads=keys.shape[1])
        return _onnx("GatherND", [mixed, self.row_cell], query)


def _onnx(
    operator: str, inputs: Sequence[Tensor | None], like: Tensor, **attributes: Any
) -> Tensor:
    """Returns an operator's only output, of the shape of `like`, as a node of the traced graph."""
    return torch.onnx.ops.symbolic(
        operator,
        inputs,
        attributes,
        dtype=like.dtype,
        shape=like.shape,
        version=1 if ":" in operator else None,
    )


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Returns (..., Q, D) for query (..., Q, D) over keys and values (..., T, D)."""
    weights = (query * query.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    return weights.softmax(-1) @ values
