"""What the plain server holds in memory, how soon it is ready, and whether it grows.

    python benchmarks/memory.py --bundle exports/models/cutline-base/2 --images DIR
    python benchmarks/memory.py --bundle exports/models/cutline-base/2 --images DIR --requests 20000

The load changes its shape again and again: allocators hold what the largest batch needed, so what
counts is whether a shape that comes back needs more than it did.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from client import closed_loop, upload
from common import UsageError, as_jpeg, machine, main, parser, photographs, table
from servers import Command, Running, ours, running

from exports.bundle import Bundle
from exports.manifest import Manifest

STARTS = 5
FIRST = 100  # requests before anything is called growth
PHOTOGRAPHS = 32
LONG_SIDES = (96, 320, 640, 1280, 2048)  # pixels of the mixed load's photographs
MAX_BEAMS = 8
CYCLES = 2
SAMPLES = 20  # of the last phase, which gives the slope
HEAD = ("phase", "requests so far", "RSS MB", "growth", "PSS MB", "errors")


@dataclass(frozen=True, slots=True)
class Memory:
    """What a server's processes hold, in MB (10^6 bytes).

    Of a library that other processes map too, PSS counts the share: it is the honest size. But it
    rises when another process ends, so growth is that of RSS.
    """

    rss: float
    pss: float


@dataclass(slots=True)
class Watched:
    """A server under load, and the table's rows about it."""

    server: Running
    rows: list[list[str]]
    sent: int = 0
    before: float | None = None

    def note(self, phase: str, errors: int) -> None:
        """Adds a row with what the server holds now."""
        now = memory_of(self.server.pid)
        growth = "" if self.before is None else f"{now.rss - self.before:+.1f}"
        cells = [f"{now.rss:.1f}", growth, f"{now.pss:.1f}", str(errors)]
        self.rows.append([phase, str(self.sent), *cells])
        self.before = now.rss

    def send(self, requests: Sequence[bytes], clients: int, count: int) -> int:
        """Sends so many requests; returns how many failed."""
        load = closed_loop(
            self.server.port, requests, clients=clients, count=count, first=self.sent
        )
        self.sent += count
        return load.errors


def _benchmark(arguments: argparse.Namespace, stack: ExitStack) -> None:
    if arguments.requests < 2 * SAMPLES:
        raise UsageError(f"--requests must be {2 * SAMPLES} or more")
    manifest = Bundle.open(arguments.bundle).manifest
    paths = photographs(arguments.images, PHOTOGRAPHS)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    command = ours(arguments.bundle, folder / "registry", arguments.threads, ray=False)
    starts = list(_starts(command, arguments.starts - 1))
    with running(command) as server:
        starts.append(server.ready_s)
        watched = Watched(server, [])
        watched.note("ready", 0)
        growth = _phases(watched, paths, manifest, arguments.requests)
    print(f"\n{manifest.name}@{manifest.version}, the plain process\n")
    print(table(HEAD, watched.rows), end="\n\n")
    print(
        f"- from its start to ready: {median(starts):.2f} s, the median of {len(starts)} starts "
        f"({min(starts):.2f} to {max(starts):.2f})\n"
        f"- slope of the last phase: {1000 * growth:+.2f} MB of RSS per 1,000 requests\n"
    )
    print(machine(arguments.threads, "one server", ("onnxruntime", "numpy")))


def _starts(command: Command, count: int) -> Iterator[float]:
    """Yields the seconds until each of `count` servers was ready."""
    for _ in range(count):
        with running(command) as server:
            yield server.ready_s


def _phases(watched: Watched, paths: Sequence[Path], manifest: Manifest, requests: int) -> float:
    """Sends all requests, phase after phase; returns MB a request in the last one."""
    port = watched.server.port
    plain = [upload(port, "/v1/captions", as_jpeg(path)) for path in paths]
    mixed = list(mixed_requests(port, paths, manifest.text.max_length))
    shapes = [("1 client", 1, plain), ("8 clients", 8, plain), ("32 clients", 32, plain)]
    shapes.append(("32 clients, mixed", 32, mixed))
    first = min(FIRST, requests // 5)
    watched.note(f"the first {first}", watched.send(plain, 1, first))
    count = (requests - first) // (CYCLES * len(shapes) + 2)
    for _ in range(CYCLES):
        for name, clients, bodies in shapes:
            watched.note(name, watched.send(bodies, clients, count))
    # The last phase begins where the one before it ended, under the same load.
    points, errors = [], 0
    rest = requests - watched.sent
    for sample in range(SAMPLES):
        part = rest * (sample + 1) // SAMPLES - rest * sample // SAMPLES
        errors += watched.send(mixed, 32, part)
        points.append((watched.sent, memory_of(watched.server.pid).rss))
    watched.note("the same, on and on", errors)
    return slope(points)


def mixed_requests(port: int, paths: Sequence[Path], max_length: int) -> Iterator[bytes]:
    """Yields requests that differ in beams, lengths and sizes; the same ones every time."""
    random = np.random.default_rng(0)
    for path in paths:
        for side in LONG_SIDES:
            beams = random.integers(1, MAX_BEAMS + 1)
            tokens = random.integers(1, max_length)
            query = f"num_beams={beams}&max_new_tokens={tokens}"
            yield upload(port, f"/v1/captions?{query}", as_jpeg(path, long_side=side))


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Returns how much y grows as x grows by one: the least-squares line through (x, y)."""
    x, y = np.array(points, dtype=np.float64).T
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def memory_of(pid: int) -> Memory:
    """Returns what a process and its descendants hold.

    Raises:
        UsageError: The process has ended, or this system has no /proc/PID/smaps_rollup.
    """
    kilobytes = {"Rss": 0, "Pss": 0}
    for process in _family(pid):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
        except OSError as error:
            if process != pid:
                continue  # a child that has ended
            raise UsageError(f"the server's memory cannot be read: {error}") from error
        for line in lines:
            name, _, rest = line.partition(":")
            if name in kilobytes:
                kilobytes[name] += int(rest.split()[0])
    return Memory(*(value * 1024 / 1e6 for value in kilobytes.values()))


def _family(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            for child in task.read_text(encoding="ascii").split():
                yield from _family(int(child))


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--requests", type=int, default=2000)
    arguments.add_argument("--starts", type=int, default=STARTS)
    sys.exit(main(_benchmark, arguments.parse_args()))
