"""A shadow: a candidate that is asked what a share of the live requests asked, and compared.

It works in the gaps: its thread runs one graph at a time, and none while a live request is being
captioned. So a live request waits for one run of a graph at most, and a busy server drops shadow
requests before anything else. One is asked and one waits at a time, with the bytes of one image
each; the candidate is the second of the two bundles that may be in memory.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from statistics import median

from exports.shadow_plan import ShadowPlan
from serving.captioner import Captioner
from serving.decode_image import ImageLimits, decode_image
from serving.params import Caption, Params, Result
from serving.schema import ShadowAnswer
from serving.shadow_metrics import ShadowMetrics

logger = logging.getLogger(__name__)

_PATIENCE_S = 30.0  # how long a shadow request waits for its gaps, all together
_TIMES_KEPT = 1000
_TIMES_NEEDED = 20  # of each side, before a slowdown is believed

Choose = Callable[[Captioner], Params]


@dataclass(slots=True)
class Turn:
    """A live request: whether it had the server to itself, and how long it took."""

    alone: bool
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the thresholds say of a candidate."""

    promote: bool
    words: str


@dataclass(frozen=True, slots=True)
class _Sample:
    image: bytes
    choose: Choose
    caption: Caption


@dataclass(slots=True)
class _Tally:
    """What was found of one candidate."""

    requests: int = 0
    agreed: int = 0
    failed: int = 0
    dropped: int = 0
    overlaps: float = 0.0
    scores: float = 0.0
    live_scores: float = 0.0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMES_KEPT))
    live_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMES_KEPT))

    @property
    def answered(self) -> int:
        return self.requests - self.failed

    @property
    def overlap(self) -> float:
        return self.overlaps / self.requests

    @property
    def score_difference(self) -> float:
        return (self.scores - self.live_scores) / self.answered

    def slowdown(self, plan: ShadowPlan) -> float | None:
        """Returns the ratio of the medians, once there is enough of both."""
        needed = min(_TIMES_NEEDED, plan.min_requests)
        if min(len(self.seconds), len(self.live_seconds)) < needed:
            return None
        return median(self.seconds) / median(self.live_seconds)


class _DroppedError(Exception):
    """Live requests left no gap, or the candidate went."""


