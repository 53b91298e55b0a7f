"""Every request of a load, one by one: when it was due, when it was answered, by whom, with what.

The load is open: a request is sent when it is due, whether or not others are answered, and its
latency counts from then. So neither a server that stalls nor a client that comes late can hide it
(no "coordinated omission").
"""

import asyncio
import gc
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

from client import TIMEOUT_S, Pool, percentile

LEFT = -1  # the status of a request whose client left before it was answered
NO_ANSWER = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request; times are seconds from the beginning of the load.

    `detail` is the beginning of an answer that is no captions.
    """

    place: int
    due: float
    done: float
    status: int
    version: str = ""
    text: str = ""
    retry_after: bool = False
    detail: str = ""


@dataclass(slots=True)
class Outcomes:
    """What came of a load."""

    all: list[Outcome] = field(default_factory=list)

    @property
    def good(self) -> list[Outcome]:
        """Returns those that were answered with captions."""
        return [one for one in self.all if one.status == 200]

    @property
    def statuses(self) -> Counter[int]:
        """Returns how many had each status."""
        return Counter(one.status for one in self.all)

    @property
    def failed(self) -> int:
        """Returns how many had neither captions nor a client that left."""
        return sum(one.status not in (200, LEFT) for one in self.all)

    def percentile(self, share: float) -> float:
        """Returns the latency, in seconds, that `share` of the good ones did not exceed."""
        return percentile([one.done - one.due for one in self.good], share)

    def longest_gap(self) -> float:
        """Returns the longest time between two good answers, in seconds."""
        moments = sorted(one.done for one in self.good)
        return max((b - a for a, b in pairwise(moments)), default=0.0)

    def rate(self, begin: float, end: float) -> float:
        """Returns good answers a second between two moments."""
        return sum(begin <= one.done < end for one in self.good) / (end - begin)

    def mixed(self, expected: Mapping[str, Sequence[str]]) -> int:
        """Returns how many captions are not those of the version that they are said to be of."""
        return sum(expected[one.version][one.place] != one.text for one in self.good)

    @property
    def versions(self) -> Counter[str]:
        """Returns how many were answered by each version."""
        return Counter(one.version for one in self.good)


def evenly(rate: float, seconds: float) -> Iterator[float]:
    """Yields moments at equal distances."""
    for turn in range(max(1, round(rate * seconds))):
        yield turn / rate


async def offer(
    port: int,
    requests: Sequence[bytes],
    moments: Iterator[float],
    *,
    stop: Callable[[], bool] = lambda: False,
    leave: Callable[[int], float | None] = lambda _: None,
) -> Outcomes:
    """Sends a request at each of the moments and returns what came of all.

    Args:
        port: Where the server listens on 127.0.0.1.
        requests: Taken round and round.
        moments: Seconds from the beginning, ascending.
        stop: Asked before each request; ends the load.
        leave: After how many seconds the client of a request leaves; None: it stays.
    """
    pool, found = Pool(port), Outcomes()
    running: set[asyncio.Task[None]] = set()
    began = time.perf_counter()

    async def one(turn: int, due: float) -> None:
        place = turn % len(requests)
        left = leave(turn)
        found.all.append(await _asked(pool, requests[place], place, due, began, left))

    try:
        for turn, due in enumerate(moments):
            await asyncio.sleep(began + due - time.perf_counter())
            if stop():
                break
            task = asyncio.create_task(one(turn, due))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
    finally:
        pool.close()
    return found


async def saturate(
    port: int, requests: Sequence[bytes], *, clients: int, seconds: float, count: int = 10**9
) -> Outcomes:
    """Lets each client send its next request when it is answered, for so long or so often."""
    found, turns, began = Outcomes(), iter(range(count)), time.perf_counter()

    async def client() -> None:
        pool = Pool(port)
        try:
            for turn in turns:
                now = time.perf_counter() - began
                if now >= seconds:
                    return
                place = turn % len(requests)
                found.all.append(await _asked(pool, requests[place], place, now, began, None))
        finally:
            pool.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


async def _asked(
    pool: Pool, request: bytes, place: int, due: float, began: float, left: float | None
) -> Outcome:
    def after(status: int, **more: object) -> Outcome:
        return Outcome(place, due, time.perf_counter() - began, status, **more)  # type: ignore[arg-type]

    try:
        async with asyncio.timeout(TIMEOUT_S if left is None else left):
            status, head, body = await pool.ask(request)
    except TimeoutError:
        return after(NO_ANSWER if left is None else LEFT)
    except (OSError, EOFError, ValueError):
        return after(NO_ANSWER)
    retry_after = b"\r\nretry-after:" in head
    if status == 200:
        with suppress(ValueError, LookupError, TypeError):
            answer = json.loads(body)
            text = answer["results"][0]["captions"][0]["text"]
            return after(status, version=answer["version"], text=text)
    detail = body[:300].decode(errors="replace")
    return after(NO_ANSWER if status == 200 else status, retry_after=retry_after, detail=detail)


@dataclass(slots=True)
class Probe:
    """What came of asking a path of the server again and again."""

    seconds: list[float] = field(default_factory=list)
    refused: int = 0


async def probe(port: int, path: str, every_s: float, stop: Callable[[], bool]) -> Probe:
    """Asks a path at equal distances until it is stopped."""
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    pool, found = Pool(port), Probe()
    try:
        while not stop():
            began = time.perf_counter()
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    status, _ = await pool.exchange(request)
            except (OSError, EOFError, ValueError, TimeoutError):
                status = NO_ANSWER
            found.seconds.append(time.perf_counter() - began)
            found.refused += status != 200
            await asyncio.sleep(max(0.0, began + every_s - time.perf_counter()))
    finally:
        pool.close()
    return found


def who_leaves(share: float, within_s: float, seed: int) -> Callable[[int], float | None]:
    """Returns a function that lets a share of the clients leave, at random within some seconds."""
    random = Random(seed)
    return lambda _: random.uniform(0, within_s) if random.random() < share else None


@contextmanager
def undisturbed() -> Iterator[None]:
    """Collects no garbage meanwhile: it would walk through all that a benchmark has loaded."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
