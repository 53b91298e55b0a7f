"""Processes that are killed, told to end, or cut off from their registry, under an open load."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import Start, requests_to
from outcomes import Outcomes, evenly, offer, probe
from processes import HAPROXY, REPLICA, mark_of, marked, settled, until
from servers import Running
from under_load import Served

from exports.registry import Registry

HERE = Path(__file__).parent
PLAIN = ("-m", "serving", "up", "--local")


def replicas(pid: int) -> list[int]:
    """Returns the processes of a server's replicas."""
    return marked(mark_of(pid), REPLICA)


async def alive(pid: int, count: int) -> list[int]:
    """Waits until there are so many replicas."""
    await until(lambda: len(replicas(pid)) >= count)
    return replicas(pid)


@pytest.mark.chaos
@pytest.mark.ray
def test_a_replica_that_is_killed_costs_no_request(start: Start, bodies: list[bytes]) -> None:
    """Two replicas, one killed with -9 twice: bodies up to a MiB are answered by the other."""
    server = start(str(HERE / "replicas.py"), "2")
    requests = requests_to(server, bodies)
    done = asyncio.Event()
    back: list[float] = []

    async def killing() -> None:
        try:
            for _ in range(2):
                before = await alive(server.pid, 2)
                await asyncio.sleep(3)
                os.kill(before[0], signal.SIGKILL)
                killed = time.monotonic()
                while set(await alive(server.pid, 2)) == set(before):
                    await asyncio.sleep(0.2)
                back.append(time.monotonic() - killed)
            await asyncio.sleep(3)
        finally:
            done.set()

    async def run() -> Outcomes:
        load = offer(server.port, requests, evenly(8.0, 10**6), stop=done.is_set)
        found, _ = await asyncio.gather(load, killing())
        return found

    found = asyncio.run(run())
    print(
        f"{len(found.all)} requests, p99 {1000 * found.percentile(0.99):.0f} ms, back after {back}"
    )
    first = next((one for one in found.all if one.status != 200), None)
    assert first is None, (found.statuses, first)
    assert len(found.all) > 60


@pytest.mark.chaos
def test_a_registry_that_vanishes_for_a_minute(
    start: Start, registry: Registry, bodies: list[bytes], tmp_path: Path
) -> None:
    server = start(*PLAIN)
    requests = requests_to(server, bodies)
    done = asyncio.Event()

    async def vanishing() -> None:
        try:
            registry.root.rename(tmp_path / "away")
            await asyncio.sleep(60)
            (tmp_path / "away").rename(registry.root)
            registry.promote("tiny", "2")
            await asyncio.sleep(5)
        finally:
            done.set()

    async def run() -> tuple[Outcomes, int]:
        found, ready, _ = await asyncio.gather(
            offer(server.port, requests, evenly(8.0, 10**6), stop=done.is_set),
            probe(server.port, "/readyz", 0.1, done.is_set),
            vanishing(),
        )
        return found, ready.refused

    found, refused = asyncio.run(run())
    assert (found.failed, refused) == (0, 0)
    assert set(found.versions) == {"1", "2"}


def drained(server: Running, bodies: list[bytes]) -> tuple[list[bytes], int]:
    """Ends a server with SIGTERM in the middle of requests; returns their answers and its code."""
    served = Served(server.port, server.pid, Registry(), [], {})

    async def run() -> list[bytes]:
        halves = []
        for request in requests_to(server, bodies):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(request[:-100])
            halves.append((reader, writer, request[-100:]))
        # HAProxy keeps half-sent bodies to itself: under Ray no replica hears of them.
        end = time.monotonic() + 3
        while await asyncio.to_thread(served.waiting) < len(bodies) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        os.kill(server.pid, signal.SIGTERM)
        await asyncio.sleep(0.5)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", server.port)
        for _, writer, rest in halves:
            writer.write(rest)
        async with asyncio.timeout(60):
            answers = [await reader.readuntil(b"\r\n") for reader, _, _ in halves]
        for _, writer, _ in halves:
            writer.close()
        return answers

    answers = asyncio.run(run())
    end = time.monotonic() + 60
    while (code := ended(server.pid)) is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    return answers, code


def ended(pid: int) -> int | None:
    """Returns the exit code of a child that has ended; it is left for its parent to collect."""
    status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return None if status is None else status.si_status


def test_a_plain_server_that_is_told_to_end_answers_first(
    start: Start, bodies: list[bytes]
) -> None:
    answers, code = drained(start(*PLAIN), bodies)
    assert (answers, code) == ([b"HTTP/1.1 200 OK\r\n"] * len(bodies), 0)


@pytest.mark.chaos
@pytest.mark.ray
def test_a_server_under_ray_that_is_told_to_end_answers_first(
    start: Start, bodies: list[bytes]
) -> None:
    server = start("-m", "serving", "up")
    settled(mark_of(server.pid), HAPROXY)
    answers, code = drained(server, bodies)
    assert (answers, code) == ([b"HTTP/1.1 200 OK\r\n"] * len(bodies), 0)