class Shadow:
    """Compares a candidate with what serves. `begin` and `end` are for one thread, the rest any."""

    def __init__(self, metrics: ShadowMetrics, limits: ImageLimits, *, seed: int = 0) -> None:
        """Starts without a candidate; `seed` chooses which requests are taken."""
        self._metrics = metrics
        self._limits = limits
        self._random = Random(seed)
        self._changed = threading.Condition()  # guards the below
        self._live = 0
        self._entered = 0
        self._running = False  # a graph of the candidate
        self._plan: ShadowPlan | None = None
        self._captioner: Captioner | None = None
        self._tally = _Tally()
        self._waiting: _Sample | None = None
        self._thread: threading.Thread | None = None

    # Live requests.

    @contextmanager
    def live(self) -> Iterator[Turn]:
        """Keeps the candidate still while a live request is captioned."""
        with self._changed:
            self._live += 1
            self._entered += 1
            entered, turn = self._entered, Turn(self._live == 1 and not self._running)
        began = time.perf_counter()
        try:
            yield turn
        finally:
            turn.seconds = time.perf_counter() - began
            with self._changed:
                self._live -= 1
                turn.alone = turn.alone and entered == self._entered
                if not self._live:
                    self._changed.notify_all()

    def offer(
        self,
        images: Sequence[bytes],
        choose: Choose,
        captions: Sequence[Caption],
        turn: Turn,
    ) -> None:
        """May take an answered request for the candidate; returns at once.

        Args:
            images: The files of the request; the first is taken.
            choose: Returns how a captioner, which has defaults of its own, is asked for the same.
            captions: What the first was answered.
            turn: Of the request.
        """
        with self._changed:
            plan = self._plan
            if plan is None or self._captioner is None:
                return
            if turn.alone and len(images) == 1:
                self._tally.live_seconds.append(turn.seconds)
                self._metrics.live_alone(turn.seconds)
            if self._random.random() >= plan.share:
                return
            if self._waiting is not None:
                self._drop()
                return
            self._waiting = _Sample(images[0], choose, captions[0])
            self._changed.notify_all()

    # The one who swaps.

    @property
    def plan(self) -> ShadowPlan | None:
        """Returns what is followed now."""
        return self._plan

    @property
    def version(self) -> str | None:
        """Returns the version of the candidate that is asked; None if none is."""
        with self._changed:
            return None if self._captioner is None else self._captioner.version

    def begin(self, plan: ShadowPlan, captioner: Captioner) -> None:
        """Asks a candidate from now on. What was found of the same one before still counts."""
        with self._changed:
            self._follow(plan)
            self._captioner = captioner
            self._thread = threading.Thread(target=self._work, name="cutline-shadow", daemon=True)
        self._metrics.loaded(True)
        self._thread.start()

    def end(self) -> Captioner | None:
        """Lets go of the candidate and returns it, once nothing runs it any more."""
        with self._changed:
            captioner, self._captioner = self._captioner, None
            self._waiting = None
            self._changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        self._metrics.loaded(False)
        return captioner

    def follow(self, plan: ShadowPlan | None) -> None:
        """Takes note of what is to be compared; forgets what was found of another version."""
        with self._changed:
            self._follow(plan)

    def _follow(self, plan: ShadowPlan | None) -> None:
        if plan is None or self._plan is None or plan.version != self._plan.version:
            self._tally = _Tally()
        self._plan = plan

    def verdict(self) -> Verdict | None:
        """Returns what the thresholds say; None while too little was found."""
        with self._changed:
            return None if self._plan is None else _judge(self._plan, self._tally)

    def report(self, said: str = "") -> ShadowAnswer | None:
        """Returns what was found so far; None without a candidate.

        Args:
            said: The verdict, where it is not the thresholds' own.
        """
        with self._changed:
            plan, found = self._plan, self._tally
            if plan is None:
                return None
            verdict = _judge(plan, found)
            answered = found.answered
            return ShadowAnswer(
                version=plan.version,
                share=plan.share,
                loaded=self._captioner is not None,
                requests=found.requests,
                agreed=found.agreed,
                failed=found.failed,
                dropped=found.dropped,
                overlap=found.overlap if found.requests else None,
                score=found.scores / answered if answered else None,
                live_score=found.live_scores / answered if answered else None,
                seconds=median(found.seconds) if found.seconds else None,
                live_seconds=median(found.live_seconds) if found.live_seconds else None,
                slowdown=found.slowdown(plan),
                verdict=said or plan.verdict or (verdict.words if verdict else ""),
            )

    # The shadow's thread.

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._captioner is None)
                captioner, sample = self._captioner, self._waiting
                self._waiting = None
            if captioner is None or sample is None:
                return
            try:
                self._compare(captioner, sample)
            except _DroppedError:
                with self._changed:
                    self._drop()
            del captioner, sample  # an idle shadow must keep nothing alive

    def _drop(self) -> None:
        self._tally.dropped += 1
        self._metrics.asked("dropped")

    def _compare(self, captioner: Captioner, sample: _Sample) -> None:
        caption, seconds = None, 0.0
        try:
            result, seconds = self._caption(captioner, sample)
            caption = result[0] if isinstance(result, list) else None
        except _DroppedError:
            raise
        except Exception as error:  # whatever a candidate does must harm nobody
            logger.warning("the candidate %s failed: %r", captioner.version, error)
        live = sample.caption
        with self._changed:
            found = self._tally
            found.requests += 1
            if caption is None:
                found.failed += 1
                self._metrics.asked("failed")
                return
            agreed, overlap = caption.text == live.text, word_overlap(caption.text, live.text)
            found.agreed += agreed
            found.overlaps += overlap
            found.scores += caption.score
            found.live_scores += live.score
            found.seconds.append(seconds)
            self._metrics.asked("agreed" if agreed else "differed")
            self._metrics.compared(overlap, seconds, found.score_difference)

    def _caption(self, captioner: Captioner, sample: _Sample) -> tuple[Result, float]:
        """Returns what the candidate says, and the seconds that it took without its waits."""
        until = time.monotonic() + _PATIENCE_S
        spent = 0.0
        params = sample.choose(captioner)
        captioner.check(params)
        with self._gap(until) as began:
            pixels = decode_image(sample.image, captioner.image_spec, self._limits)
            spent += time.perf_counter() - began
        with self._gap(until) as began:
            [encoded] = captioner.encode([pixels])
            spent += time.perf_counter() - began
        slot = captioner.join(encoded, params)
        while True:
            try:
                with self._gap(until) as began:
                    done = captioner.step()
                    spent += time.perf_counter() - began
            except _DroppedError:
                captioner.leave(slot)
                raise
            if done:
                [(_, result)] = done
                return result, spent

    @contextmanager
    def _gap(self, until: float) -> Iterator[float]:
        """Waits until no live request runs, and gives the time at which the block begins."""
        with self._changed:
            left = until - time.monotonic()
            gap = self._changed.wait_for(lambda: not self._live or self._captioner is None, left)
            if not gap or self._captioner is None:
                raise _DroppedError
            self._running = True
        try:
            yield time.perf_counter()
        finally:
            with self._changed:
                self._running = False


def word_overlap(one: str, other: str) -> float:
    """Returns the F1 of the words of two captions: 1 for the same words, 0 for none in common."""
    words, others = Counter(one.lower().split()), Counter(other.lower().split())
    if not words and not others:
        return 1.0
    return 2 * (words & others).total() / (words.total() + others.total())


def _judge(plan: ShadowPlan, found: _Tally) -> Verdict | None:
    if found.requests < plan.min_requests:
        return None
    disagreement = 1 - found.overlap
    words = f"{found.requests} requests, disagreement {disagreement:.3f}"
    if disagreement > plan.max_disagreement:
        return Verdict(False, f"refused: {words} exceeds {plan.max_disagreement:g}")
    slowdown = found.slowdown(plan)
    if slowdown is None:
        return None
    words = f"{words}, slowdown {slowdown:.2f}"
    if slowdown > plan.max_slowdown:
        return Verdict(False, f"refused: {words} exceeds {plan.max_slowdown:g}")
    return Verdict(True, f"promote: {words}")
