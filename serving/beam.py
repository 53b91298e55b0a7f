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

import numpy as np

from serving.candidates import COLUMNS, MAX_BEAMS, MAX_VOCABULARY, best_candidates
from serving.group import BeamParams, Group, Layout
from serving.step_model import Bools, Floats, Ints, Rows, StepModel
from serving.tree import Tree

_DEAD = np.float32(-np.inf)


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
    """The searches of all slots. Arrays have a row per slot; `Group` is those that step now."""

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

        def whole(columns: int = 0) -> Ints:
            return np.zeros((slots, columns) if columns else slots, dtype=np.int64)

        self._length = whole()  # tokens after bos, so far
        self._norm = np.ones((slots, model.max_length), dtype=np.float32)
        self._worst = np.full(slots, _DEAD)  # the K-th best hypothesis, once there are K
        # Live beams, in the first columns: how many, their sums and their newest tokens.
        self._count = whole()
        self._sums = np.full((slots, 2), _DEAD)
        self._newest = whole(2)
        self._tree = Tree(slots)
        self._regroup()

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
        if start + 1 >= model.max_length:
            raise ValueError(f"a prefix fills all {model.max_length} positions")
        if params.num_beams > MAX_BEAMS:
            raise ValueError(f"{params.num_beams} beams exceed {MAX_BEAMS}")
        if self.images == len(self._params):
            raise ValueError("no slot is free")
        slot = self._params.index(None)
        self._params[slot] = params
        self._finished[slot] = []
        generated = np.maximum(np.arange(model.max_length) - start, 1).astype(np.float64)
        self._norm[slot] = generated**params.length_penalty
        self._worst[slot] = _DEAD
        self._length[slot], self._count[slot] = 0, 1
        self._tree.begin(slot, params.num_beams)
        if (more := params.num_beams - self._sums.shape[1]) > 0:
            self._sums = np.pad(self._sums, ((0, 0), (0, more)))
            self._newest = np.pad(self._newest, ((0, 0), (0, more)))
        self._sums[slot, 0] = 0
        self._newest[slot, 0] = model.bos_id
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
        group = self._everyone if only is None else self._group(np.array(sorted(only)))
        scores, tokens, lost = self._candidates(group)
        lengths = self._length[group.slots] = self._length[group.slots] + 1
        scores, tokens, beams = best_candidates(scores, tokens, 2 * group.widest)
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

    def _group(self, slots: Ints) -> Group:
        params = [one for one in map(self._params.__getitem__, slots.tolist()) if one is not None]
        return Group(slots, params, self._model.max_length)

    def _regroup(self) -> None:
        slots = [slot for slot, params in enumerate(self._params) if params is not None]
        self._everyone = self._group(np.array(slots, dtype=np.int64))

    def _candidates(self, group: Group) -> tuple[Floats, Ints, Ints | None]:
        """Runs the model; returns scores and tokens, both (A, W, M), and who got NaN, places."""
        lengths = self._length[group.slots]
        layout = self._layout(group)
        # A banned eos takes no place of these: without it the best K are enough.
        top_k = 2 * group.widest + (int(lengths.max()) + 2 if group.any_ngram else 0)
        log_probs, ids = self._step(layout, min(top_k, self._model.vocab_size))
        bans = self._repeats(group, layout.width, lengths) if group.any_ngram else None
        if layout.is_full:
            shape = (group.slots.size, layout.width, -1)
            scores = log_probs.reshape(shape) + self._sums[group.slots, : layout.width, None]
            tokens = ids.reshape(shape)
        else:
            scores = np.full((group.slots.size, layout.width, ids.shape[1]), _DEAD)
            tokens = np.zeros(scores.shape, dtype=np.int64)
            place, column = layout.place, layout.column
            scores[place, column] = log_probs + self._sums[layout.slot, column, None]
            tokens[place, column] = ids
        lost = None
        if isnan(scores.sum()):  # one look at all; -inf alone never sums up to NaN
            lost = np.flatnonzero(np.isnan(scores).any(axis=(1, 2)))
        if group.steps_to_first_end > 0:
            group.steps_to_first_end -= 1
            too_early = (lengths + 1 < group.first_end)[:, None, None]
            scores[too_early & (tokens == self._model.eos_id)] = _DEAD
        if bans is not None:
            scores[(tokens[:, :, :, None] == bans[:, :, None, :]).any(axis=3)] = _DEAD
        if group.any_prefix and (lengths < group.prefix).any():
            tokens = tokens.copy()
            self._force_prefix(group, lengths, scores, tokens)
        if lost is not None:
            scores[lost] = _DEAD
        return scores, tokens, lost

    def _layout(self, group: Group) -> Layout:
        counts: list[int] = self._count[group.slots].tolist()
        if group.layout is None or group.layout.counts != counts:
            group.layout = Layout(group.slots, counts)
        return group.layout

    def _step(self, layout: Layout, top_k: int) -> tuple[Floats, Ints]:
        """Gives each row a node and runs the model."""
        tree, slot, column = self._tree, layout.slot, layout.column
        length, newest = self._length[slot], self._newest[slot, column]
        node = tree.add(layout.slots, layout.place, column, length, newest, layout.width)
        rows = Rows(
            token_ids=newest,
            position=length,
            slot=slot,
            column=column,
            node=node,
            visible=tree.visible[: layout.until, : layout.width],
            node_position=tree.position[: layout.until],
        )
        try:
            return self._model.step(rows, top_k)
        except Exception:
            tree.remove(slot, column, node)
            raise

    def _repeats(self, group: Group, width: int, lengths: Ints) -> Ints:
        """Returns the tokens that would repeat an n-gram, (A, W, most), filled up with -1."""
        bans = np.full((group.slots.size, width, int(lengths.max()) + 2), -1, dtype=np.int64)
        for place in np.flatnonzero(group.ngram).tolist():
            size, slot = int(group.ngram[place]), int(group.slots[place])
            for column in range(int(self._count[slot])):
                history = self._tree.history(slot, column)
                begun = history[len(history) + 1 - size :] if size > 1 else []
                for start in range(len(history) + 1 - size):
                    if history[start : start + size - 1] == begun:
                        bans[place, column, start] = history[start + size - 1]
        return bans

    def _force_prefix(self, group: Group, lengths: Ints, scores: Floats, tokens: Ints) -> None:
        """Leaves one candidate to images in their prefix; scores and tokens are (A, W, M)."""
        for place in np.flatnonzero(lengths < group.prefix):
            scores[place] = _DEAD
            scores[place, 0, 0] = 0.0
            tokens[place, 0, 0] = group.params[place].prefix_ids[lengths[place]]

    def _finish(
        self,
        group: Group,
        finishing: Bools,
        scores: Floats,
        tokens: Ints,
        beams: Ints,
        norm: Floats,
    ) -> None:
        """Turns candidates (A, C) into hypotheses and keeps the K best of each image."""
        final = scores / norm[:, None]
        for place, rank in np.argwhere(finishing).tolist():
            slot, params = int(group.slots[place]), group.params[place]
            score = float(final[place, rank])
            if score <= self._worst[slot]:
                continue
            _, *past = self._tree.history(slot, int(beams[place, rank]))
            hypothesis = Hypothesis(
                token_ids=(*past, int(tokens[place, rank])),
                score=score,
                log_prob=float(scores[place, rank]),
                tokens=int(self._length[slot]) - len(params.prefix_ids),
            )
            kept = self._finished[slot]
            insort(kept, hypothesis, key=lambda other: -other.score)  # after its equals
            if len(kept) >= params.num_beams:
                del kept[params.num_beams :]
                self._worst[slot] = kept[-1].score

    def _next_beams(
        self, group: Group, going_on: Bools, scores: Floats, tokens: Ints, beams: Ints
    ) -> Floats:
        """Makes the best K candidates (A, C) that go on the next beams; returns the best's sum."""
        counts = np.minimum(going_on.sum(axis=1), group.beams)
        self._count[group.slots] = counts
        width = max(int(counts.max()), 1)
        # Stable, so those come first that go on, in their order; in dead columns are others.
        picked = (~going_on).argsort(axis=1, kind="stable")[:, :width]
        picked += group.offsets(going_on.shape[1])
        slots, columns = group.slots[:, None], COLUMNS[:width]
        sums = scores.take(picked)
        alive = columns < counts[:, None]
        dead_too = not alive.all()
        if dead_too:
            sums[~alive] = _DEAD
        self._tree.follow(group.slots, beams.take(picked), alive if dead_too else None)
        self._sums[slots, columns] = sums
        self._newest[slots, columns] = tokens.take(picked)
        best: Floats = sums[:, 0]
        return best

    def _leave(self, group: Group, over: Bools, lost: Ints | None) -> list[Done]:
        """Frees the slots of images that are over and returns what was found of them."""
        nan = frozenset() if lost is None else frozenset(lost.tolist())
        gone = []
        for place in np.flatnonzero(over).tolist():
            slot, params = int(group.slots[place]), group.params[place]
            if place in nan:
                self._model.clear(slot)
                gone.append(Done(slot, [], is_nan=True))
            else:
                gone.append(Done(slot, self._finished[slot][: params.num_captions]))
            self._params[slot] = None
        self._regroup()
        return gone
