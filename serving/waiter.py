"""An image on its way through the engine, and how its task hears what became of it."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from serving.caller import caller
from serving.captioner import Captioner
from serving.errors import CaptionError, CaptionFailed
from serving.memories import Encoded
from serving.params import Caption, Params
from serving.session import Pixels
from serving.timeline import Timeline

logger = logging.getLogger(__name__)

Result = list[Caption] | CaptionError


@dataclass(slots=True, eq=False)
class Waiter:
    """One image on its way, and the future of the task that waits for it."""

    captioner: Captioner
    pixels: Pixels
    params: Params
    deadline: float | None
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[list[Caption]]"
    since: float = field(default_factory=time.monotonic)
    begun: float = 0.0
    timeline: Timeline = field(default_factory=Timeline)
    encoded: Encoded | None = None
    caller_name: str = field(default_factory=lambda: caller().name)

    @property
    def rows(self) -> int:
        """Beams that the image may come to."""
        return self.params.num_beams

    def is_wanted(self, now: float) -> bool:
        """Returns whether somebody waits still; whoever is too late is told by its own timeout."""
        if self.future.done() or self.loop.is_closed():
            return False
        return self.deadline is None or self.deadline > now


def told(error: Exception) -> CaptionError:
    """Returns what the client hears of an error."""
    if isinstance(error, CaptionError):
        return error
    return CaptionFailed("The model failed on this image; the server's log says why.")


def deliver(done: Sequence[tuple[Waiter, Result]]) -> None:
    """Hands results to their tasks, by one call into each event loop."""
    by_loop = defaultdict(list)
    for waiter, result in done:
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
