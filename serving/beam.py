"""Beam search over images that come and go: token ids in, token ids out; numpy only.

The semantics are those of `generate` in transformers 5 with `early_stopping=False`, image by image:

1. Every live beam offers its continuations, scored by the sum of their log-probabilities. The end
   token is banned until `min_new_tokens` others are out, and so is every token that would repeat an
   n-gram of bos + prefix + generated tokens. A ban is a log-probability of -inf; nothing is
   renormalised.
2. The best 2K are looked at, by score, then token id, then beam.
3. Of the first K, those that end (all of them, at the last step) are finished hypotheses, scored
   `sum / n ** length_penalty` with n generated tokens, the end token included. The K best are kept.
4. The best K that do not end are the next beams.
5. An image is done when it has K hypotheses and its best beam, scored at its present length, beats
   none of them; or at the last step; or when no beam is left.

A prefix is forced, not scored and not counted. Sums and scores are float32. One departure: where
bans leave fewer beams, transformers fills them up with -1e9, which can surface as hypotheses that
break the bans; here there are fewer hypotheses.

Each image has a slot and a step count of its own, so it may join or leave between any two steps.
The tokens of its beams are nodes of a tree, each with keys and values in the model's cache; a beam
sees the nodes on its way from the root. Beams that part share what came before, nothing is ever
moved, and a node that no beam sees any more is used again. Whatever is computed for an image
depends on its own slot alone, never on who else is in the batch.
"""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

_DEAD = np.float32(-np.inf)
_NODES = 16  # the tree's room grows by so many nodes

