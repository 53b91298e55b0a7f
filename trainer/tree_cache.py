"""The caches of the exported decode step (see `exports/README.md`), as a decoder's attention.

Rows (R, D) are what the dense layers see; attention sees a grid of slots by columns, (S, W, D), in
which the rows of one image are queries against one set of keys. Keys and values of all beams of an
image are nodes of one tree, written once and never moved; a row sees the nodes that lead to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainer.attention import Memory, Relative


@dataclass(slots=True)
class TreeCache:
    """For tracing alone: its operators exist only in the graph.

    Writing is a scatter into the cache itself. `MultiHeadAttention` is ONNX Runtime's: it takes
    keys where they lie.

    Attributes:
        cache: `[k0, v0, ...]`, each (S, H, N, D / H).
        memory: of the images, one in each of S slots.
        position: (R,), of each row's newest token.
        write: (R, H, 3), slot, head and node of each row's new keys and values.
        row_cell: (R, 2), slot and column of each row.
        cell_row: (S, W), the row of each cell; any for a cell without one.
        visible: (S, 1, W, N), 0 for the nodes that a cell sees, -inf for the others.
        node_position: (S, N), of each node's token; for decoders that ask for distances.
        written: the caches afterwards; filled layer by layer.
    """

    cache: Sequence[Tensor]
    memory: Memory
    position: Tensor
    write: Tensor
    row_cell: Tensor
    cell_row: Tensor
    visible: Tensor
    node_position: Tensor | None = None
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
        """See `trainer.attention.Attention`."""
        keys, values = (
            self._scatter(self.cache[2 * layer + part], new)
            for part, new in enumerate((key, value))
        )
        self.written += [keys, values]
        visible = self.visible
        if relative is not None:
            visible = visible + relative(self._distances()).permute(0, 3, 1, 2)
        if self.memory.prefix:
            before = self.memory.prefix[2 * layer : 2 * layer + 2]
            keys, values = (
                torch.cat(pair, dim=2) for pair in zip(before, (keys, values), strict=True)
            )
            visible = self._behind_prefix(visible)
        return self._attend(query, keys, values, visible, scale)

    def image(self, layer: int, query: Tensor, *, scale: float | None = None) -> Tensor:
        """See `trainer.attention.Attention`."""
        keys, values = self.memory.image[2 * layer : 2 * layer + 2]
        return self._attend(query, keys, values, None, scale)

    def _distances(self) -> Tensor:
        """Returns (S, W, N), the position of every node minus that of every cell."""
        assert self.node_position is not None
        cells = self.position.new_empty(self.cell_row.shape)
        cells = _onnx("Gather", [self.position, self.cell_row], cells, axis=0)
        return self.node_position.unsqueeze(1) - cells.unsqueeze(2)

    def _behind_prefix(self, visible: Tensor) -> Tensor:
        """Returns (S, 1, W, P + N)."""
        shown = self.memory.prefix_visible
        if shown is None:
            return torch.nn.functional.pad(visible, (self.memory.prefix[0].shape[2], 0))
        return torch.cat([shown.expand(-1, -1, visible.shape[2], -1), visible], dim=3)

    def _scatter(self, cache: Tensor, new: Tensor) -> Tensor:
        updates = new.reshape(-1, cache.shape[1], cache.shape[3])  # (R, H, D / H)
        return _onnx("ScatterND", [cache, self.write, updates], cache)

    def _attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        visible: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        heads, head_dim = keys.shape[1], keys.shape[3]
        shared = query.shape[1] // (heads * head_dim)  # query heads for each head of the keys
        grid = query.new_empty(*self.cell_row.shape, query.shape[1])
        grid = _onnx("Gather", [query, self.cell_row], grid, axis=0)
        slots, columns = grid.shape[:2]
        if shared > 1:  # heads that share keys are as good as more columns
            grid = grid.unflatten(2, (heads, shared, head_dim)).transpose(2, 3)
            grid = grid.reshape(slots, columns * shared, heads * head_dim)
            if visible is not None:
                visible = visible.unsqueeze(3).expand(-1, -1, -1, shared, -1).flatten(2, 3)
        inputs = [grid, keys, values, *((None, None, visible) if visible is not None else ())]
        attributes: dict[str, Any] = {"num_heads": heads}
        if scale is not None:
            attributes["scale"] = scale
        mixed = _onnx("com.microsoft::MultiHeadAttention", inputs, grid, **attributes)
        if shared > 1:
            mixed = mixed.reshape(slots, columns, shared, heads, head_dim).transpose(2, 3)
            mixed = mixed.reshape(slots, columns, query.shape[1])
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
