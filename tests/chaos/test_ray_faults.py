"""What of Ray may be killed under an open load: HAProxy, the controller, the GCS, a whole node."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import ROOT, Start, requests_to
from outcomes import NO_ANSWER, Outcomes, evenly, offer
from processes import CONTROLLER, GCS, HAPROXY, mark_of, marked, settled, until
from servers import Running

from exports.registry import Registry

HERE = Path(__file__).parent
NAMESPACE = ("unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child")
RATE = 10.0

pytestmark = [pytest.mark.chaos, pytest.mark.ray]


def killed(
    server: Running, bodies: list[bytes], title: bytes, back: Callable[[bytes, int], bool]
) -> tuple[Outcomes, float, float]:
    """Kills one process of a server under load, which goes on until 10 s after it is back.

    Returns:
        What came of the requests, when it was killed, and how long it was gone, in seconds.
    """
    mark = mark_of(server.pid)
    pid = settled(mark, title)
    done = asyncio.Event()

    async def killing() -> tuple[float, float]:
        began = time.perf_counter()
        try:
            await asyncio.sleep(3)
            os.kill(pid, signal.SIGKILL)
            at = time.perf_counter() - began
            gone = await until(lambda: back(mark, pid), 60)
            await asyncio.sleep(10)
            return at, gone
        finally:
            done.set()

    async def run() -> tuple[Outcomes, tuple[float, float]]:
        load = offer(
            server.port, requests_to(server, bodies), evenly(RATE, 10**6), stop=done.is_set
        )
        return await asyncio.gather(load, killing())

    found, (at, gone) = asyncio.run(run())
    print(
        f"{dict(found.statuses)}, gone for {gone:.1f} s, p99 {1000 * found.percentile(0.99):.0f} ms"
    )
    return found, at, gone


def another(title: bytes) -> Callable[[bytes, int], bool]:
    """Returns a test of whether there is a process of that title again, and one only."""

    def is_back(mark: bytes, killed: int) -> bool:
        now = marked(mark, title)
        return len(now) == 1 and now != [killed]

    return is_back


def test_haproxy_is_back_within_six_seconds(start: Start, bodies: list[bytes]) -> None:
    server = start("-m", "serving", "up")
    found, at, _ = killed(server, bodies, HAPROXY, another(HAPROXY))
    lost = [one for one in found.all if one.status != 200]
    print(f"answers again {max(one.due for one in lost) - at:.1f} s after it was killed")
    # Nobody listens, or an HAProxy that was not told of replicas yet: it says so, never 404.
    assert {one.status for one in lost} <= {NO_ANSWER, 503}, found.statuses
    assert all(at - 1 < one.due < at + 6 for one in lost)
    assert len(found.good) > 100


def test_a_controller_that_is_killed_costs_no_request(start: Start, bodies: list[bytes]) -> None:
    server = start("-m", "serving", "up")
    found, _, _ = killed(server, bodies, CONTROLLER, another(CONTROLLER))
    assert found.failed == 0, found.statuses
    assert len(found.good) > 100


def test_a_gcs_that_is_killed_costs_no_request_in_ten_seconds(
    start: Start, bodies: list[bytes]
) -> None:
    server = start("-m", "serving", "up")
    mark = mark_of(server.pid)
    found, _, _ = killed(server, bodies, GCS, lambda mark, _: not marked(mark, GCS))
    assert found.failed == 0, found.statuses
    assert len(found.good) > 100
    ended = asyncio.run(until(lambda: not marked(mark)))  # Ray gives up after a minute
    print(f"nothing of it is left {ended:.0f} s later")


def three_nodes(
    fault: str, registry: Registry, bodies: list[bytes], tmp_path: Path
) -> dict[str, object]:
    """Returns what came of requests to a cluster of three nodes, of which one has a fault."""
    if (
        not shutil.which("ip")
        or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode
    ):
        pytest.skip("needs iproute2 and root, or a kernel that lets others make a network")
    folder = tmp_path / "bodies"
    folder.mkdir()
    for number, body in enumerate(bodies):
        (folder / str(number)).write_bytes(body)
    program = [sys.executable, HERE / "three_nodes.py", fault, registry.root, folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with TemporaryDirectory(prefix="cutline-", dir="/tmp", ignore_cleanup_errors=True) as short:
        done = subprocess.run(
            [*NAMESPACE, *program, short],
            capture_output=True,
            text=True,
            timeout=400,
            env=environment,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    print(found)
    return found


@pytest.mark.parametrize("fault", ["lost", "drained"])
def test_a_node_that_goes_costs_no_request(
    fault: str, registry: Registry, bodies: list[bytes], tmp_path: Path
) -> None:
    """Three nodes, a replica on each of the workers: bodies up to a MiB are answered."""
    found = three_nodes(fault, registry, bodies, tmp_path)
    assert found["placed"] == [0, 1, 1]
    assert set(found["statuses"]) == {"200"}, found  # type: ignore[call-overload]
    assert found["statuses"]["200"] > 100  # type: ignore[index]
