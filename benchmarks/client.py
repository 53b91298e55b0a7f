"""A load generator that costs little: it runs on the cores of the server that it measures.

Requests are whole bytes beforehand, connections stay open, and answers are read as they are; what
they say is looked at afterwards.
"""

import asyncio
import gc
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

TIMEOUT_S = 120.0  # longer than any queue here takes; what hangs must not hang the benchmark
_BOUNDARY = "4a1f0b6de7"


@dataclass(slots=True)
class Load:
    """What came of a load.

    Attributes:
        latencies: Seconds of each good answer; under an open loop from the moment when the request
            was due, so that a request which had to wait for its turn counts its wait.
        answers: The place of each request, and the body that answered it.
        errors: Requests with another status than 200, or with no answer.
        seconds: From the first request to the last answer.
        cpu_s: Seconds of processor time that this client took of them.
    """

    latencies: list[float] = field(default_factory=list)
    answers: list[tuple[int, bytes]] = field(default_factory=list)
    errors: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        """Returns the latency, in seconds, that `share` of the good answers did not exceed."""
        return percentile(self.latencies, share)


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the least of `values` that is no less than `share` of them; NaN if there are none."""
    if not values:
        return math.nan
    # Rounded: 0.07 * 100 is a little more than 7.
    return sorted(values)[max(1, math.ceil(round(share * len(values), 9))) - 1]


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Returns the moments, in seconds, of a Poisson process; at least one."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, max(1, round(rate * seconds)))
    moments: list[float] = np.cumsum(gaps).tolist()
    return moments


def upload(port: int, path: str, jpeg: bytes) -> bytes:
    """Returns a whole request: a form with one file, which every framework here reads."""
    body = (
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n'
        f"Content-Type: image/jpeg\r\n\r\n"
    ).encode() + b"%b\r\n--%b--\r\n" % (jpeg, _BOUNDARY.encode())
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: application/json\r\n"
        f"Content-Type: multipart/form-data; boundary={_BOUNDARY}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def closed_loop(
    port: int, requests: Sequence[bytes], *, clients: int, count: int, first: int = 0
) -> Load:
    """Sends `count` requests: each client its next one when it is answered.

    Args:
        port: Where the server listens on 127.0.0.1.
        requests: Taken round and round.
        clients: How many send at the same time.
        count: How many are sent.
        first: The turn to begin with.
    """

    async def run(load: Load) -> None:
        turns = iter(range(first, first + count))
        began = time.perf_counter()
        await asyncio.gather(*(_client(port, requests, turns, load) for _ in range(clients)))
        load.seconds = time.perf_counter() - began

    return _measured(run)


def open_loop(
    port: int, requests: Sequence[bytes], moments: Sequence[float], *, warm_up: int = 0
) -> Load:
    """Sends a request at each of the moments, however many of those before are unanswered.

    Latencies count from those moments, not from when the request left: a server that stalls, or a
    client that comes late, cannot hide it (no "coordinated omission").

    Args:
        port: Where the server listens on 127.0.0.1.
        requests: Taken round and round.
        moments: Seconds from the beginning, ascending.
        warm_up: How many of the first are sent but do not count.
    """

    async def run(load: Load) -> None:
        pool = Pool(port)
        began = time.perf_counter()

        async def one(turn: int, due: float, into: Load) -> None:
            await asyncio.sleep(began + due - time.perf_counter())
            await _ask(pool, requests, turn, began + due, into)

        try:
            # One timer at a time would do, but these are some hundred, and idle until they are due.
            await asyncio.gather(
                *(
                    one(turn, due, load if turn >= warm_up else Load())
                    for turn, due in enumerate(moments)
                )
            )
            load.seconds = time.perf_counter() - began - (moments[warm_up - 1] if warm_up else 0.0)
        finally:
            pool.close()

    return _measured(run)


def _measured(run) -> Load:  # type: ignore[no-untyped-def]
    load = Load()
    gc.collect()
    gc.disable()  # else it walks through all that a benchmark has loaded, again and again
    try:
        before = time.process_time()
        asyncio.run(run(load))
        load.cpu_s = time.process_time() - before
    finally:
        gc.enable()
    return load


async def _client(port: int, requests: Sequence[bytes], turns: Iterator[int], load: Load) -> None:
    pool = Pool(port)
    try:
        for turn in turns:
            await _ask(pool, requests, turn, time.perf_counter(), load)
    finally:
        pool.close()


async def _ask(pool: "Pool", requests: Sequence[bytes], turn: int, due: float, load: Load) -> None:
    place = turn % len(requests)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            status, body = await pool.exchange(requests[place])
    except (OSError, EOFError, ValueError, TimeoutError):
        load.errors += 1
        return
    if status == 200:
        load.latencies.append(time.perf_counter() - due)
        load.answers.append((place, body))
    else:
        load.errors += 1


class Pool:
    """Open connections to one server; one that is busy is not in it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def exchange(self, request: bytes) -> tuple[int, bytes]:
        """Returns the status and the body that answer a request."""
        status, _, body = await self.ask(request)
        return status, body

    async def ask(self, request: bytes) -> tuple[int, bytes, bytes]:
        """Returns the status, the head in small letters, and the body that answer a request."""
        while self._idle:
            reader, writer = self._idle.pop()
            if reader.at_eof() or writer.is_closing():  # servers close what is idle
                writer.close()
                continue
            try:
                return await self._exchange(reader, writer, request)
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                # It was closed just as the request went out. Anything else is the server's fault.
                if isinstance(error, asyncio.IncompleteReadError) and error.partial:
                    raise
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        return await self._exchange(reader, writer, request)

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
    ) -> tuple[int, bytes, bytes]:
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            body = await _body(reader, head)
        except BaseException:
            writer.close()
            raise
        if b"connection: close" in head:
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(head.split(b" ", 2)[1]), head, body

    def close(self) -> None:
        """Closes what is idle."""
        for _, writer in self._idle:
            writer.close()


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    _, found, rest = head.partition(b"\r\ncontent-length:")
    if found:
        return await reader.readexactly(int(rest.split(b"\r\n", 1)[0]))
    if b"transfer-encoding: chunked" not in head:
        raise ValueError("an answer of no stated length")
    parts = []
    while size := int((await reader.readline()).partition(b";")[0], 16):
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readline()
    return b"".join(parts)
