"""Servers as processes, with the load of the benchmarks: what kills one must not kill the test."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests" / "serving")]

from client import upload  # noqa: E402
from servers import Command, Running, running  # noqa: E402
from tiny_bundle import picture, write_tiny_bundle  # noqa: E402

from exports.registry import Registry  # noqa: E402 - the benchmarks and tests are found now

Start = Callable[..., Running]


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two bundles of the model `tiny`, with different captions."""
    root = tmp_path_factory.mktemp("bundles")
    return [
        write_tiny_bundle(root / str(seed), version=str(seed + 1), seed=seed) for seed in range(2)
    ]


@pytest.fixture
def registry(tmp_path: Path, bundles: list[Path]) -> Registry:
    """A registry with both, of which version 1 is in production."""
    registry = Registry(tmp_path / "models")
    for bundle in bundles:
        registry.publish(bundle)
    registry.promote("tiny", "1")
    return registry


@pytest.fixture
def start(registry: Registry) -> Iterator[Start]:
    """Starts a server that follows the registry; it ends with the test."""
    with ExitStack() as stack:

        def start(*program: str, **settings: object) -> Running:
            chosen = {"registry": registry.root, "model": "tiny", "threads": 1, **settings}
            environment = {f"CUTLINE_{name.upper()}": str(value) for name, value in chosen.items()}
            environment |= {"CUTLINE_PROVIDER": "cpu", "CUTLINE_POLL_S": "0.1"}
            command = [sys.executable, *program, "--port", "{port}"]
            return stack.enter_context(running(Command(command, "/readyz", environment)))

        yield start


@pytest.fixture(scope="session")
def bodies() -> list[bytes]:
    """Photographs of some KB, and one of nearly a MiB."""
    small = [picture(seed) for seed in range(7)]
    noise = os.urandom(1)  # a comment of so many bytes pads a JPEG to any size
    jpeg = picture(7, format="JPEG")
    padding = b"".join(b"\xff\xfe\xff\xff" + noise * 65533 for _ in range(14))
    return [*small, jpeg[:2] + padding + jpeg[2:]]


def requests_to(server: Running, bodies: list[bytes]) -> list[bytes]:
    """Returns whole requests."""
    return [upload(server.port, "/v1/captions", body) for body in bodies]
