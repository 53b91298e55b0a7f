"""Corrections on disk, in the very files that the trainer's labelling writes and its readers read.

    <folder>/answers.jsonl            one JSON object a line, newer ones below, on disk before it
                                      counts; the last one of an image holds all its captions
    <folder>/images/<sha256>.<type>   the photographs, named for their bytes

Several processes of one machine may share a folder: each takes the file's lock for one addition and
first reads what the others have added since.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from errno import EDQUOT, ENOSPC
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock, Timeout

from exports.disk import append_durably, replace_durably, sync_folder
from serving.errors import NotReady, StorageFull
from serving.limits import Budget

ANSWERS = "answers.jsonl"
IMAGES = "images"
_LOCK_S = 2.0
_WAITING = 16  # notes that wait for the disk
_BLOCK = 4096  # a file takes whole blocks of the disk, so many tiny ones count too


@dataclass(frozen=True, slots=True)
class Note:
    """What somebody says of one photograph's caption.

    Attributes:
        caption: What the server had said; empty if not told.
        correction: What it should have said; empty for a rating alone.
        rating: 1, wrong, to 5, right; None if not told.
        request_id: Of the answer that this is about; empty if not told.
        model: Who gave the caption, `name@version`; empty if not told.
    """

    caption: str
    correction: str
    rating: int | None
    request_id: str
    model: str


@dataclass(slots=True)
class _Last:
    revision: int
    captions: list[str]


class FeedbackStore:
    """Keeps corrections within a budget of bytes. Safe from any thread; its work is slow.

    Attributes:
        thread: Where an event loop lets `add` run: a slow disk then holds up nothing else.
        waiting: How many notes may wait for it.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Touches nothing yet.

        Args:
            folder: Is made with the first note.
            max_bytes: What photographs and notes may take of the disk together.
        """
        self.thread = ThreadPoolExecutor(1, "cutline-feedback")
        self.waiting = Budget(_WAITING, "As much feedback waits already as there is room for.")
        self._folder = folder
        self._path = folder / ANSWERS
        self._max_bytes = max_bytes
        self._lock = Lock()
        self._file_id: tuple[int, int] | None = None
        self._read_to = 0
        self._images: dict[str, int] = {}  # bytes by name
        self._last: dict[str, _Last] = {}

    def add(self, image: bytes, suffix: str, note: Note) -> tuple[str, int]:
        """Puts a note and its photograph on disk.

        Returns:
            The photograph's name within `images`, and the number of this answer about it.

        Raises:
            StorageFull: The budget or the disk is; nothing was added.
            NotReady: Another program keeps the file to itself.
        """
        name = f"{sha256(image).hexdigest()}{suffix}"
        with self._lock:
            try:
                (self._folder / IMAGES).mkdir(parents=True, exist_ok=True)
                with FileLock(self._folder / f".{ANSWERS}.lock", timeout=_LOCK_S):
                    return name, self._add(name, image, note)
            except Timeout as error:
                raise NotReady("Another program works on the feedback; try again later.") from error
            except OSError as error:
                if error.errno in (ENOSPC, EDQUOT):
                    raise StorageFull("The disk for feedback is full; nothing was kept.") from error
                raise

    def _add(self, name: str, image: bytes, note: Note) -> int:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            end = self._catch_up(descriptor)
            last = self._last.get(name, _Last(0, []))
            now = _Last(last.revision + 1, [note.correction] if note.correction else last.captions)
            line = json.dumps(_row(name, note, now), ensure_ascii=False).encode() + b"\n"
            fresh = 0 if name in self._images else _on_disk(len(image))
            if end + len(line) + fresh + sum(self._images.values()) > self._max_bytes:
                raise StorageFull(
                    f"Feedback may take {self._max_bytes:,} bytes here and they are taken; "
                    "nothing was kept."
                )
            if fresh:
                replace_durably(self._folder / IMAGES / name, image)
                sync_folder(self._folder / IMAGES)
                self._images[name] = fresh
            append_durably(descriptor, line, end)
            self._read_to = end + len(line)
            self._last[name] = now
            return now.revision
        finally:
            os.close(descriptor)

    def _catch_up(self, descriptor: int) -> int:
        """Reads what is new, takes half a line off the end, and returns where the file ends."""
        state = os.fstat(descriptor)
        if (state.st_dev, state.st_ino) != self._file_id or state.st_size < self._read_to:
            self._file_id, self._read_to, self._last = (state.st_dev, state.st_ino), 0, {}
            self._images = {
                path.name: _on_disk(path.stat().st_size)
                for path in (self._folder / IMAGES).iterdir()
                if path.is_file()
            }
        new = os.pread(descriptor, state.st_size - self._read_to, self._read_to)
        whole, newline, half = new.rpartition(b"\n")
        for line in whole.split(b"\n"):
            with suppress(ValueError, KeyError, TypeError, OSError):  # not one of ours
                self._know(json.loads(line))
        end = self._read_to + len(whole) + len(newline)
        if half:  # a process that was killed left it, and told nobody that it counts
            os.ftruncate(descriptor, end)
        self._read_to = end
        return end

    def _know(self, row: dict[str, Any]) -> None:
        name, captions = str(row["image"]), [str(caption) for caption in row["captions"]]
        self._last[name] = _Last(int(row["revision"]), captions)
        if name not in self._images:
            self._images[name] = _on_disk((self._folder / IMAGES / name).stat().st_size)


def _row(name: str, note: Note, now: _Last) -> dict[str, Any]:
    """Returns a line of the file: what the labelling page writes, and what only a server knows."""
    accepted = bool(note.correction) and note.correction == note.caption
    action = "accept" if accepted else "edit" if note.correction else "skip"
    told = asdict(note)
    return {
        "image": name,
        "captions": now.captions,
        "action": action,
        "proposal": 1 if accepted else None,
        "proposals": [note.caption] if note.caption else [],
        "revision": now.revision,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": "human",
        **{key: told[key] for key in ("rating", "request_id", "model") if told[key]},
    }


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
