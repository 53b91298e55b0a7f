"""Whether another bundle fits into the memory that is left, asked before it is read.

Where memory runs out the kernel ends the whole server: a bundle that is too large must be refused
before that. What counts is the smaller of what the machine and the control group have left.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from exports.bundle import read_manifest
from exports.errors import BundleError
from exports.manifest import Manifest

# The files as they are read, the graphs that ONNX Runtime makes of them, and its own copies of
# weights that it lays out anew while it loads.
_TIMES_THE_FILES = 3
_MEMINFO = Path("/proc/meminfo")
_GROUPS = Path("/sys/fs/cgroup")


def check_room(folder: Path) -> None:
    """Raises BundleError if the bundle in a folder is too large to be loaded now."""
    try:
        manifest = Manifest.from_json(read_manifest(folder))
    except OSError as error:
        raise BundleError(f"{error.filename or folder}: {error.strerror}", "registry") from error
    except BundleError as error:
        raise BundleError(f"{folder}: {error}", error.cause) from error
    files = sum(entry.size for entry in manifest.files.values())
    left = free_bytes()
    if left is not None and _TIMES_THE_FILES * files > left:
        raise BundleError(
            f"{folder}: it has {files / 1e6:.0f} MB, and loading it takes"
            f" {_TIMES_THE_FILES} times as much; {left / 1e6:.0f} MB of memory are left",
            "memory",
        )


def free_bytes() -> int | None:
    """Returns how much memory is left for this process; None if nobody says so."""
    return min(_free(), default=None)


def _free() -> Iterator[int]:
    with suppress(OSError, ValueError, LookupError):
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        yield 1024 * int(lines["MemAvailable"].split()[0])
    for folder, limit, usage in _limits():
        with suppress(OSError, ValueError, LookupError):  # "max" is no number: no limit
            allowed, used = (int((folder / name).read_text()) for name in (limit, usage))
            rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = {name: int(value) for name, value in rows}.get("inactive_file", 0)
            yield max(allowed - used + cached, 0)


def _limits() -> Iterator[tuple[Path, str, str]]:
    """Yields where control groups keep their limits: of version 2 from ours upwards, then of 1."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, _, path = line.split(":", 2)
            if number == "0":
                own = _GROUPS / path.lstrip("/")
                for folder in (own, *own.parents):
                    yield folder, "memory.max", "memory.current"
                    if folder == _GROUPS:
                        break
    yield _GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
