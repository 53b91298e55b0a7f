"""Beam search over many images at once: token ids in, token ids out; numpy only.

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


class StepModel(Protocol):
    """A decoder in the middle of a batch. Its caches live in it, one set per row."""

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

    def step(
        self, token_ids: Ints, beam_index: Ints, top_k: int, images: Ints | None
    ) -> tuple[Floats, Ints]:
        """Feeds one token to each row and returns its best continuations.

        The rows of an image stand together and each image has equally many; at first it has one.

        Args:
            token_ids: (R,)
            beam_index: (R,), the row of the previous step that each row continues.
            top_k: Continuations wanted of each row.
            images: (B,), which of the previous step's images stay, in their new order; None: all.

        Returns:
            log_probs (R, M) and ids (R, M), M = min(top_k, V), best first.
        """


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


def beam_search(model: StepModel, params: Sequence[BeamParams]) -> list[list[Hypothesis]]:
    """Returns up to `num_captions` hypotheses of each image, best first.

    An image gets fewer if its bans leave no more, and none if its log-probabilities are NaN; its
    neighbours do not notice.

    Args:
        model: A decoder that has just been started on `len(params)` images.
        params: One entry per image.

    Raises:
        ValueError: A prefix leaves no room for a token.
    """
    search = _Search(model, params)
    while search.images.size:
        search.advance()
    return [
        hypotheses[: entry.num_captions]
        for hypotheses, entry in zip(search.finished, params, strict=True)
    ]


class _Search:
    """One batch in progress.

    Arrays have one entry per image that is still searched, and W rows per image: the most live
    beams that any of them has. Dead rows carry a score of -inf.
    """

    def __init__(self, model: StepModel, params: Sequence[BeamParams]) -> None:
        self.model = model
        self.params = params
        self.finished: list[list[Hypothesis]] = [[] for _ in params]

        count = len(params)
        self.images = np.arange(count)  # places in `params`
        self.beams = np.array([p.num_beams for p in params], dtype=np.int64)
        self.ngram = np.array([p.no_repeat_ngram_size for p in params], dtype=np.int64)
        # In tokens after bos: where the prefix ends, where eos may first come, where all must end.
        self.prefix = np.array([len(p.prefix_ids) for p in params], dtype=np.int64)
        self.first_end = self.prefix + [p.min_new_tokens + 1 for p in params]
        self.last_end = self.prefix + [p.max_new_tokens for p in params]
        np.minimum(self.last_end, model.max_length - 1, out=self.last_end)
        if (self.last_end <= self.prefix).any():
            raise ValueError(f"a prefix fills all {model.max_length} positions")
        generated = np.maximum(np.arange(model.max_length) - self.prefix[:, None], 1)
        penalty = np.array([[p.length_penalty] for p in params], dtype=np.float64)
        self.norm = (generated**penalty).astype(np.float32)  # (B, tokens after bos)
        self.worst = np.full(count, _DEAD)  # the K-th best hypothesis, once there are K

        self.length = 0  # tokens after bos
        self.sums = np.zeros((count, 1), dtype=np.float32)  # (B, W)
        self.history = np.full((count, 1, 1), model.bos_id, dtype=np.int64)  # (B, W, length + 1)
        self.beam_index = np.arange(count)
        self.staying: Ints | None = None  # for the model's next step
        if count:
            self._summarise()

    def _summarise(self) -> None:
        """Works out what every step asks about the arrays that change only when images leave."""
        self.widest = int(self.beams.max())
        self.any_ngram = bool(self.ngram.any())
        self.longest_prefix = int(self.prefix.max())
        self.last_first_end = int(self.first_end.max())
        self.nearest_last_end = int(self.last_end.min())
        self.is_top = np.arange(2 * self.widest) < self.beams[:, None]  # (B, 2 * widest)
        self.places = np.arange(self.images.size)[:, None]  # (B, 1)

    def advance(self) -> None:
        """Runs one step of every image that is still searched."""
        scores, tokens, rows = self._best(*self._candidates())
        self.length += 1
        live = scores > _DEAD
        ends = tokens == self.model.eos_id
        going_on = live & ~ends  # K at least of 2K: each row has one eos
        norm = self.norm[:, self.length]

        at_last = self.length >= self.nearest_last_end
        last = self.last_end == self.length
        if at_last:
            ends |= last[:, None]
        finishing = self.is_top[:, : scores.shape[1]] & live & ends
        if finishing.any():
            self._finish(finishing, scores, tokens, rows, norm)

        self._next_beams(going_on, scores, tokens, rows)
        done = self.worst >= self.sums[:, 0] / norm
        if at_last:
            done |= last
        if done.any():
            self._leave(done)

    def _candidates(self) -> tuple[Floats, Ints]:
        """Runs the model; returns scores and tokens of the continuations, both (B, W, M)."""
        bans = self._repeats() if self.any_ngram else None
        # A banned eos takes no place of these: without it the best K are enough.
        top_k = 2 * self.widest
        if bans is not None:
            top_k += int((bans >= 0).sum(axis=2).max())
        log_probs, ids = self.model.step(
            self.history[:, :, -1].ravel(),
            self.beam_index,
            min(top_k, self.model.vocab_size),
            self.staying,
        )
        self.staying = None
        shape = (*self.sums.shape, -1)
        tokens = ids.reshape(shape)
        scores = log_probs.reshape(shape) + self.sums[:, :, None]

        if isnan(scores.sum()):  # one look at all; -inf alone never sums up to NaN
            self._give_up(scores)
        if self.length + 1 < self.last_first_end:
            too_early = (self.length + 1 < self.first_end)[:, None, None]
            scores[too_early & (tokens == self.model.eos_id)] = _DEAD
        if bans is not None:
            scores[(tokens[:, :, :, None] == bans[:, :, None, :]).any(axis=3)] = _DEAD
        if self.length < self.longest_prefix:
            tokens = tokens.copy()
            self._force_prefix(scores, tokens)
        return scores, tokens

    def _repeats(self) -> Ints:
        """Returns the tokens that would repeat an n-gram, (B, W, length + 1), filled up with -1."""
        bans = np.full(self.history.shape, -1, dtype=np.int64)
        for size in np.unique(self.ngram):
            if not 0 < size <= self.length + 1:
                continue
            which = self.ngram == size
            history = self.history[which]
            grams = np.lib.stride_tricks.sliding_window_view(history, size, axis=2)
            begun = history[:, :, None, self.length + 2 - size :]  # the last size - 1 tokens
            repeats = (grams[..., :-1] == begun).all(axis=3)
            bans[which, :, : grams.shape[2]] = np.where(repeats, grams[..., -1], -1)
        return bans

    def _give_up(self, scores: Floats) -> None:
        """Kills every beam, in `scores` (B, W, M), and every hypothesis of images with a NaN."""
        lost = np.isnan(scores).any(axis=(1, 2))
        scores[lost] = _DEAD
        for image in self.images[lost]:
            self.finished[image].clear()

    def _force_prefix(self, scores: Floats, tokens: Ints) -> None:
        """Leaves one candidate to images in their prefix; scores and tokens are (B, W, M)."""
        for place in np.flatnonzero(self.length < self.prefix):
            scores[place] = _DEAD
            scores[place, 0, 0] = 0.0
            tokens[place, 0, 0] = self.params[self.images[place]].prefix_ids[self.length]

    def _best(self, scores: Floats, tokens: Ints) -> tuple[Floats, Ints, Ints]:
        """Returns scores, tokens and beams of the best C = 2K (or all there are), each (B, C)."""
        count, width, choices = scores.shape
        beams = np.empty(scores.shape, dtype=np.int64)
        beams[:] = np.arange(width)[:, None]
        flat = (count, width * choices)
        order = np.lexsort((beams.reshape(flat), tokens.reshape(flat), -scores.reshape(flat)))
        order = order[:, : 2 * self.widest]
        picked = order + self.places * flat[1]
        return scores.take(picked), tokens.take(picked), beams.take(picked)

    def _finish(
        self, finishing: Bools, scores: Floats, tokens: Ints, rows: Ints, norm: Floats
    ) -> None:
        """Turns candidates (B, C) into hypotheses and keeps the K best of each image."""
        final = scores / norm[:, None]
        for place, rank in np.argwhere(finishing).tolist():
            score = float(final[place, rank])
            if score <= self.worst[place]:
                continue
            past = self.history[place, rows[place, rank], 1:].tolist()
            hypothesis = Hypothesis(
                token_ids=(*past, int(tokens[place, rank])),
                score=score,
                log_prob=float(scores[place, rank]),
                tokens=self.length - int(self.prefix[place]),
            )
            kept = self.finished[self.images[place]]
            insort(kept, hypothesis, key=lambda other: -other.score)  # after its equals
            if len(kept) >= self.beams[place]:
                del kept[self.beams[place] :]
                self.worst[place] = kept[-1].score

    def _next_beams(self, going_on: Bools, scores: Floats, tokens: Ints, rows: Ints) -> None:
        """Makes the best K of the candidates (B, C) that go on the rows of the next step."""
        count, width = self.sums.shape
        kept = going_on & (going_on.cumsum(axis=1) <= self.beams[:, None])
        new_width = max(int(kept.sum(axis=1).max()), 1)
        # Stable, so the kept ones come first, in their order; dead rows repeat other candidates.
        picked = (~kept).argsort(axis=1, kind="stable")[:, :new_width] + self.places * kept.shape[1]
        self.sums = np.where(kept.take(picked), scores.take(picked), _DEAD)
        parents = rows.take(picked) + self.places * width
        past = self.history.reshape(count * width, -1)[parents]
        self.history = np.concatenate((past, tokens.take(picked)[:, :, None]), axis=2)
        self.beam_index = parents.ravel()

    def _leave(self, done: Bools) -> None:
        """Drops images. The others keep their places; free places are filled from the end."""
        count = done.size
        left = count - int(done.sum())
        stay = np.arange(left)
        stay[done[:left]] = left + np.flatnonzero(~done[left:])
        self.staying = stay
        self.images, self.beams, self.ngram = self.images[stay], self.beams[stay], self.ngram[stay]
        self.prefix, self.first_end = self.prefix[stay], self.first_end[stay]
        self.last_end, self.norm = self.last_end[stay], self.norm[stay]
        self.worst, sums = self.worst[stay], self.sums[stay]
        width = int((sums > _DEAD).sum(axis=1).max()) if left else 0
        self.sums, self.history = sums[:, :width], self.history[stay, :width]
        self.beam_index = self.beam_index.reshape(count, -1)[stay, :width].ravel()
        if left:
            self._summarise()
