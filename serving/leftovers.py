"""Ends what a server under Ray would leave behind, however that server itself ends.

Ray ends a program whose GCS or raylet is gone without running any `finally` of it, and against
`kill -9` there is none. HAProxy would stay then, hold the port, and answer 503 for ever. So a
process of its own waits for the end of the server, which closes a pipe, and clears away after it.
That process runs this file by its path, and it imports nothing but the standard library.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = "CUTLINE_CLUSTER"
"""Stands in the environment of every process that belongs to a server."""

_PATIENCE_S = 15.0


@contextmanager
def none_left(mark: str, folder: Path) -> Iterator[None]:
    """Ends all processes with a mark, and removes a folder, when the block or this process ends.

    Args:
        mark: The value of `MARK` in their environment; not yet in this process's own.
        folder: Where they have their files.
    """
    waiter = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, mark, str(folder)],
        stdin=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is for the server
    )
    assert waiter.stdin is not None
    try:
        yield
    finally:
        waiter.stdin.close()
        waiter.wait()


def end_marked(mark: str) -> None:
    """Ends the processes with a mark, but for this one: kindly, and after a second by force."""
    number = signal.SIGTERM
    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:  # one that dies may have started another meanwhile
        left = marked(mark)
        if not left:
            return
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        number = signal.SIGKILL
        time.sleep(1.0)


def marked(mark: str) -> list[int]:
    """Returns the processes with a mark, but for this one."""
    wanted = f"{MARK}={mark}".encode()
    return [pid for pid in _others() if wanted in _environment_of(pid)]


def _others() -> list[int]:
    names = (path.name for path in Path("/proc").iterdir())
    return [int(name) for name in names if name.isdecimal() and int(name) != os.getpid()]


def _environment_of(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is not ours
        return []


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)  # it ends when the server has ended
    sys.stdin.buffer.read()
    end_marked(sys.argv[1])
    shutil.rmtree(sys.argv[2], ignore_errors=True)
