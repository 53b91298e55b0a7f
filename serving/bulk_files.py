"""What bulk captioning leaves on disk: one growing log, and a text file beside each photograph.

The last line of an image counts. A line names the photograph's bytes, the model and how it was
asked, so a later run knows what it need not do again. `python -m trainer` reads the file as it is:
its captions have the model as their source, so that none is taken for a person's.
"""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from exports.disk import append_durably, replace_durably, sync_folder
from serving.errors import LogRefused

_BEGINNING = b'{"image"'  # of every line


@dataclass(frozen=True, slots=True)
class Asked:
    """Who captions, and how: two runs that share it give the same captions."""

    model: str
    version: str
    params: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """One photograph.

    Attributes:
        image: Its path within the folder.
        sha256: Of its bytes; empty where they could not be read.
        captions: Best first; none where it failed.
        scores: Of each caption.
        error: Why it has none; empty if it has.
    """

    image: str
    sha256: str
    captions: tuple[str, ...]
    scores: tuple[float, ...] = ()
    error: str = ""

    @property
    def sidecar(self) -> str:
        """What stands in the text file beside the photograph: a caption a line."""
        return "".join(f"{caption}\n" for caption in self.captions)


class Log:
    """The file's one owner: mends its end, knows what is done, and appends.

    Attributes:
        mended: Whether half a line, of a run that was killed, was taken off the end.
    """

    def __init__(self, path: Path, asked: Asked) -> None:
        """Opens the file, or makes it and its folder; `close` when done.

        Raises:
            LogRefused: Another run writes to it, or it holds something else.
            OSError: It cannot be written.
        """
        self._path = path
        self._asked = asked
        self._done: dict[str, Line] = {}
        self._sidecars: defaultdict[str, set[str]] = defaultdict(set)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise LogRefused(f"{path}: another run writes to it.") from None
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                sync_folder(path.parent)
                self.mended = self._read()
            except BaseException:
                os.close(self._file)
                raise
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        """Lets go of the file."""
        os.close(self._file)
        self._lock.release()

    def done(self, image: str, sha256: str) -> Line | None:
        """Returns the line of a photograph that this model has captioned like this already."""
        line = self._done.get(image)
        return line if line is not None and line.sha256 == sha256 else None

    def append(self, lines: Sequence[Line]) -> None:
        """Appends a group of lines and returns when they are on disk.

        Raises:
            OSError: The disk refuses them; none is there then.
        """
        size = os.fstat(self._file).st_size
        append_durably(self._file, b"".join(self._as_bytes(line) for line in lines), size)
        for line in lines:
            self._sidecars[line.image].add(line.sidecar)

    def put_sidecar(self, photo: Path, line: Line, *, overwrite: bool) -> bool:
        """Writes the text file of a photograph; returns False where that is somebody else's.

        It is ours if it holds what some line of this file says of the photograph.

        Raises:
            OSError: It cannot be read or written.
        """
        path = photo.with_suffix(".txt")
        found = _text(path)
        if found == line.sidecar:
            return True
        if found is not None and not overwrite and found not in self._sidecars[line.image]:
            return False
        replace_durably(path, line.sidecar.encode())
        return True

    def _as_bytes(self, line: Line) -> bytes:
        asked = self._asked
        row = {
            "image": line.image,
            "captions": line.captions,
            "scores": line.scores,
            **({"error": line.error} if line.error else {}),
            "source": f"{asked.model}@{asked.version}",
            "model": asked.model,
            "version": asked.version,
            "params": asked.params,
            "sha256": line.sha256,
        }
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"

    def _read(self) -> bool:
        """Reads what is there; returns whether half a line had to go."""
        whole, newline, half = self._path.read_bytes().rpartition(b"\n")
        for number, text in enumerate(whole.split(b"\n") if newline else (), start=1):
            self._know(text, number)
        if not half:
            return False
        if not (half.startswith(_BEGINNING) or _BEGINNING.startswith(half)):
            raise self._foreign(len(whole.split(b"\n")) + 1 if newline else 1)
        os.ftruncate(self._file, len(whole) + len(newline))
        return True

    def _know(self, text: bytes, number: int) -> None:
        try:
            row = json.loads(text)
            line = Line(
                image=str(row["image"]),
                sha256=str(row["sha256"]),
                captions=tuple(map(str, row["captions"])),
                error=str(row.get("error", "")),
            )
            asked = Asked(row["model"], row["version"], row["params"])
        except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
            raise self._foreign(number) from None
        self._sidecars[line.image].add(line.sidecar)
        if asked == self._asked:
            self._done[line.image] = line
        else:
            self._done.pop(line.image, None)

    def _foreign(self, number: int) -> LogRefused:
        return LogRefused(
            f"{self._path}:{number}: not written by this command; name another file for --out."
        )


def _text(path: Path) -> str | None:
    """Returns what a file holds; None if there is none."""
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        return None
