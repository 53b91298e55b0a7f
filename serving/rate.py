"""A token bucket: so many a second on average, so many at once."""

import time
from collections.abc import Callable


class TokenBucket:
    """Fills at `rate` tokens a second up to `burst`; for the thread of the event loop alone.

    It may be overdrawn: what a request costs is known only once it is read, and by then it has been
    let in. The next one waits for that.
    """

    def __init__(
        self, rate: float, burst: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Starts full.

        Args:
            rate: Tokens a second.
            burst: The most that it holds, at least 1.
            clock: Seconds, of any origin; it never goes back.
        """
        self.rate = rate
        self.burst = burst
        self._clock = clock
        self._level = burst
        self._at = clock()

    def take(self) -> float:
        """Takes a token and returns 0, or takes none and returns the seconds until there is one."""
        self._fill()
        if self._level < 1:
            return (1 - self._level) / self.rate
        self._level -= 1
        return 0.0

    def charge(self, tokens: int) -> None:
        """Takes tokens whether they are there or not."""
        self._fill()
        self._level -= tokens

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._level + (now - self._at) * self.rate, self.burst)
        self._at = now