# A candidate is one integer, so that sorting sorts by score, then token, then beam.
_BEAM_BITS, _TOKEN_BITS = 11, 21
MAX_BEAMS, MAX_VOCABULARY = 1 << _BEAM_BITS, 1 << _TOKEN_BITS


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


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished caption.

    `token_ids` are the prefix and the generated tokens, eos included if it came, bos not.
    `log_prob` is the sum over the `tokens` generated ones, `score` is `log_prob` after the length
    penalty.
    """

    token_ids: tuple[int, ...]
    score: float
    log_prob: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Done:
    """An image that has left its slot.

    `hypotheses` are best first, up to `num_captions`; fewer if the bans leave no more. `is_nan`
    tells that the model gave NaN, and then there are none.
    """

    slot: int
    hypotheses: list[Hypothesis]
    is_nan: bool = False


def beam_search(model: StepModel, params: Sequence[BeamParams]) -> list[list[Hypothesis]]:
    """Returns the hypotheses of each image, as `Done` says, where image i stands in slot i."""
    beams = Beams(model, slots=len(params))
    found: list[list[Hypothesis]] = [[] for _ in params]
    for entry in params:
        beams.join(entry)
    while beams.images:
        for done in beams.advance():
            found[done.slot] = done.hypotheses
    return found


class Beams:
    """The searches of all slots. Arrays have a row per slot; `_Group` is those that step now."""

    def __init__(self, model: StepModel, *, slots: int) -> None:
        """Starts with every slot free.

        Args:
            model: What continues rows.
            slots: How many images may be searched at once.

        Raises:
            ValueError: The vocabulary is larger than a candidate's bits hold.
        """
        if model.vocab_size > MAX_VOCABULARY:
            raise ValueError(f"a vocabulary of {model.vocab_size} exceeds {MAX_VOCABULARY}")
        self._model = model
        self._params: list[BeamParams | None] = [None] * slots
        self._finished: list[list[Hypothesis]] = [[] for _ in range(slots)]

        def whole() -> Ints:
            return np.zeros(slots, dtype=np.int64)

        self._beams, self._ngram, self._prefix = whole(), whole(), whole()
        # In tokens after bos: where eos may first come, where all must end, where the image is.
        self._first_end, self._last_end, self._length = whole(), whole(), whole()
        self._norm = np.ones((slots, model.max_length), dtype=np.float32)
        self._worst = np.full(slots, _DEAD)  # the K-th best hypothesis, once there are K
        self._count = whole()  # live beams; they stand in the first columns
        self._sums = np.full((slots, 2), _DEAD)
        self._history = np.zeros((slots, 2, model.max_length), dtype=np.int64)  # bos first
        self._visible = np.full((slots, 2, _NODES), _DEAD)
        self._node_position = np.zeros((slots, _NODES), dtype=np.int64)
        self._everyone = _Group(self, np.zeros(0, dtype=np.int64))

    @property
    def images(self) -> int:
        """Images that are searched."""
        return self._everyone.slots.size

    @property
    def rows(self) -> int:
        """Beams that the images in search may come to."""
        return int(self._everyone.beams.sum())

    @property
    def slots(self) -> list[int]:
        """The slots of the images that are searched, ascending."""
        found: list[int] = self._everyone.slots.tolist()
        return found

    def join(self, params: BeamParams) -> int:
        """Puts a new image to the first free slot and returns which.

        Raises:
            ValueError: No slot is free, the beam is too wide, or the prefix leaves no room for a
                token.
        """
        model, start = self._model, len(params.prefix_ids)
        last_end = min(start + params.max_new_tokens, model.max_length - 1)
        if last_end <= start:
            raise ValueError(f"a prefix fills all {model.max_length} positions")
        if params.num_beams > MAX_BEAMS:
            raise ValueError(f"{params.num_beams} beams exceed {MAX_BEAMS}")
        if self.images == len(self._params):
            raise ValueError("no slot is free")
        slot = self._params.index(None)
        self._params[slot] = params
        self._finished[slot] = []
        self._beams[slot], self._ngram[slot] = params.num_beams, params.no_repeat_ngram_size
        self._prefix[slot], self._last_end[slot] = start, last_end
        self._first_end[slot] = start + params.min_new_tokens + 1
        generated = np.maximum(np.arange(model.max_length) - start, 1).astype(np.float64)
        self._norm[slot] = generated**params.length_penalty
        self._worst[slot] = _DEAD
        self._length[slot], self._count[slot] = 0, 1
        if params.num_beams > self._sums.shape[1]:
            self._widen(params.num_beams - self._sums.shape[1])
        self._sums[slot] = _DEAD
        self._sums[slot, 0] = 0
        self._history[slot, 0, 0] = model.bos_id
        self._visible[slot] = _DEAD
        self._regroup()
        return slot

    def leave(self, slot: int) -> None:
        """Frees a slot, whatever became of its image."""
        self._params[slot] = None
        self._regroup()

    def advance(self, only: Sequence[int] | None = None) -> list[Done]:
        """Runs one step of every image, or of those in the slots `only`; returns who is done.

        If the model raises, nothing has changed and the same step can be tried again.
        """
        group = self._everyone if only is None else _Group(self, np.array(sorted(only)))
        scores, tokens, lost = self._candidates(group)
        lengths = self._length[group.slots] = self._length[group.slots] + 1
        scores, tokens, beams = _best(scores, tokens, 2 * group.widest)
        live = scores > _DEAD
        ends = tokens == self._model.eos_id
        going_on = live & ~ends  # K at least of 2K: each row has one eos
        norm = self._norm[group.slots, lengths]
        last = lengths == group.last_end
        finishing = live & group.is_top[:, : scores.shape[1]]
        finishing &= ends | last[:, None]
        if finishing.any():
            self._finish(group, finishing, scores, tokens, beams, norm)
        best = self._next_beams(group, going_on, scores, tokens, beams)
        over = (self._worst[group.slots] >= best / norm) | last
        return self._leave(group, over, lost) if over.any() else []

    def _regroup(self) -> None:
        slots = [slot for slot, params in enumerate(self._params) if params is not None]
        self._everyone = _Group(self, np.array(slots, dtype=np.int64))

    def _widen(self, columns: int) -> None:
        more = ((0, 0), (0, columns))
        self._sums = np.pad(self._sums, more, constant_values=_DEAD)
        self._history = np.pad(self._history, (*more, (0, 0)))
        self._visible = np.pad(self._visible, (*more, (0, 0)), constant_values=_DEAD)

    def _candidates(self, group: "_Group") -> tuple[Floats, Ints, Ints | None]:
        """Runs the model; returns scores and tokens, both (A, W, M), and who got NaN, places."""
        bans = self._repeats(group) if group.any_ngram else None
        # A banned eos takes no place of these: without it the best K are enough.
        top_k = 2 * group.widest + (bans.shape[2] if bans is not None else 0)
        place, column, log_probs, ids = self._step(group, min(top_k, self._model.vocab_size))
        count, width = group.slots.size, int(column.max()) + 1
        if place.size == count * width:
            shape = (count, width, -1)
            scores = log_probs.reshape(shape) + self._sums[group.slots, :width, None]
            tokens = ids.reshape(shape)
        else:
            scores = np.full((count, width, ids.shape[1]), _DEAD)
            tokens = np.zeros(scores.shape, dtype=np.int64)
            scores[place, column] = log_probs + self._sums[group.slots[place], column, None]
            tokens[place, column] = ids
        lost = None
        if isnan(scores.sum()):  # one look at all; -inf alone never sums up to NaN
            lost = np.flatnonzero(np.isnan(scores).any(axis=(1, 2)))
        lengths = self._length[group.slots]
        if (lengths + 1 < group.first_end).any():
            too_early = (lengths + 1 < group.first_end)[:, None, None]
            scores[too_early & (tokens == self._model.eos_id)] = _DEAD
        if bans is not None:
            scores[(tokens[:, :, :, None] == bans[:, :width, None, :]).any(axis=3)] = _DEAD
        if group.any_prefix and (lengths < group.prefix).any():
            tokens = tokens.copy()
            self._force_prefix(group, lengths, scores, tokens)
        if lost is not None:
            scores[lost] = _DEAD
        return scores, tokens, lost

    def _step(self, group: "_Group", top_k: int) -> tuple[Ints, Ints, Floats, Ints]:
        """Gives each row a node and runs the model; returns places and columns of the rows too."""
        slots = group.slots
        counts = self._count[slots]
        width = max(2, int(counts.max()))  # alone, a row would be multiplied by another kernel
        used = (self._visible[slots, :width] == 0).any(axis=1)  # (A, N)
        most = int((used.sum(axis=1) + counts).max())
        if most > used.shape[1]:
            self._add_nodes(most - used.shape[1])
            return self._step(group, top_k)
        free = used.argsort(axis=1, kind="stable")
        place, column = np.nonzero(np.arange(width) < counts[:, None])
        slot, node = slots[place], free[place, column]
        length = self._length[slot]
        self._visible[slot, column, node] = 0
        self._node_position[slot, node] = length
        until = int(slots[-1]) + 1
        rows = Rows(
            token_ids=self._history[slot, column, length],
            position=length,
            slot=slot,
            column=column,
            node=node,
            visible=self._visible[:until, :width],
            node_position=self._node_position[:until],
        )
        try:
            log_probs, ids = self._model.step(rows, top_k)
        except Exception:
            self._visible[slot, column, node] = _DEAD
            raise
        return place, column, log_probs, ids

    def _add_nodes(self, least: int) -> None:
        more = -(-least // _NODES) * _NODES
        self._visible = np.pad(self._visible, ((0, 0), (0, 0), (0, more)), constant_values=_DEAD)
        self._node_position = np.pad(self._node_position, ((0, 0), (0, more)))

    def _repeats(self, group: "_Group") -> Ints:
        """Returns the tokens that would repeat an n-gram, (A, W, most), filled up with -1."""
        lengths, width = self._length[group.slots], int(self._count[group.slots].max())
        bans = np.full((group.slots.size, width, int(lengths.max()) + 1), -1, dtype=np.int64)
        for place in np.flatnonzero(group.ngram):
            size, length = int(group.ngram[place]), int(lengths[place])
            if size > length + 1:
                continue
            history = self._history[group.slots[place], :width, : length + 1]
            grams = np.lib.stride_tricks.sliding_window_view(history, size, axis=1)
            begun = history[:, None, length + 2 - size :]  # the last size - 1 tokens
            repeats = (grams[..., :-1] == begun).all(axis=2)
            bans[place, :, : grams.shape[1]] = np.where(repeats, grams[..., -1], -1)
        return bans

    def _force_prefix(self, group: "_Group", lengths: Ints, scores: Floats, tokens: Ints) -> None:
        """Leaves one candidate to images in their prefix; scores and tokens are (A, W, M)."""
        for place in np.flatnonzero(lengths < group.prefix):
            params = self._params[group.slots[place]]
            assert params is not None
            scores[place] = _DEAD
            scores[place, 0, 0] = 0.0
            tokens[place, 0, 0] = params.prefix_ids[lengths[place]]

    def _finish(
        self,
        group: "_Group",
        finishing: Bools,
        scores: Floats,
        tokens: Ints,
        beams: Ints,
        norm: Floats,
    ) -> None:
        """Turns candidates (A, C) into hypotheses and keeps the K best of each image."""
        final = scores / norm[:, None]
        for place, rank in np.argwhere(finishing).tolist():
            slot = int(group.slots[place])
            score = float(final[place, rank])
            if score <= self._worst[slot]:
                continue
            length, width = int(self._length[slot]), int(self._beams[slot])
            past = self._history[slot, beams[place, rank], 1:length].tolist()
            hypothesis = Hypothesis(
                token_ids=(*past, int(tokens[place, rank])),
                score=score,
                log_prob=float(scores[place, rank]),
                tokens=length - int(self._prefix[slot]),
            )
            kept = self._finished[slot]
            insort(kept, hypothesis, key=lambda other: -other.score)  # after its equals
            if len(kept) >= width:
                del kept[width:]
                self._worst[slot] = kept[-1].score

    def _next_beams(
        self, group: "_Group", going_on: Bools, scores: Floats, tokens: Ints, beams: Ints
    ) -> Floats:
        """Makes the best K candidates (A, C) that go on the next beams; returns the best's sum."""
        slots = group.slots[:, None]
        kept = going_on & (going_on.cumsum(axis=1) <= group.beams[:, None])
        counts = self._count[group.slots] = kept.sum(axis=1)
        before, width = int(self._sums.shape[1]), max(int(counts.max()), 1)
        # Stable, so the kept ones come first, in their order; dead columns repeat other candidates.
        picked = (~kept).argsort(axis=1, kind="stable")[:, :width]
        picked += np.arange(0, kept.size, kept.shape[1])[:, None]
        columns = np.arange(width)
        alive = columns < counts[:, None]
        sums = np.where(alive, scores.take(picked), _DEAD)
        parents = beams.take(picked)
        visible = self._visible[slots, parents]
        if not alive.all():
            visible[~alive] = _DEAD
        self._visible[slots, columns] = visible
        self._sums[slots, columns] = sums
        if width < before:
            self._visible[group.slots, width:] = _DEAD
        self._history[slots, columns] = self._history[slots, parents]
        self._history[slots, columns, self._length[slots]] = tokens.take(picked)
        best: Floats = sums[:, 0]
        return best

    def _leave(self, group: "_Group", over: Bools, lost: Ints | None) -> list[Done]:
        """Frees the slots of images that are over and returns what was found of them."""
        nan = frozenset() if lost is None else frozenset(lost.tolist())
        gone = []
        for place in np.flatnonzero(over).tolist():
            slot = int(group.slots[place])
            params = self._params[slot]
            assert params is not None
            if place in nan:
                self._model.clear(slot)
                gone.append(Done(slot, [], is_nan=True))
            else:
                gone.append(Done(slot, self._finished[slot][: params.num_captions]))
            self._params[slot] = None
        self._regroup()
        return gone


