"""What a server takes at most, where more than one module asks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serving.caller import caller
from serving.errors import QueueFull

MAX_PIXELS = 40_000_000  # of one image
MAX_LENGTH_PENALTY = 10.0  # beyond it, scores leave float32

Take = Callable[[int], None]


class Budget:
    """How much all requests together may hold at once; for the thread of the event loop alone.

    Where callers have names, none may hold more than is left free beside it: one that floods the
    server keeps half of it, two keep two thirds, and there is always room for one more (dynamic
    thresholds: Choudhury and Hahne, 1998, https://doi.org/10.1109/90.664262).
    """

    def __init__(self, limit: int, refusal: str) -> None:
        """Starts with nothing taken.

        Args:
            limit: How much may be held.
            refusal: What the client hears whose request does not fit.
        """
        self.held = 0
        self._held_by: dict[str, int] = {}
        self._limit = limit
        self._refusal = refusal

    @contextmanager
    def share(self) -> Iterator[Take]:
        """Lends one request a function that takes; what it took is given back at the end.

        The function raises QueueFull, and takes nothing, where too little is left.
        """
        taken = 0
        name = caller().name

        def take(count: int) -> None:
            nonlocal taken
            free = self._limit - self.held - count
            own = self._held_by.get(name, 0) + count
            if free < 0 or (name and own > free):
                raise QueueFull(self._refusal, retry_after=1)
            self.held += count
            taken += count
            self._held_by[name] = own

        try:
            yield take
        finally:
            self.held -= taken
            left = self._held_by.pop(name, 0) - taken
            if left:
                self._held_by[name] = left
