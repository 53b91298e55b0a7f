"""The processes of a server under Ray, found by the mark that all of them carry."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from serving.leftovers import MARK

CONTROLLER = b"ray::ServeController"
GCS = b"gcs_server"
HAPROXY = b"/haproxy\0-db"
REPLICA = b"ray::ServeReplica:cutline"


def marked(mark: bytes, title: bytes = b"") -> list[int]:
    """Returns the processes with an entry in their environment, and with words in their title."""
    return sorted(pid for pid, entries, line in _all() if mark in entries and title in line)


def mark_of(pid: int) -> bytes:
    """Returns the mark that a server gave its cluster, from one of its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    entries = [entry for child in children for entry in _environment(int(child))]
    return next(entry for entry in entries if entry.startswith(f"{MARK}=".encode()))


async def until(is_so: Callable[[], bool], within_s: float = 120.0) -> float:
    """Waits until something is so; returns how long that took, in seconds."""
    began = time.monotonic()
    while not await asyncio.to_thread(is_so):
        assert time.monotonic() - began < within_s, "it did not come to be"
        await asyncio.sleep(0.2)
    return time.monotonic() - began


def settled(mark: bytes, title: bytes) -> int:
    """Returns the one process of that title when it has been the only one for two seconds.

    A server that is ready may still be told of its replicas, by another HAProxy each time.
    """
    end, seen, since = time.monotonic() + 30, [0, 0], 0.0
    while len(seen) != 1 or time.monotonic() - since < 2:
        assert time.monotonic() < end, seen
        if (now := marked(mark, title)) != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.1)
    return seen[0]


def _all() -> Iterator[tuple[int, list[bytes], bytes]]:
    for path in Path("/proc").iterdir():
        if path.name.isdecimal() and int(path.name) != os.getpid():
            try:
                line = (path / "cmdline").read_bytes()
            except OSError:
                continue
            yield int(path.name), _environment(int(path.name)), line


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return []
