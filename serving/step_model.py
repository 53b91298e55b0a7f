"""What a beam search asks of a decoder: rows in, their best continuations out."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Rows:
    """What one step feeds: R rows, in a grid of S slots by W columns over N nodes a slot.

    Attributes:
        token_ids: (R,), the newest token of each row.
        position: (R,), how many tokens stand before it.
        slot: (R,), whose image the row belongs to; ascending.
        column: (R,), its place among the rows of its image.
        node: (R,), where its keys and values go.
        visible: (S, W, N), 0 for the nodes that a cell sees, its own included, -inf for others.
        node_position: (S, N), the position of the token of each node.
    """

    token_ids: Ints
    position: Ints
    slot: Ints
    column: Ints
    node: Ints
    visible: Floats
    node_position: Ints


class StepModel(Protocol):
    """A decoder whose caches hold, for each slot, an image and the nodes written so far."""

    @property
    def bos_id(self) -> int:
        """The token that every row begins with."""

    @property
    def eos_id(self) -> int:
        """The token that ends a caption."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def max_length(self) -> int:
        """The longest sequence, bos and eos included."""

    def step(self, rows: Rows, top_k: int) -> tuple[Floats, Ints]:
        """Returns the best continuations of each row, log_probs (R, M) and ids (R, M).

        M = min(top_k, V), best first, equals by id. What stands in `rows` is valid during the call
        alone.
        """

    def clear(self, slot: int) -> None:
        """Forgets the numbers of a slot: one of them was NaN, and NaN times zero is NaN."""
