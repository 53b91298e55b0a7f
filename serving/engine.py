"""The step scheduler: images join and leave a running search between any two of its steps.

Two threads. One encodes what waits, in small batches, ahead of need; the other runs decode steps
over all beams of all images at once. So nobody waits for the slowest of a batch: an image that is
done leaves at once, and an encoded one takes its rows. A lone image waits for nobody.

What is admitted is counted in rows, the beams that an image may come to. Their number follows one
knob, the latency target: as long as images are captioned faster than that, more rows run together,
which captions more images a second; when one takes longer, fewer.

The queue takes no more images than are captioned before their deadline at the pace of the last
ones, and an image is decoded only once it has its place there.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Protocol

from serving.caller import caller
from serving.captioner import Captioner
from serving.decoding import Observer
from serving.errors import DeadlineExceeded, NotReady, QueueFull
from serving.fair_queue import FairQueue
from serving.pace import Pace
from serving.params import Caption, Params
from serving.session import Pixels
from serving.timeline import Timeline
from serving.waiter import Result, Waiter, deliver, told

logger = logging.getLogger(__name__)

_ENTERING_S = 0.25  # that one who was let in counts before its image comes
_ENCODED_TOGETHER = 8  # a larger batch saves little, and its first image waits for its last


_entered: ContextVar[int] = ContextVar("entered", default=-1)  # the request that a task works for


class EngineMetrics(Observer, Protocol):
    """Is told what the engine does, from its threads."""

    def observe_queue_wait(self, seconds: float) -> None:
        """An image left the queue after so long."""

    def observe_batch(self, images: int) -> None:
        """So many images are encoded together."""

    def observe_rows(self, rows: int) -> None:
        """A decode step takes in images that may come to so many rows."""

    def add_tokens(self, count: int) -> None:
        """So many tokens stand in captions that go out."""


class Engine:
    """Captions images from any number of event loops, many at a time."""

    def __init__(
        self,
        *,
        max_rows: int,
        max_queue: int,
        latency_target_s: float,
        metrics: EngineMetrics,
    ) -> None:
        """Starts the threads.

        Args:
            max_rows: Beams that run together at most; an image that is wider runs alone.
            max_queue: Images that may wait to be decoded or encoded, at most; the next is refused,
                or the last of the caller who has most here.
            latency_target_s: How long an image should take, its wait in the queue aside.
            metrics: Is told what happens.
        """
        self._pace = Pace(max_rows=max_rows, max_queue=max_queue, target_s=latency_target_s)
        self._metrics = metrics
        self._queue: FairQueue[Waiter] = FairQueue()
        self._entering: dict[int, tuple[float, str]] = {}  # whose body is being read: when, who
        self._numbers = count()
        self._ready: deque[Waiter] = deque()  # encoded
        self._running: dict[Captioner, dict[int, Waiter]] = {}  # by slot; the stepper's own
        self._rows_ahead = 0  # of images that are encoded or being encoded
        self._encoding = True  # false when the encoding thread has ended
        self._closed = False
        self._changed = threading.Condition()  # guards the above
        self._threads = [
            threading.Thread(target=self._run, args=(turn,), name=f"cutline-{name}", daemon=True)
            for name, turn in (("encoder", self._encode_turn), ("stepper", self._step_turn))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Images that wait to be encoded."""
        return len(self._queue)

    def places(self, deadline: float | None = None) -> int:
        """Returns how many images may wait now before one that has until `deadline`."""
        return self._pace.places(deadline)

    @contextmanager
    def entering(self, deadline: float | None = None) -> Iterator[None]:
        """Lets a request in whose body is still to be read; its first `place` ends that.

        Raises:
            QueueFull: Its image would find no place now. Where half of the places are taken, others
                of its caller that were let in just before count, for a moment: those who send
                slowly, or nothing, must not keep others out.
        """
        now, name = time.monotonic(), caller().name
        with self._changed:
            while self._entering and next(iter(self._entering.values()))[0] < now - _ENTERING_S:
                del self._entering[next(iter(self._entering))]
            is_busy = 2 * self._queue.claimed >= self._pace.places(deadline)
            before = sum(one == name for _, one in self._entering.values()) if is_busy else 0
            self._check_room(before, deadline)
            number = next(self._numbers)
            self._entering[number] = now, name
        token = _entered.set(number)
        try:
            yield
        finally:
            _entered.reset(token)
            with self._changed:
                self._entering.pop(number, None)

    @contextmanager
    def place(self, deadline: float | None = None) -> Iterator[None]:
        """Keeps a place in the queue for an image that is being decoded; then submit it at once.

        Raises:
            QueueFull: There is none; `submit` says more.
        """
        name = caller().name
        with self._changed:
            self._entering.pop(_entered.get(), None)
            self._check_room(0, deadline)
            self._queue.announce(name)
        try:
            yield
        finally:
            with self._changed:
                self._queue.arrived(name)

    async def submit(
        self,
        captioner: Captioner,
        pixels: Pixels,
        params: Params,
        deadline: float | None = None,
        timeline: Timeline | None = None,
    ) -> list[Caption]:
        """Returns the captions of one image, best first.

        A task that is cancelled leaves the queue at once, and the search within one step.

        Args:
            captioner: What captions it, whatever is swapped in meanwhile.
            pixels: uint8 (H, W, 3), from `decode_image`.
            params: Checked by `captioner.check`.
            deadline: When to give up, on the clock of `time.monotonic`, in seconds.
            timeline: Is filled from when the encoder begins.

        Raises:
            QueueFull: Too many wait already to be in time, or so many that another caller had a
                better right.
            DeadlineExceeded: The captions were not there in time.
            CaptionFailed: The model gave none.
            NotReady: The engine is closed.
        """
        loop = asyncio.get_running_loop()
        waiter = Waiter(captioner, pixels, params, deadline, loop, loop.create_future())
        waiter.timeline = timeline or waiter.timeline
        left = None if deadline is None else deadline - waiter.since
        if left is not None and left <= 0:
            raise DeadlineExceeded("The deadline had passed before the image was queued.")
        self._enqueue(waiter)
        try:
            async with asyncio.timeout(left):
                return await waiter.future
        except TimeoutError as error:
            raise DeadlineExceeded(f"No caption within {left:.1f} s.") from error
        finally:
            if waiter.future.cancelled():
                self._forget(waiter)

    def close(self) -> None:
        """Refuses new images, captions those that wait, and returns when that is done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _enqueue(self, waiter: Waiter) -> None:
        with self._changed:
            if self._closed:
                raise NotReady("The server is closing: it takes no more images.")
            if len(self._queue) >= self._pace.places(waiter.deadline):
                refusal = self._full(self._queue.claimed)
                loser = self._queue.make_room(waiter)
                if loser is None:
                    raise refusal
                deliver([(loser, refusal)])
            self._queue.append(waiter)
            self._changed.notify_all()

    def _check_room(self, more: int, deadline: float | None) -> None:
        waiting = self._queue.claimed + more
        is_full = waiting >= self._pace.places(deadline)
        if is_full and not self._queue.has_better_right(caller().name):
            raise self._full(waiting)

    def _full(self, waiting: int) -> QueueFull:
        return QueueFull(
            f"{waiting} images wait already.", retry_after=self._pace.retry_after(waiting)
        )

    def _forget(self, waiter: Waiter) -> None:
        with self._changed:
            self._queue.remove(waiter)

    def _run(self, turn: Callable[[], bool]) -> None:
        # A call for each turn, whose variables end with it: an idle engine must not keep alive a
        # captioner that was swapped out.
        while turn():
            pass

    # The encoding thread.

    def _encode_turn(self) -> bool:
        """Waits for images and encodes them; returns False when closed and empty."""
        taken = self._take()
        if not taken:
            with self._changed:
                self._encoding = False
                self._changed.notify_all()
            return False
        now = time.monotonic()
        batch = [waiter for waiter in taken if waiter.is_wanted(now)]
        for waiter in batch:
            waiter.begun = waiter.timeline.encoding = now
            self._metrics.observe_queue_wait(now - waiter.since)
        ready = self._encode(batch) if batch else []
        with self._changed:
            self._rows_ahead -= sum(waiter.rows for waiter in taken)
            self._rows_ahead += sum(waiter.rows for waiter in ready)
            self._ready += ready
            self._changed.notify_all()
        return True

    def _take(self) -> list[Waiter]:
        """Waits for images that may be encoded, takes those that share a captioner; empty: closed.

        Encoded ahead is what will soon find room: as many rows as may run, at most.
        """
        with self._changed:
            while not (self._queue and self._rows_ahead < max(self._pace.rows, 1)):
                if self._closed and not self._queue:
                    return []
                self._changed.wait()
            captioner = self._queue.first().captioner
            found, rows = 0, self._rows_ahead

            def wanted(waiter: Waiter) -> bool:
                nonlocal found, rows
                fits = found == 0 or rows + waiter.rows <= self._pace.rows
                taken = waiter.captioner is captioner and found < _ENCODED_TOGETHER and fits
                found, rows = found + taken, rows + taken * waiter.rows
                return taken

            batch = self._queue.take(wanted)
            self._rows_ahead = rows
            return batch

    def _encode(self, batch: Sequence[Waiter]) -> list[Waiter]:
        """Encodes a batch and returns it; if that fails, each image alone, and those that did."""
        try:
            self._metrics.observe_batch(len(batch))
            found = batch[0].captioner.encode([one.pixels for one in batch], self._metrics)
            for waiter, encoded in zip(batch, found, strict=True):
                waiter.encoded = encoded
                waiter.timeline.encoded = time.monotonic()
            return list(batch)
        except Exception as error:  # nothing that a model or an image does may end the thread
            if len(batch) == 1:
                logger.exception("an image could not be encoded")
                deliver([(batch[0], told(error))])
                return []
            logger.warning("a batch of %d failed; one by one now: %r", len(batch), error)
        return [one for waiter in batch for one in self._encode([waiter])]

    # The stepping thread.

    def _step_turn(self) -> bool:
        """Lets images in and out and runs one step; returns False when closed and empty."""
        with self._changed:
            while not (self._running or self._ready):
                if not self._encoding:
                    return False
                self._changed.wait()
            joining = self._admit()
        self._drop_unwanted()
        for waiter in joining:
            self._join(waiter)
        if self._running:
            self._metrics.observe_rows(self._rows())
        for captioner, places in list(self._running.items()):
            done = [(places.pop(slot), got) for slot, got in self._step(captioner, places)]
            for waiter, _ in done:
                waiter.timeline.done = time.monotonic()
            if done:
                self._finished(done)
            if not places:
                del self._running[captioner]
        return True

    def _step(self, captioner: Captioner, slots: Iterable[int]) -> list[tuple[int, Result]]:
        try:
            return list(captioner.step(self._metrics))
        except Exception as error:  # it keeps what goes wrong to itself; but this thread must live
            logger.exception("a step failed as a whole")
            for slot in slots:
                captioner.leave(slot)
            return [(slot, told(error)) for slot in slots]

    def _admit(self) -> list[Waiter]:
        """Takes from those ready whom there is room for, in their order; the first is never passed.

        Who finds no slot in its captioner waits for the next turn, and so does who comes after.
        """
        joining: list[Waiter] = []
        rows = self._rows()
        free: dict[Captioner, int] = {}
        while self._ready:
            waiter = self._ready[0]
            slots = free.setdefault(waiter.captioner, waiter.captioner.free_slots)
            if slots == 0 or (rows and rows + waiter.rows > self._pace.rows):
                break
            joining.append(self._ready.popleft())
            free[waiter.captioner] -= 1
            rows += waiter.rows
            self._rows_ahead -= waiter.rows
        if joining:
            self._changed.notify_all()  # there is room ahead
        return joining

    def _rows(self) -> int:
        return sum(captioner.rows for captioner in self._running)

    def _drop_unwanted(self) -> None:
        now = time.monotonic()
        for captioner, places in list(self._running.items()):
            for slot in [slot for slot, one in places.items() if not one.is_wanted(now)]:
                captioner.leave(slot)
                del places[slot]
            if not places:
                del self._running[captioner]

    def _join(self, waiter: Waiter) -> None:
        encoded, waiter.encoded = waiter.encoded, None  # the search has a copy
        if encoded is None or not waiter.is_wanted(time.monotonic()):
            return
        try:
            slot = waiter.captioner.join(encoded, waiter.params)
        except Exception as error:
            logger.exception("an image could not join")
            deliver([(waiter, told(error))])
            return
        waiter.timeline.joined = time.monotonic()
        self._running.setdefault(waiter.captioner, {})[slot] = waiter

    def _finished(self, done: Sequence[tuple[Waiter, Result]]) -> None:
        with self._changed:
            self._pace.finished([waiter.begun for waiter, _ in done], time.monotonic())
        deliver(done)
        found = [got for _, got in done if isinstance(got, list)]
        self._metrics.add_tokens(sum(caption.tokens for got in found for caption in got))
