"""One metrics page for all replicas of a node, whichever of them is asked.

A scrape goes through a load balancer to any replica, so each must speak for all. Every replica
writes its page to a folder of the node, again and again, each by one rename; whoever is asked
writes its own and merges what is there. Replicas differ by the label `replica`, a number that its
holder locks: who comes after a dead one takes its number over, and Prometheus sees counters that
were reset, as it does with any restart. What a replica has not written for a few seconds is left
out.

Nothing is ever served that was not written before, so no counter goes back, whoever answers.
"""

import fcntl
import logging
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

logger = logging.getLogger(__name__)

_MOST = 256
"""Replicas on a node: a number beyond is a fault, not a machine."""


def node_folder() -> Path:
    """Returns where the replicas of this node meet if no setting says so: one folder a user."""
    return Path(tempfile.gettempdir()) / f"cutline-metrics-{os.getuid()}"


class NodePages:
    """The metrics page of this process, and those of the others on the node. Safe from any thread.

    Without a folder, or where it cannot be used, it speaks for this process alone.
    """

    def __init__(
        self,
        own: Callable[[str], bytes],
        folder: Path | None,
        *,
        every_s: float = 1.0,
        fresh_s: float = 5.0,
    ) -> None:
        """Does nothing before `start`.

        Args:
            own: Returns this process's page in Prometheus' text format, labelled `replica` as said.
            folder: Where the replicas of this node meet; made if it is not there.
            every_s: Seconds between two writes.
            fresh_s: Seconds after which a page that was not written again is left out.
        """
        self._own = own
        self._folder = folder
        self._every_s = every_s
        self._fresh_ns = int(fresh_s * 1e9)
        self._replica, self._lock_file = "0", -1
        self._is_failing = False
        self._writing = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="cutline-metrics", daemon=True)

    @property
    def replica(self) -> str:
        """The number of this process among the replicas of the node."""
        return self._replica

    def start(self) -> None:
        """Takes a number and begins to write; never raises."""
        if self._folder is None:
            return
        try:
            self._replica, self._lock_file = _claimed(self._folder)
        except OSError as error:
            logger.error("metrics are of this process alone: %s: %s", self._folder, error)
            self._folder = None
            return
        self._thread.start()

    def close(self) -> None:
        """Leaves the node's page at once."""
        self._closing.set()
        if self._folder is None or self._lock_file < 0:
            return
        self._thread.join()
        with self._writing:
            _path(self._folder, self._replica).unlink(missing_ok=True)
            os.close(self._lock_file)
            self._lock_file = -1

    def page(self) -> bytes:
        """Returns the page of all replicas of this node that live."""
        own = self._write()
        if self._folder is None:
            return own
        others = _read_fresh(self._folder, self._fresh_ns)
        others[int(self._replica)] = own
        return merged([others[number] for number in sorted(others)])

    def _write_on(self) -> None:
        while not self._closing.wait(self._every_s):
            self._write()

    def _write(self) -> bytes:
        """Writes and returns this process's page."""
        with self._writing:  # pages are written in the order in which they are made
            own = self._own(self._replica)
            if self._folder is None or self._lock_file < 0:
                return own
            try:
                half = self._folder / f".{self._replica}.half"
                half.write_bytes(b"%d\n%b" % (time.monotonic_ns(), own))
                half.replace(_path(self._folder, self._replica))
                self._is_failing = False
            except OSError as error:
                if not self._is_failing:
                    logger.error("other replicas cannot see these metrics: %s", error)
                self._is_failing = True
            return own


def merged(pages: Sequence[bytes]) -> bytes:
    """Returns pages in Prometheus' text format as one, in which no family stands twice."""
    heads: dict[bytes, list[bytes]] = {}
    samples: dict[bytes, list[bytes]] = {}
    for page in pages:
        family = b""
        for line in page.splitlines():
            if line.startswith(b"# HELP "):
                family = line.split(b" ", 3)[2]
                known = heads.setdefault(family, [])
                is_known = bool(known)
            if line.startswith(b"#"):
                if not is_known:
                    known.append(line)
            else:
                samples.setdefault(family, []).append(line)
    lines = (line for name in heads for line in (*heads[name], *samples.get(name, ())))
    return b"\n".join((*lines, b""))


def _claimed(folder: Path) -> tuple[str, int]:
    """Returns the lowest number that no living replica holds, and the locked file that holds it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError("not a folder that this user alone may write to")
    for number in count():
        if number == _MOST:
            raise OSError(f"{_MOST} replicas are here already")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(folder / f"{number}.lock", flags, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        _path(folder, str(number)).unlink(missing_ok=True)  # a dead one's
        return str(number), lock
    raise AssertionError


def _read_fresh(folder: Path, fresh_ns: int) -> dict[int, bytes]:
    """Returns the pages that were written of late, by replica.

    Age is told by the monotonic clock, which all processes of a machine share and nobody sets.
    """
    found = {}
    for number in range(_MOST):
        path = _path(folder, str(number))
        with suppress(OSError, ValueError):  # gone, or from before this machine's last start
            written, _, page = path.read_bytes().partition(b"\n")
            # The time is taken after the read: a page may be written meanwhile.
            if 0 <= time.monotonic_ns() - int(written) <= fresh_ns:
                found[number] = page
    return found


def _path(folder: Path, replica: str) -> Path:
    return folder / f"{replica}.prom"
