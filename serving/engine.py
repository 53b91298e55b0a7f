"""The batcher: what waits together is captioned together, on one compute thread.

There is no timer. An idle engine starts at once on whatever it gets; what arrives meanwhile is the
next batch. So a lone request waits for nobody, and batches grow with the load by themselves.
"""

import asyncio
import logging
import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from serving.captioner import Caption, Captioner, Params
from serving.errors import CaptionError, CaptionFailed, DeadlineExceeded, NotReady, QueueFull
from serving.session import Observer, Pixels

logger = logging.getLogger(__name__)

Result = list[Caption] | CaptionError

_LONGEST_RETRY_S = 60
# Every image of a batch has as many rows as the widest search in it: this many on average at most.
_ROWS_PER_IMAGE = 8


class EngineMetrics(Observer, Protocol):
    """Is told what the engine does, from its compute thread."""

    def observe_queue_wait(self, seconds: float) -> None:
        """An image left the queue after so long."""

    def observe_batch(self, images: int) -> None:
        """A batch of so many images begins."""

    def add_tokens(self, count: int) -> None:
        """So many tokens stand in captions that go out."""


@dataclass(slots=True, eq=False)
class _Waiter:
    """One image that waits, and the future of the task that waits for it."""

    captioner: Captioner
    pixels: Pixels
    params: Params
    deadline: float | None
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[list[Caption]]"
    since: float = field(default_factory=time.monotonic)

    def is_wanted(self, now: float) -> bool:
        """Returns whether somebody waits still; whoever is too late is told by its own timeout."""
        if self.future.done() or self.loop.is_closed():
            return False
        return self.deadline is None or self.deadline > now


