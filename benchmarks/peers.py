"""The peers of `service.py`: their versions, and how each is started."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from servers import Command

PINS = ("bentoml==1.4.40", "litserve==0.2.19")
BATCHES = (8, 32)
WINDOW_S = 0.005  # LitServe's wait for a batch to fill; BentoML adapts its own
# OpenMP's threads spin while they wait for each other. Alone on their cores that is the fastest; a
# process that speaks HTTP beside them may make a spinning thread keep off the one it waits for.
WAITS = {"spinning": {}, "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"}}


def choices(
    peer: str, python: Path, run: Path, bundle: Path, threads: int
) -> Iterator[tuple[str, Command]]:
    """Yields the settings that a peer is tried with, in words, and how it is started so."""
    for batch, (wait, more) in product(BATCHES, WAITS.items()):
        settings = {
            "PEER_RUN": str(run.resolve()),
            "PEER_BUNDLE": str(bundle.resolve()),
            "PEER_THREADS": str(threads),
            "OMP_NUM_THREADS": str(threads),  # also of threads that PyTorch was not told of
            "PEER_BATCH": str(batch),
            "PEER_WINDOW_S": str(WINDOW_S),
            **more,
        }
        yield f"batches of {batch} at most, threads wait {wait}", _command(peer, python, settings)


def _command(peer: str, python: Path, settings: dict[str, str]) -> Command:
    if peer == "litserve":
        return Command([str(python), "peer_servers.py", "{port}"], "/health", settings)
    serve = ["-m", "bentoml", "serve", "peer_servers:Bento", "--host", "127.0.0.1"]
    home = python.absolute().parents[1] / "bentoml"
    settings |= {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "true"}
    return Command([str(python), *serve, "--port", "{port}"], "/readyz", settings)
