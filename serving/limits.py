"""What a server takes at most, where more than one module asks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serving.errors import QueueFull

MAX_PIXELS = 40_000_000  # of one image
MAX_LENGTH_PENALTY = 10.0  # beyond it, scores leave float32

Take = Callable[[int], None]


class Budget:
    """How much all requests together may hold at once; for the thread of the event loop alone."""

    def __init__(self, limit: int, refusal: str) -> None:
        """Starts with nothing taken.

        Args:
            limit: How much may be held.
            refusal: What the client hears whose request does not fit.
        """
        self.held = 0
        self._limit = limit
        self._refusal = refusal

    @contextmanager
    def share(self) -> Iterator[Take]:
        """Lends one request a function that takes; what it took is given back at the end.

        The function raises QueueFull, and takes nothing, where too little is left.
        """
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if self.held + count > self._limit:
                raise QueueFull(self._refusal, retry_after=1)
            self.held += count
            taken += count

        try:
            yield take
        finally:
            self.held -= taken
