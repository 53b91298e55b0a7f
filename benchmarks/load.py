"""Swaps, overload, clients that leave or dawdle, and a soak: what a server must bear, measured.

    python benchmarks/load.py swaps --images DIR
    python benchmarks/load.py overload leavers slow_bodies --side ray --images DIR
    python benchmarks/load.py soak --requests 10000 --swaps 200 --images DIR
    python benchmarks/load.py ray_share --images DIR

Each scenario starts a server of its own and prints what was found beside what must hold. The exit
code is 1 if one of them does not. Nothing is kept of images that were encoded, so that a few
photographs are as much work as many.
"""

import argparse
import asyncio
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from client import upload
from common import UsageError, as_jpeg, machine, main, parser, photographs, table
from outcomes import (
    Outcomes,
    evenly,
    offer,
    probe,
    saturate,
    undisturbed,
    who_leaves,
)
from servers import Command, Running, ours, running
from under_load import Served, publish_two, settled, swap_back_and_forth

PATH = "/v1/captions"
CLIENTS = 32  # that saturate a server
STEADY = 0.6  # of what saturates it
LEAVE = 0.3  # of the clients
MOST_A_SECOND = 1500  # that this client offers
GAP_S = 0.2
HEALTH_S = 0.1
SLOWER = 1.5
GOODPUT = 0.9
GROWTH = 0.05
RAY_SHARE = 0.8
STALL_S = 5


@dataclass(frozen=True, slots=True)
class Goal:
    """What must hold, and what was found."""

    what: str
    found: str
    bound: str
    held: bool


def exactly(what: str, found: int, wanted: int) -> Goal:
    """Returns the goal that a count is what it must be."""
    return Goal(what, str(found), str(wanted), found == wanted)


def at_most(what: str, found: float, bound: float, unit: str = "") -> Goal:
    """Returns the goal that a figure is no more than a bound."""
    return Goal(what, f"{found:.3g}{unit}", f"<= {bound:.3g}{unit}", found <= bound)


def at_least(what: str, found: float, bound: float) -> Goal:
    """Returns the goal that a figure is no less than a bound."""
    return Goal(what, f"{found:.3g}", f">= {bound:.3g}", found >= bound)


def note(what: str, found: str) -> Goal:
    """Returns a figure that nothing is demanded of."""
    return Goal(what, found, "", True)


Scenario = Callable[[Served, argparse.Namespace], "asyncio.Future[list[Goal]]"]


async def swaps(served: Served, arguments: argparse.Namespace) -> list[Goal]:
    """Swaps one way and the other under a steady load, after the same load without."""
    count = arguments.swaps or 50
    rate = STEADY * await _saturation(served, arguments)
    moments = evenly(rate, arguments.seconds)
    before = await offer(served.port, served.requests, moments)
    done = asyncio.Event()

    async def swapping() -> list[float]:
        try:
            return await swap_back_and_forth(served, count, arguments.every)
        finally:
            done.set()

    endless = evenly(rate, 10**6)
    took, during, ready = await asyncio.gather(
        swapping(),
        offer(served.port, served.requests, endless, stop=done.is_set),
        probe(served.port, "/readyz", 0.02, done.is_set),
    )
    return [
        note("requests a second, 60 % of saturation", f"{rate:.1f}"),
        exactly("swaps", served.swaps() - 1, count),
        *_unharmed(before, during, served),
        exactly("times not ready", ready.refused, 0),
        at_most("longest gap between answers", during.longest_gap(), GAP_S, " s"),
        note("the same without swaps", f"{before.longest_gap():.3g} s"),
        note("versions seen", ", ".join(f"{v}: {n}" for v, n in sorted(during.versions.items()))),
        note("seconds from promotion to answers, median", f"{median(took):.2f}"),
    ]


async def overload(served: Served, arguments: argparse.Namespace) -> list[Goal]:
    """Offers many times what saturates the server; client and server on cores of their own."""
    peak = await _saturation(served, arguments)
    rate = min(arguments.factor * peak, MOST_A_SECOND)
    memory = served.memory()
    found = await offer(served.port, served.requests, evenly(rate, arguments.seconds))
    codes = found.statuses
    refused = [one for one in found.all if one.status == 429]
    goodput = found.rate(0.2 * arguments.seconds, arguments.seconds)
    latest = max((one.done - one.due for one in found.good), default=math.nan)
    return [
        note("offered", f"{rate:.0f} a second, {rate / peak:.1f} times {peak:.1f}"),
        note("answers", ", ".join(f"{code}: {count}" for code, count in sorted(codes.items()))),
        exactly("neither 200 nor 429", len(found.all) - len(refused) - len(found.good), 0),
        exactly("429 without Retry-After", sum(not one.retry_after for one in refused), 0),
        at_most("the longest that one took", latest, arguments.deadline, " s"),
        at_least("goodput, of the peak", goodput / peak, GOODPUT),
        note("memory", f"{memory / 1e6:.0f} MB, then {served.memory() / 1e6:.0f} MB"),
        exactly("mixed answers", found.mixed(served.expected), 0),
    ]


