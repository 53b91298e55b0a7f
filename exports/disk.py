"""Files that are on disk when a function returns, whole or not at all; one writer at a time."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_log = logging.getLogger(__name__)


def write_durably(path: Path, body: bytes, *, mode: int = 0o666) -> None:
    """Writes a file, new ones with `mode` less the umask, and waits until the disk has it."""
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, body: bytes, *, mode: int = 0o666) -> None:
    """Puts a file in its place, or in that of an older one, all or nothing.

    For one writer at a time: what a killed one left beside it is overwritten. Whether the disk has
    the new name is told by `sync_folder` or `settle_folder`.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_durably(partial, body, mode=mode)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def append_durably(descriptor: int, body: bytes, end: int) -> None:
    """Appends to a file that ends at `end` and waits until the disk has it, or takes it back."""
    try:
        while body:
            body = body[os.write(descriptor, body) :]
        os.fsync(descriptor)
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, end)
        raise


def sync_folder(path: Path) -> None:
    """Waits until the disk has the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def settle_folder(path: Path) -> None:
    """Waits until the disk has a rename in `path`, which everyone sees already.

    There is no way back from it, so a disk that does not confirm it is worth a warning, no more:
    after a power cut either the old name or the new one is there, and both are complete.
    """
    try:
        sync_folder(path)
    except OSError as error:
        _log.warning("%s is changed, but the disk did not confirm it: %s", path, error.strerror)


@contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Lets one writer at a time change the files of a folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
