"""The row that every reader produces, and how a record with named fields becomes one."""

import codecs
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import DataError

OnFault = Callable[[DataError], None]
"""Told of each line that cannot be read; if it returns, reading goes on with the next one."""
IMAGE_KEYS = (
    *("image", "file_name", "filename", "filepath", "file_path", "image_path", "image_file"),
    *("image_name", "path", "file", "img"),
)
_CAPTION_KEY = re.compile(r"(captions?|texts?|sentences?|descriptions?|comments?)[ _]?\d*")
_SPLIT_KEYS = ("split", "subset")
_SOURCE_KEY = "source"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a data set, before image names are resolved and captions merged.

    Attributes:
        image: The image's name as written: relative to a folder that is known later.
        captions: Captions of this row as written, blank ones left out.
        split: The declared split, or None.
        source: Who wrote the captions.
        where: File and line (or record), for error messages.
    """

    image: str
    captions: tuple[str, ...]
    split: str | None
    source: str
    where: str


def refuse(fault: DataError) -> None:
    """Raises the fault, so that a file is read whole or not at all."""
    raise fault from None


def read_lines(path: Path) -> list[bytes]:
    """Returns a file's lines as they are, without their ends and without a byte order mark."""
    return path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")


def decoded(line: bytes, where: str) -> str:
    """Returns a line's text.

    Raises:
        DataError: It is not UTF-8.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte 0x{line[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def read_text(path: Path, on_fault: OnFault = refuse) -> str:
    """Returns a file's text; lines that are not UTF-8 are named, and blank in the text."""
    lines = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            lines.append(decoded(line, f"{path}:{number}"))
        except DataError as fault:
            on_fault(fault)
            lines.append("")  # the lines that follow keep their numbers
    return "\n".join(lines)


def parse_json(text: str, path: Path, line: int | None = None) -> Any:
    """Returns the JSON document that a file, or line `line` of it, holds.

    Raises:
        DataError: It is none, or an object has a key twice, of which one value would be lost.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{line or error.lineno}: not JSON ({error.msg})") from None
    except (_Repeated, RecursionError) as error:
        reason = str(error) if isinstance(error, _Repeated) else "nested too deeply"
        place = path if line is None else f"{path}:{line}"
        raise DataError(f"{place}: {reason}") from None


class _Repeated(Exception):
    """An object has a key twice."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Repeated(f"the key {twice!r} is there twice in an object; make its values a list")
    return found


def find_key(names: Collection[str], wanted: tuple[str, ...]) -> str | None:
    """Returns the first wanted name that is there; names are lower-case."""
    return next((name for name in wanted if name in names), None)


def row_of(record: object, where: str) -> Row:
    """Returns the row of one record whose keys name image, captions, split and source."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object with an image and captions")
    fields = {str(key).strip().lower(): value for key, value in record.items()}
    key = find_key(fields, IMAGE_KEYS)
    if key is None:
        found = ", ".join(fields)
        raise DataError(f"{where}: no image among ({found}); name it {' or '.join(IMAGE_KEYS)}")
    image = fields[key]
    if not isinstance(image, str) or not image.strip():
        raise DataError(f"{where}: {key} is {image!r}; expected an image name")
    captions = [
        caption
        for name, value in fields.items()
        if _CAPTION_KEY.fullmatch(name)
        for caption in captions_of(value, f"{where}: {name}")
    ]
    split_key = find_key(fields, _SPLIT_KEYS)
    split = str(fields[split_key] or "").strip() if split_key else ""
    origin = str(fields.get(_SOURCE_KEY) or "").strip()
    return Row(image.strip(), tuple(captions), split or None, origin or "human", where)


def captions_of(value: object, where: str) -> list[str]:
    """Returns the captions in a string, a list, or a list of {"raw": ...} objects."""
    if value is None:
        return []
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise DataError(f"{where}: {value!r} holds half of a surrogate pair; it is cut off")
        return [value] if value.strip() else []
    if isinstance(value, Mapping):
        inner = value.get("raw", value.get("caption"))
        if isinstance(inner, str):
            return captions_of(inner, where)
    if isinstance(value, list):
        return [caption for item in value for caption in captions_of(item, where)]
    raise DataError(f"{where}: {value!r} is neither a caption nor a list of captions")
