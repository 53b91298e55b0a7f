"""How fast images are captioned, and what follows: how many run together, how many may wait.

Rows that run together grow by one with each image that is quick enough and shrink by a tenth with
each that is not (additive increase, multiplicative decrease: Chiu and Jain, 1989,
https://doi.org/10.1016/0169-7552(89)90019-6).
"""

import math
import time
from collections.abc import Sequence

_FIRST_S = 0.1  # of an image, before one was captioned
_SHARE = 0.1  # of the newest in the running mean
_FEWER = 0.9  # of the rows that run together, when an image took too long
_PROMISED = 0.8  # of the time until a deadline: the pace may fall while an image waits
_LEAST = 16  # places, or a request of several images would never find them where images are slow
_LONGEST_RETRY_S = 60


class Pace:
    """What the last images took; for threads that hold the engine's lock."""

    def __init__(self, *, max_rows: int, max_queue: int, target_s: float) -> None:
        """Starts with all rows.

        Args:
            max_rows: Rows that run together at most.
            max_queue: Images that wait at most.
            target_s: How long an image should take, its wait aside.
        """
        self.rows = float(max_rows)  # that run together now
        self._max_rows = max_rows
        self._max_queue = max_queue
        self._target_s = target_s
        self._image_s = _FIRST_S  # between two images that are done
        self._last = 0.0

    def finished(self, begun: Sequence[float], now: float) -> None:
        """Learns from images that are done at once.

        Args:
            begun: When each left the queue, on the clock of `time.monotonic`, in seconds.
            now: When they were done.
        """
        spent = (now - max(self._last, begun[0])) / len(begun)
        self._image_s += _SHARE * (spent - self._image_s)
        self._last = now
        for one in begun:
            if now - one > self._target_s:
                self.rows = max(self.rows * _FEWER, 1.0)
            else:
                self.rows = min(self.rows + 1, self._max_rows)

    def places(self, deadline: float | None) -> int:
        """Returns how many may wait before an image that has until `deadline`, or for ever."""
        if deadline is None:
            return self._max_queue
        in_time = _PROMISED * (deadline - time.monotonic()) / self._image_s
        return min(self._max_queue, max(_LEAST, int(in_time)))

    def retry_after(self, waiting: int) -> int:
        """Returns the seconds in which so many that wait are captioned."""
        return min(max(math.ceil(waiting * self._image_s), 1), _LONGEST_RETRY_S)
