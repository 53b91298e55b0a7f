"""The tokens of all beams, as a tree in each slot; their keys and values lie in the model."""

import numpy as np

from serving.step_model import Bools, Floats, Ints

_HIDDEN = np.float32(-np.inf)
_NODES = 16  # the room grows by so many


class Tree:
    """Which nodes there are, and which of them each beam sees: those on its way from the root.

    A node that no beam sees is free. Which one a beam takes depends on its own slot alone.

    Attributes:
        visible: (slots, W, N), 0 or -inf; all -inf in columns without a beam.
        position: (slots, N), of each node's token.
    """

    def __init__(self, slots: int) -> None:
        self.visible: Floats = np.full((slots, 2, _NODES), _HIDDEN)
        self.position: Ints = np.zeros((slots, _NODES), dtype=np.int64)
        self._token: Ints = np.zeros((slots, _NODES), dtype=np.int64)

    def begin(self, slot: int, columns: int) -> None:
        """Empties a slot, and makes room for so many beams in all."""
        more = columns - self.visible.shape[1]
        if more > 0:
            room = ((0, 0), (0, more), (0, 0))
            self.visible = np.pad(self.visible, room, constant_values=_HIDDEN)
        self.visible[slot] = _HIDDEN

    def add(
        self, slots: Ints, place: Ints, column: Ints, position: Ints, token: Ints, width: int
    ) -> Ints:
        """Gives each row's token a node that its beam sees, and returns which (R,).

        Args:
            slots: (A,)
            place: (R,), of the row's slot in `slots`.
            column: (R,), ascending from 0 in each slot.
            position: (R,)
            token: (R,)
            width: Columns that have beams.
        """
        used = (self.visible[slots, :width] == 0).any(axis=1)  # (A, N)
        most = used.sum(axis=1) + np.bincount(place, minlength=slots.size)
        if most.max() > used.shape[1]:
            self._grow(int(most.max()) - used.shape[1])
            return self.add(slots, place, column, position, token, width)
        node: Ints = used.argsort(axis=1, kind="stable")[place, column]  # the free ones come first
        slot = slots[place]
        self.visible[slot, column, node] = 0
        self.position[slot, node] = position
        self._token[slot, node] = token
        return node

    def remove(self, slot: Ints, column: Ints, node: Ints) -> None:
        """Takes back what `add` gave to rows, (R,) each."""
        self.visible[slot, column, node] = _HIDDEN

    def follow(self, slots: Ints, parents: Ints, alive: Bools | None) -> None:
        """Lets the beams of slots (A,) see what their parents (A, W) saw; None: all are alive."""
        width = parents.shape[1]
        visible = self.visible[slots[:, None], parents]
        if alive is not None:
            visible[~alive] = _HIDDEN
        self.visible[slots, :width] = visible
        if width < self.visible.shape[1]:
            self.visible[slots, width:] = _HIDDEN

    def history(self, slot: int, column: int) -> list[int]:
        """Returns the tokens of a beam, from the root."""
        nodes = np.flatnonzero(self.visible[slot, column] == 0)
        nodes = nodes[self.position[slot, nodes].argsort()]
        found: list[int] = self._token[slot, nodes].tolist()
        return found

    def _grow(self, least: int) -> None:
        more = ((0, 0), (0, -(-least // _NODES) * _NODES))
        self.visible = np.pad(self.visible, (more[0], *more), constant_values=_HIDDEN)
        self.position, self._token = np.pad(self.position, more), np.pad(self._token, more)
