"""The row that every reader produces, and how a record with named fields becomes one."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import DataError

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


def read_text(path: Path) -> str:
    """Returns a file's text; bytes that are not UTF-8 are named with their line."""
    body = path.read_bytes()
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = body.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte 0x{body[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


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
