"""`benchmarks/load.py`: what it finds is what happened; the short forms of its scenarios."""

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import outcomes
import pytest
from outcomes import LEFT, Outcome, Outcomes

GOOD = (
    b'{"version": "2", "results": [{"captions": [{"text": "a dog"}]}]}',
    b"200 OK",
    b"",
)


@asynccontextmanager
async def answering(
    answer: Callable[[int], tuple[bytes, bytes, bytes]], delay: Callable[[int], float]
) -> AsyncIterator[int]:
    """Serves: the n-th request waits and is answered as the functions say."""
    turns = iter(range(10**6))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                turn = next(turns)
                await asyncio.sleep(delay(turn))
                body, status, extra = answer(turn)
                length = str(len(body)).encode()
                writer.write(
                    b"HTTP/1.1 %b\r\nContent-Length: %b\r\n%b\r\n%b" % (status, length, extra, body)
                )
        except (EOFError, ConnectionError, asyncio.CancelledError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


REQUEST = b"POST / HTTP/1.1\r\n\r\n"


def test_a_load_is_told_request_by_request() -> None:
    answers = [
        GOOD,
        (b"{}", b"429 Too Many", b"Retry-After: 1\r\n"),
        (b"{}", b"429 Too Many", b""),
        (b"nonsense", b"200 OK", b""),
        (b"", b"503 No", b""),
    ]

    async def run() -> Outcomes:
        async with answering(lambda turn: answers[turn], lambda _: 0.0) as port:
            moments = (0.05 * turn for turn in range(len(answers)))
            return await outcomes.offer(port, [REQUEST], moments)

    found = asyncio.run(run())
    assert [one.status for one in found.all] == [200, 429, 429, 0, 503]
    assert [one.retry_after for one in found.all] == [False, True, False, False, False]
    [good] = found.good
    assert (good.version, good.text, good.place) == ("2", "a dog", 0)
    assert found.failed == 4
    assert found.mixed({"2": ["a dog"]}) == 0
    assert found.mixed({"2": ["a cat"], "1": ["a dog"]}) == 1


def test_a_stall_is_seen_by_all_that_were_due_in_it() -> None:
    """The server stops once, from 0.2 to 0.7 s: every request due meanwhile counts its wait."""

    async def run() -> Outcomes:
        began = time.perf_counter()

        def delay(_: int) -> float:
            now = time.perf_counter() - began
            return 0.7 - now if 0.2 <= now < 0.7 else 0.0

        async with answering(lambda _: GOOD, delay) as port:
            return await outcomes.offer(port, [REQUEST], outcomes.evenly(40, 1.0))

    found = asyncio.run(run())
    assert len(found.good) == 40
    assert 0.4 < found.longest_gap() < 0.8
    assert sum(one.done - one.due > 0.2 for one in found.good) >= 8
    assert found.percentile(0.99) > 0.35
    assert found.rate(0.0, 2.0) == 20


def test_those_who_leave_are_no_failures() -> None:
    async def run() -> Outcomes:
        async with answering(lambda _: GOOD, lambda _: 0.3) as port:
            return await outcomes.offer(
                port, [REQUEST], iter([0.0, 0.0]), leave=lambda turn: 0.05 if turn else None
            )

    found = asyncio.run(run())
    assert sorted(found.statuses.items()) == [(LEFT, 1), (200, 1)]
    assert found.failed == 0
    leave = outcomes.who_leaves(0.3, 2.0, seed=0)
    delays = [leave(turn) for turn in range(1000)]
    stays = sum(delay is None for delay in delays)
    assert 650 < stays < 750
    assert all(0 <= delay <= 2 for delay in delays if delay is not None)


def test_a_probe_counts_refusals() -> None:
    async def run() -> outcomes.Probe:
        seen = []

        def answer(turn: int) -> tuple[bytes, bytes, bytes]:
            seen.append(turn)
            return (b"", b"503 No", b"") if turn == 2 else (b"", b"200 OK", b"")

        async with answering(answer, lambda turn: 0.2 if turn == 1 else 0.0) as port:
            return await outcomes.probe(port, "/readyz", 0.001, lambda: len(seen) >= 5)

    found = asyncio.run(run())
    assert found.refused == 1
    assert len(found.seconds) == 5
    assert 0.2 <= max(found.seconds) < 2


def test_gaps_and_rates() -> None:
    found = Outcomes([Outcome(0, 0.0, moment, 200, "1", "a") for moment in (1.0, 1.5, 4.0)])
    assert found.longest_gap() == 2.5
    assert found.rate(1.0, 3.0) == 1
    assert found.versions == {"1": 3}
    assert Outcomes().longest_gap() == 0


def load(bundle: Path, images: Path, *arguments: str) -> dict[tuple[str, str], list[str]]:
    """Runs scenarios in their short form and returns what was found by scenario and name."""
    other = bundle.parent / "other"
    if not other.exists():
        from tiny_bundle import write_tiny_bundle

        write_tiny_bundle(other, version="2", seed=1)
    command = [sys.executable, "benchmarks/load.py", *arguments]
    command += ["--bundle", str(bundle), "--other", str(other), "--images", str(images)]
    command += ["--threads", "1", "--saturate", "1", "--seconds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    rows = re.findall(
        r"^\| (\w+) \| \w+ \| (.+?) \| (.*?) \| (.*?) \| (.*?) \|$", done.stdout, re.M
    )
    assert rows, done.stderr
    # A busy machine may miss what is measured in seconds; what is counted holds everywhere.
    assert done.returncode == any(row[4] == "MISSED" for row in rows), done.stderr
    return {(row[0], row[1].partition(" over ")[0]): list(row[2:]) for row in rows}


def held(rows: dict[tuple[str, str], list[str]], scenario: str, *names: str) -> None:
    for name in names:
        assert rows[scenario, name][2] == "held", (scenario, name, rows[scenario, name])


def test_a_few_swaps_under_load_harm_nobody(bundle: Path, images: Path) -> None:
    rows = load(
        *(bundle, images, "swaps", "slow_bodies", "--swaps", "3", "--every", "0.5"),
        *("--connections", "64"),
    )
    held(rows, "swaps", "swaps", "failed requests", "mixed answers", "times not ready")
    assert set(re.findall(r"(\d): \d+", rows["swaps", "versions seen"][0])) == {"1", "2"}
    held(rows, "slow_bodies", "of them told 408", "health refused", "failed requests beside them")


@pytest.mark.chaos
def test_overload_leavers_and_a_soak_in_short(bundle: Path, images: Path) -> None:
    rows = load(
        *(bundle, images, "overload", "leavers", "soak", "--factor", "3", "--requests", "600"),
        *("--swaps", "10"),
    )
    held(rows, "overload", "neither 200 nor 429", "429 without Retry-After", "mixed answers")
    held(rows, "overload", "the longest that one took")
    held(rows, "leavers", "failed requests", "mixed answers", "images still waited for")
    held(rows, "leavers", "answered afterwards")
    held(rows, "soak", "requests", "swaps", "failed requests", "mixed answers")


@pytest.mark.chaos
@pytest.mark.ray
def test_swaps_under_ray_and_its_share_in_short(bundle: Path, images: Path) -> None:
    rows = load(
        *(bundle, images, "swaps", "ray_share", "--side", "ray", "--swaps", "3"),
        *("--every", "0.5", "--rounds", "1"),
    )
    held(rows, "swaps", "swaps", "failed requests", "mixed answers", "times not ready")
    assert float(rows["ray_share", "ray"][0]) > 0
