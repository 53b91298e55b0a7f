"""What was answered, in a file that only grows: one JSON object a line, on disk before it counts.

The last row of an image is the one that counts. Every row names its revision of the image, 1 for
the first answer, so whoever has not seen the latest one cannot overwrite it.
"""

import logging
import os
from collections import deque
from pathlib import Path
from threading import Lock
from typing import Literal
from unicodedata import category

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exports.disk import sync_folder
from trainer.errors import DataError
from trainer.readers.row import decoded, parse_json, read_lines

ANSWERS = "answers.jsonl"
_RECENT = 50  # answers that pace and the way back are read from

logger = logging.getLogger(__name__)

Action = Literal["accept", "edit", "skip", "clear", "import"]


class Answer(BaseModel):
    """One row.

    Attributes:
        image: Path relative to the photographs' folder.
        captions: All captions that the image has now.
        action: A proposal was accepted, a caption was written or changed, no (further) caption was
            given, all were taken away, or they come from another label file.
        proposal: Number of the accepted proposal, from 1.
        proposals: What the model had proposed; those that are not among the captions were turned
            down.
        revision: 1 for an image's first answer, then one more each time.
        seconds: Spent looking at the image.
        when: ISO 8601, UTC.
        source: Who wrote the captions.
    """

    model_config = ConfigDict(frozen=True)

    image: str = Field(min_length=1)
    captions: tuple[str, ...]
    action: Action
    proposal: int | None = None
    proposals: tuple[str, ...] = ()
    revision: int = Field(ge=1)
    seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    when: str
    source: str = "human"


class Answers:
    """The file's one owner: reads it, mends its end, and adds to it.

    Safe to use from several threads.

    Args:
        folder: of `answers.jsonl`; made if absent.

    Attributes:
        path: The file.
        notes: What was found wrong in the file, each with its line.
        recent: The last answers, oldest first.

    Raises:
        DataError: Another process owns the file.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / ANSWERS
        self.notes: list[str] = []
        self.recent: deque[Answer] = deque(maxlen=_RECENT)
        self._last: dict[str, Answer] = {}
        self._lock = Lock()
        self._owner = FileLock(folder / f".{ANSWERS}.lock", timeout=0, thread_local=False)
        try:
            self._owner.acquire()
        except Timeout:
            raise DataError(
                f"{folder}: another `python -m trainer label` writes there; use its page, or "
                "choose another folder with --out"
            ) from None
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        sync_folder(folder)
        self._mend()
        self._read()

    def close(self) -> None:
        """Lets go of the file, after an answer that is being written; later ones fail."""
        with self._lock:
            os.close(self._file)
            self._file = -1  # not a number that another file may get
        self._owner.release()

    def last(self, image: str) -> Answer | None:
        """Returns the answer of an image that counts."""
        return self._last.get(image)

    def all(self) -> list[Answer]:
        """Returns the answer of every image that has one, by first answer."""
        with self._lock:
            return list(self._last.values())

    def add(self, answer: Answer) -> bool:
        """Puts an answer on disk; returns whether it was the image's next revision.

        If it was not, nothing is written: somebody else has answered in between.

        Raises:
            OSError: The disk refuses it, or the file was moved. Nothing is remembered then.
        """
        with self._lock:
            before = self._last.get(answer.image)
            if answer.revision != (before.revision if before else 0) + 1:
                return False
            self._append(answer.model_dump_json().encode() + b"\n")
            self._remember(answer)
            return True

    def _append(self, line: bytes) -> None:
        size = self._check_place()
        try:
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                line = b"\n" + line  # half a line that could not be taken back stays by itself
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except OSError:
            try:
                os.ftruncate(self._file, size)
            except OSError:
                logger.warning("%s may end in half a line; it will be mended", self.path)
            raise

    def _check_place(self) -> int:
        """Returns the file's size; raises OSError where its name no longer leads to it."""
        here = os.fstat(self._file)
        try:
            there = self.path.stat()
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino):
            raise OSError(
                f"{self.path} was moved, removed or replaced while the page was open; put it back, "
                "or stop and give the same command again"
            )
        return here.st_size

    def _remember(self, answer: Answer) -> None:
        self._last[answer.image] = answer
        self.recent.append(answer)

    def _mend(self) -> None:
        """Ends the file with a whole line; half a line moves to `answers.jsonl.torn`."""
        lines = read_lines(self.path)
        tail, place = lines[-1], f"{self.path}:{len(lines)}"
        if not tail:
            return
        try:
            _parse(tail, self.path, len(lines))
        except DataError:
            torn = self.path.with_name(f"{ANSWERS}.torn")
            with torn.open("ab") as file:
                file.write(tail + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.ftruncate(self._file, os.fstat(self._file).st_size - len(tail))
            self.notes.append(
                f"{place}: half a line, of a write that was cut off; moved to {torn.name}"
            )
        else:
            os.write(self._file, b"\n")
            self.notes.append(f"{place}: the last line had no end; mended")
        os.fsync(self._file)

    def _read(self) -> None:
        lines: dict[str, int] = {}
        for number, line in enumerate(read_lines(self.path), start=1):
            if not line.strip():
                continue
            try:
                answer = _parse(line, self.path, number)
            except DataError as fault:
                self.notes.append(f"{fault}; left where it is, but it does not count")
                continue
            before = self._last.get(answer.image)
            if before is not None and answer.revision <= before.revision:
                self.notes.append(
                    f"{self.path}:{number}: {answer.image} has revision {answer.revision}, which "
                    f"does not follow {before.revision} of line {lines[answer.image]}; the later "
                    "line counts"
                )
                # What follows must differ from all that was given before.
                answer = answer.model_copy(update={"revision": before.revision + 1})
            lines[answer.image] = number
            self._remember(answer)


def _parse(line: bytes, path: Path, number: int) -> Answer:
    where = f"{path}:{number}"
    record = parse_json(decoded(line, where), path, number)
    try:
        return Answer.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(f"{where}: no answer: {key}: {first['msg']}") from None


def cleaned(text: str) -> str:
    """Returns a caption in one line, without control characters and needless blanks."""
    kept = (letter for letter in text if letter.isspace() or category(letter) != "Cc")
    return " ".join("".join(kept).split())
