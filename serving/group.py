"""Images whose beams step together: what is asked of them, and how their beams are rows."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from serving.candidates import COLUMNS
from serving.step_model import Ints


@dataclass(frozen=True, slots=True)
class BeamParams:
    """How one image is searched; the names and meanings are those of transformers.

    `prefix_ids` hold neither bos nor eos.
    """

    num_beams: int
    num_captions: int
    max_new_tokens: int
    min_new_tokens: int
    length_penalty: float
    no_repeat_ngram_size: int
    prefix_ids: tuple[int, ...] = ()


class Group:
    """Images that step together, and what every step asks of them that changes only with them."""

    def __init__(self, slots: Ints, params: list[BeamParams], max_length: int) -> None:
        self.slots, self.params = slots, params  # (A,), ascending

        def each(value: Callable[[BeamParams], int]) -> Ints:
            return np.array([value(one) for one in params], dtype=np.int64)

        self.beams, self.ngram = each(lambda p: p.num_beams), each(lambda p: p.no_repeat_ngram_size)
        self.prefix = each(lambda p: len(p.prefix_ids))
        # In tokens after bos: where eos may first come, where all must end.
        self.first_end = self.prefix + each(lambda p: p.min_new_tokens) + 1
        last_end = self.prefix + each(lambda p: p.max_new_tokens)
        self.last_end = np.minimum(last_end, max_length - 1)
        self.any_ngram, self.any_prefix = bool(self.ngram.any()), bool(self.prefix.any())
        self.widest = int(self.beams.max(initial=0))
        self.is_top = COLUMNS[: 2 * self.widest] < self.beams[:, None]  # (A, 2 * widest)
        self.steps_to_first_end = int(self.first_end.max(initial=0))  # at most
        self.layout: Layout | None = None
        self._offsets: dict[int, Ints] = {}

    def offsets(self, columns: int) -> Ints:
        """Returns where each image's part of a flattened (A, columns) begins, (A, 1)."""
        if columns not in self._offsets:
            self._offsets[columns] = np.arange(0, self.slots.size * columns, columns)[:, None]
        return self._offsets[columns]


class Layout:
    """How the live beams of a group are rows; the same, and the same object, for many steps."""

    def __init__(self, slots: Ints, counts: list[int]) -> None:
        self.slots, self.counts = slots, counts
        self.width = max(2, *counts)  # alone, a row would be multiplied by another kernel
        self.until = int(slots[-1]) + 1
        live = COLUMNS[: self.width] < np.array(counts)[:, None]
        self.place, self.column = np.nonzero(live)  # (R,) each
        self.slot = slots[self.place]
        self.is_full = bool(live.all())