class Engine:
    """Captions images from any number of event loops in batches."""

    def __init__(self, *, max_batch_size: int, max_queue: int, metrics: EngineMetrics) -> None:
        """Starts the compute thread.

        Args:
            max_batch_size: Images in a batch at most.
            max_queue: Images that may wait for a batch; the next is refused.
            metrics: Is told what happens.
        """
        self._max_batch_size = max_batch_size
        self._max_rows = _ROWS_PER_IMAGE * max_batch_size
        self._max_queue = max_queue
        self._metrics = metrics
        self._queue: deque[_Waiter] = deque()
        self._closed = False
        self._changed = threading.Condition()  # guards the queue and the flag
        self._image_s = 0.1  # running mean of the seconds an image takes
        self._thread = threading.Thread(target=self._run, name="cutline-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images that wait for a batch."""
        return len(self._queue)

    async def submit(
        self,
        captioner: Captioner,
        pixels: Pixels,
        params: Params,
        deadline: float | None = None,
    ) -> list[Caption]:
        """Returns the captions of one image, best first.

        A task that is cancelled while it waits leaves the queue.

        Args:
            captioner: What captions it, whatever is swapped in meanwhile.
            pixels: uint8 (H, W, 3), from `decode_image`.
            params: Checked by `captioner.check`.
            deadline: When to give up, on the clock of `time.monotonic`, in seconds.

        Raises:
            QueueFull: Too many wait already.
            DeadlineExceeded: The captions were not there in time.
            CaptionFailed: The model gave none.
            NotReady: The engine is closed.
        """
        loop = asyncio.get_running_loop()
        waiter = _Waiter(captioner, pixels, params, deadline, loop, loop.create_future())
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
            self._changed.notify()
        self._thread.join()

    def _enqueue(self, waiter: _Waiter) -> None:
        with self._changed:
            if self._closed:
                raise NotReady("The server is closing: it takes no more images.")
            if len(self._queue) >= self._max_queue:
                wait = math.ceil(len(self._queue) * self._image_s)
                raise QueueFull(
                    f"{len(self._queue)} images wait already.",
                    retry_after=min(max(wait, 1), _LONGEST_RETRY_S),
                )
            self._queue.append(waiter)
            self._changed.notify()

    def _forget(self, waiter: _Waiter) -> None:
        with self._changed:
            if waiter in self._queue:
                self._queue.remove(waiter)

    def _run(self) -> None:
        # A call for each batch, whose variables end with it: an idle engine must not keep alive a
        # captioner that was swapped out.
        while self._serve_batch():
            pass

    def _serve_batch(self) -> bool:
        """Waits for a batch and captions it; returns False when closed and empty."""
        taken = self._next_batch()
        if not taken:
            return False
        started = time.monotonic()
        batch = [waiter for waiter in taken if waiter.is_wanted(started)]
        if not batch:
            return True
        for waiter in batch:
            self._metrics.observe_queue_wait(started - waiter.since)
        results = self._caption(batch)
        spent = (time.monotonic() - started) / len(batch)
        self._image_s += 0.2 * (spent - self._image_s)
        _deliver(batch, results)
        self._metrics.add_tokens(
            sum(caption.tokens for got in results if isinstance(got, list) for caption in got)
        )
        return True

    def _next_batch(self) -> list[_Waiter]:
        """Waits for images, takes those that share the oldest one's captioner; empty: closed.

        One that would make the batch too wide waits for the next, where it is among the oldest.
        """
        with self._changed:
            while not self._queue:
                if self._closed:
                    return []
                self._changed.wait()
            captioner = self._queue[0].captioner
            batch: list[_Waiter] = []
            others: deque[_Waiter] = deque()
            widest = 0
            for waiter in self._queue:
                width = max(widest, waiter.params.num_beams)
                if (
                    waiter.captioner is captioner
                    and len(batch) < self._max_batch_size
                    and (not batch or (len(batch) + 1) * width <= self._max_rows)
                ):
                    batch.append(waiter)
                    widest = width
                else:
                    others.append(waiter)
            self._queue = others
            return batch

    def _caption(self, batch: Sequence[_Waiter]) -> list[Result]:
        """Captions a batch; if it fails, each image alone, so that a bad one harms only itself."""
        try:
            return self._caption_together(batch)
        except Exception as error:  # nothing that a model or an image does may end the thread
            if len(batch) == 1:
                logger.exception("an image could not be captioned")
                return [_told(error)]
            logger.warning("a batch of %d failed; one by one now: %r", len(batch), error)
        return [
            self._caption([waiter])[0]
            if waiter.is_wanted(time.monotonic())
            else DeadlineExceeded("Given up on: nobody waits.")
            for waiter in batch
        ]

    def _caption_together(self, batch: Sequence[_Waiter]) -> list[Result]:
        self._metrics.observe_batch(len(batch))
        results = batch[0].captioner.caption_batch(
            [waiter.pixels for waiter in batch],
            [waiter.params for waiter in batch],
            observer=self._metrics,
        )
        if len(results) != len(batch):
            raise CaptionFailed(f"{len(batch)} images got {len(results)} results.")
        return list(results)


def _told(error: Exception) -> CaptionError:
    """Returns what the client hears of an error."""
    if isinstance(error, CaptionError):
        return error
    return CaptionFailed("The model failed on this image; the server's log says why.")


def _deliver(batch: Sequence[_Waiter], results: Sequence[Result]) -> None:
    """Hands results to their tasks, by one call into each event loop."""
    by_loop = defaultdict(list)
    for waiter, result in zip(batch, results, strict=True):
        by_loop[waiter.loop].append((waiter.future, result))
    for loop, outcomes in by_loop.items():
        try:
            loop.call_soon_threadsafe(_settle, outcomes)
        except RuntimeError:  # the loop was closed, and its tasks with it
            logger.info("%d results had nobody left to go to", len(outcomes))


def _settle(outcomes: Sequence[tuple["asyncio.Future[list[Caption]]", Result]]) -> None:
    for future, result in outcomes:
        if future.done():
            continue
        if isinstance(result, CaptionError):
            future.set_exception(result)
        else:
            future.set_result(result)
