"""Servers as a user starts them: a command, a port of 127.0.0.1, and a probe that says "ready"."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from common import ROOT, UsageError

from exports.bundle import Bundle

READY_S = 180.0
_STOP_S = 60.0


@dataclass(frozen=True, slots=True)
class Command:
    """How a server is started; `{port}` in the arguments becomes its port."""

    arguments: Sequence[str]
    probe: str
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is ready, and how long that took."""

    pid: int
    port: int
    ready_s: float


def ours(
    bundle: Path,
    registry: Path,
    threads: int,
    *,
    ray: bool,
    follow: str = "1",
    environment: Mapping[str, str] | None = None,
) -> Command:
    """Returns the command of this project's server for a bundle, which is published for it.

    Args:
        bundle: A bundle's folder, in a registry or not.
        registry: A folder for a registry of this server's own.
        threads: CPU threads of the engine.
        ray: Under Ray Serve, or as one plain process.
        follow: The version or alias that is served.
        environment: Settings of this server.
    """
    name = Bundle.open(bundle).manifest.name
    if not registry.exists():
        publish = ("publish", str(bundle), "--registry", str(registry), "--version", "1")
        command = [sys.executable, "-m", "exports", *publish]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment({}))
        if done.returncode:
            raise UsageError(done.stderr.strip().removeprefix("error: "))
    arguments = [sys.executable, "-m", "serving", "up", "--registry", str(registry)]
    arguments += ["--model", f"{name}@{follow}", "--provider", "cpu", "--threads", str(threads)]
    arguments += ["--port", "{port}"] + ([] if ray else ["--local"])
    return Command(arguments, "/readyz", environment or {})


@contextmanager
def running(command: Command) -> Iterator[Running]:
    """Runs a server until the block ends, and leaves no process of it.

    Raises:
        UsageError: It ended, or was not ready in time; the end of what it said is shown.
    """
    port = _free_port()
    arguments = [argument.format(port=port) for argument in command.arguments]
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            arguments,
            cwd=ROOT / "benchmarks",
            env=_environment(command.environment),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all of it can be ended
        )
        try:
            while not _answers(port, command.probe):
                if process.poll() is not None or time.perf_counter() - began > READY_S:
                    log.seek(0)
                    said = log.read()[-2000:].decode(errors="replace")
                    raise UsageError(f"{' '.join(arguments)} is not ready:\n{said}")
                time.sleep(0.01)
            yield Running(process.pid, port, time.perf_counter() - began)
        finally:
            _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    with suppress(ProcessLookupError):  # usually nobody is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """Returns this environment, in which the project is found wherever a server runs."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CUTLINE_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), **more}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