class _Group:
    """Images that step together, and what every step asks of them that changes only with them."""

    def __init__(self, whole: Beams, slots: Ints) -> None:
        self.slots = slots  # (A,), ascending
        self.beams = whole._beams[slots]
        self.ngram, self.prefix = whole._ngram[slots], whole._prefix[slots]
        self.first_end, self.last_end = whole._first_end[slots], whole._last_end[slots]
        self.any_ngram, self.any_prefix = bool(self.ngram.any()), bool(self.prefix.any())
        self.widest = int(self.beams.max(initial=0))
        self.is_top = np.arange(2 * self.widest) < self.beams[:, None]  # (A, 2 * widest)


def _best(scores: Floats, tokens: Ints, most: int) -> tuple[Floats, Ints, Ints]:
    """Returns scores, tokens and beams of the best `most` of (A, W, M), each (A, C)."""
    count, width, _ = scores.shape
    # As integers, floats of one sign are in order already, or in reverse; -0 becomes 0 first.
    bits = (scores + np.float32(0)).view(np.int32)
    bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)
    keys = (~bits).astype(np.int64)  # best first
    keys <<= _TOKEN_BITS
    keys |= tokens
    keys <<= _BEAM_BITS
    keys |= np.arange(width)[:, None]
    keys = np.sort(keys.reshape(count, -1), axis=1)[:, :most]
    beams = keys & (MAX_BEAMS - 1)
    keys >>= _BEAM_BITS
    tokens = keys & (MAX_VOCABULARY - 1)
    bits = ~(keys >> _TOKEN_BITS).astype(np.int32)
    bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)
    return bits.view(np.float32), tokens, beams