async def leavers(served: Served, arguments: argparse.Namespace) -> list[Goal]:
    """Lets clients leave in the middle of a request."""
    rate = STEADY * await _saturation(served, arguments)
    before = await offer(served.port, served.requests, evenly(rate, arguments.seconds))
    leave = who_leaves(LEAVE, before.percentile(0.5), seed=0)
    moments = evenly(rate, arguments.seconds)
    during = await offer(served.port, served.requests, moments, leave=leave)
    left = during.statuses[-1]
    return [
        note("left", f"{left} of {len(during.all)}"),
        *_unharmed(before, during, served),
        exactly("images still waited for", await settled(served), 0),
        exactly("answered afterwards", len((await _some(served, 8)).good), 8),
    ]


async def slow_bodies(served: Served, arguments: argparse.Namespace) -> list[Goal]:
    """Sends half of many requests, and asks for the server's health and for captions meanwhile."""
    request = served.requests[0]
    streams = await asyncio.gather(
        *(asyncio.open_connection("127.0.0.1", served.port) for _ in range(arguments.connections))
    )
    for _, writer in streams:
        writer.write(request[: len(request) // 2])

    async def answer(reader: asyncio.StreamReader) -> bytes:
        try:
            async with asyncio.timeout(10 * STALL_S):
                return (await reader.read(65536))[9:12]
        except (OSError, TimeoutError):
            return b""

    done = asyncio.Event()

    async def all_answered() -> list[bytes]:
        try:
            return await asyncio.gather(*(answer(reader) for reader, _ in streams))
        finally:
            done.set()

    answers, health, found = await asyncio.gather(
        all_answered(),
        probe(served.port, "/healthz", 0.05, done.is_set),
        offer(served.port, served.requests, evenly(2.0, 10**6), stop=done.is_set),
    )
    for _, writer in streams:
        writer.close()
    return [
        note("half-sent requests", str(len(streams))),
        exactly("of them told 408", sum(code == b"408" for code in answers), len(streams)),
        exactly("health refused", health.refused, 0),
        at_most("health, the slowest", max(health.seconds), HEALTH_S, " s"),
        exactly("failed requests beside them", found.failed, 0),
        note("requests beside them", str(len(found.all))),
    ]


async def soak(served: Served, arguments: argparse.Namespace) -> list[Goal]:
    """Sends requests and swaps until memory would have grown if anything leaked."""
    count = arguments.swaps or 200
    warm = max(2, count // 10)
    parts: list[Outcomes] = []
    memory: list[int] = []
    for requests, swaps_now in (
        (arguments.requests // 10, warm),
        (arguments.requests - arguments.requests // 10, count - warm),
    ):
        swapping = swap_back_and_forth(served, swaps_now, 0.0)
        loading = saturate(
            served.port, served.requests, clients=4, seconds=math.inf, count=requests
        )
        _, found = await asyncio.gather(swapping, loading)
        parts.append(found)
        await settled(served)
        await asyncio.sleep(1)
        memory.append(served.memory())
    growth = memory[1] / memory[0] - 1
    return [
        exactly("requests", sum(len(part.all) for part in parts), arguments.requests),
        exactly("swaps", served.swaps() - 1, count),
        exactly("failed requests", sum(part.failed for part in parts), 0),
        exactly("mixed answers", sum(part.mixed(served.expected) for part in parts), 0),
        note("memory after a tenth", f"{memory[0] / 1e6:.1f} MB"),
        at_most("growth since", 100 * growth, 100 * GROWTH, " %"),
    ]


async def _saturation(served: Served, arguments: argparse.Namespace) -> float:
    """Returns the captions a second that many clients get, each of which waits for its own."""
    await _some(served, 2 * CLIENTS)
    seconds = arguments.saturate
    found = await saturate(served.port, served.requests, clients=CLIENTS, seconds=seconds)
    if not found.good:
        raise UsageError("the server answers nothing but errors")
    return len(found.good) / max(one.done for one in found.good)


async def _some(served: Served, count: int) -> Outcomes:
    return await saturate(
        served.port, served.requests, clients=CLIENTS, seconds=math.inf, count=count
    )


def _unharmed(before: Outcomes, during: Outcomes, served: Served) -> Iterable[Goal]:
    yield note("requests", str(len(during.all)))
    yield exactly("failed requests", during.failed, 0)
    yield exactly("mixed answers", during.mixed(served.expected), 0)
    slower = during.percentile(0.99) / before.percentile(0.99)
    yield at_most(f"p99 over {1000 * before.percentile(0.99):.0f} ms before", slower, SLOWER)


SCENARIOS = {one.__name__: one for one in (swaps, overload, leavers, slow_bodies, soak)}


def _measured(name: str, arguments: argparse.Namespace) -> list[Goal]:
    """Runs a scenario. A client that overloads has a core of its own: its work is not the server's.

    What offers ten times the load costs as much as many a server answers with; on a core that both
    share, the server would be measured by what the client leaves.
    """
    cores = sorted(os.sched_getaffinity(0))
    apart = name == "overload" and len(cores) > 1
    threads = min(arguments.threads, len(cores) - 1) if apart else arguments.threads
    try:
        if apart:
            os.sched_setaffinity(0, cores[:-1])  # the server inherits it
        command = _command(arguments, arguments.side, threads)
        with running(command) as server, undisturbed():
            if apart:
                os.sched_setaffinity(0, cores[-1:])
            goals = asyncio.run(SCENARIOS[name](_served(arguments, server), arguments))
        return [*goals, note("threads of the engine", str(threads))]
    finally:
        os.sched_setaffinity(0, cores)


def _command(arguments: argparse.Namespace, side: str, threads: int) -> Command:
    environment = {
        "CUTLINE_CACHE_BYTES": "0",
        "CUTLINE_POLL_S": "0.1",
        "CUTLINE_STALL_S": str(STALL_S),
        "CUTLINE_DEADLINE_S": str(arguments.deadline),
    }
    return ours(
        arguments.bundle,
        arguments.registry.root,
        threads,
        ray=side == "ray",
        follow="production",
        environment=environment,
    )


def _ray_share(arguments: argparse.Namespace) -> list[Goal]:
    """Compares captions a second under Ray with those of the plain process, round by round."""
    rates: dict[str, list[float]] = {"plain": [], "ray": []}
    for number in range(arguments.rounds):
        for side in sorted(rates, reverse=bool(number % 2)):
            with running(_command(arguments, side, arguments.threads)) as server:
                served = _served(arguments, server)
                rates[side].append(asyncio.run(_saturation(served, arguments)))
    shares = [ray / plain for ray, plain in zip(rates["ray"], rates["plain"], strict=True)]
    return [
        *(note(f"{side}, captions a second", f"{median(rates[side]):.1f}") for side in rates),
        at_least(f"ray over plain, median of {arguments.rounds}", median(shares), RAY_SHARE),
    ]


def _served(arguments: argparse.Namespace, server: Running) -> Served:
    requests = [upload(server.port, PATH, jpeg) for jpeg in arguments.jpegs]
    return Served(server.port, server.pid, arguments.registry, requests, arguments.expected)


def _benchmark(arguments: argparse.Namespace, stack: ExitStack) -> None:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    arguments.jpegs = [as_jpeg(path) for path in photographs(arguments.images, arguments.count)]
    arguments.registry, arguments.expected = publish_two(
        arguments.bundle, arguments.other, folder, arguments.jpegs
    )
    rows: list[Sequence[str]] = []
    missed = 0
    for name in arguments.scenarios:
        model = next(iter(arguments.registry.models()))
        arguments.registry.promote(model, "1")
        if name == "ray_share":
            side, goals = "both", _ray_share(arguments)
        else:
            side = arguments.side
            goals = _measured(name, arguments)
        missed += sum(not goal.held for goal in goals)
        rows += [(name, side, goal.what, goal.found, goal.bound, _word(goal)) for goal in goals]
        print(f"{name}: done", file=sys.stderr)
    print(table(("scenario", "side", "what", "found", "goal", ""), rows), end="\n\n")
    print(machine(arguments.threads, "one round", ("onnxruntime", "ray", "numpy")))
    if missed:
        raise UsageError(f"{missed} goals were missed")


def _word(goal: Goal) -> str:
    if not goal.bound:
        return ""
    return "held" if goal.held else "MISSED"


if __name__ == "__main__":
    made = parser(__doc__)
    names = (*SCENARIOS, "ray_share")
    made.add_argument(
        "scenarios", nargs="+", choices=names, metavar="SCENARIO", help=", ".join(names)
    )
    made.add_argument("--other", type=Path, help="version 2; default: the same, in fewer words")
    made.add_argument("--side", choices=("plain", "ray"), default="plain")
    made.add_argument("--count", type=int, default=64, help="photographs, at most")
    made.add_argument("--seconds", type=float, default=60.0, help="of a load")
    made.add_argument("--saturate", type=float, default=20.0, help="seconds to find saturation")
    made.add_argument("--swaps", type=int, help="default: 50; of the soak 200")
    made.add_argument("--every", type=float, default=1.0, help="seconds between two swaps")
    made.add_argument("--factor", type=float, default=10.0, help="of the overload")
    made.add_argument("--deadline", type=float, default=30.0, help="the server's, in seconds")
    made.add_argument("--connections", type=int, default=256, help="half-sent requests")
    made.add_argument("--requests", type=int, default=10_000, help="of the soak")
    made.add_argument("--rounds", type=int, default=3, help="of ray_share")
    sys.exit(main(_benchmark, made.parse_args()))
