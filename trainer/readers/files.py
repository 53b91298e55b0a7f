"""Readers of folders, name lists, tables and JSONL."""

import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import DataError
from trainer.readers.row import IMAGE_KEYS, Row, find_key, read_text, row_of

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)
# Photographs that Pillow cannot open by itself: worth a word rather than silence.
_FOREIGN_SUFFIXES = frozenset({".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef"})


def read_folder(folder: Path) -> Iterator[Row]:
    """Yields the images of a folder and its subfolders by name, with their sidecar captions."""
    foreign: Counter[str] = Counter()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") or part == "__MACOSX" for part in name.parts):
            continue
        suffix = path.suffix.lower()
        if suffix in _FOREIGN_SUFFIXES:
            foreign[suffix] += 1
        if suffix not in IMAGE_SUFFIXES or not path.is_file():
            continue
        sidecar = path.with_suffix(".txt")
        lines = read_text(sidecar).splitlines() if sidecar.is_file() else []
        captions = tuple(line.strip() for line in lines if line.strip())
        yield Row(name.as_posix(), captions, None, "human", str(path))
    for suffix, count in sorted(foreign.items()):
        logger.warning(
            "%s: skipped %d %s files; convert them to JPEG to use them", folder, count, suffix
        )


def read_list(path: Path) -> Iterator[Row]:
    """Yields the images that a text file names, one a line."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        name, where = line.strip(), f"{path}:{number}"
        if not name:
            continue
        if Path(name).suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(
                f"{where}: {name[:60]!r} is not an image name; a .txt data set holds one image "
                "name a line, or a table whose first line names its columns (image,caption)"
            )
        yield Row(name, (), None, "human", where)


def names_columns(line: str) -> bool:
    """Says whether a line is the header of a table: several columns, one of them the image."""
    columns = [name.strip().strip('"').lower() for name in line.split(_delimiter(line))]
    return len(columns) > 1 and find_key(columns, IMAGE_KEYS) is not None


def _delimiter(header: str) -> str:
    return max("\t,;|", key=header.count)


def read_table(path: Path) -> Iterator[Row]:
    """Yields the rows of a table whose first line names its columns."""
    text = read_text(path)
    delimiter = _delimiter(text.partition("\n")[0])
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        twice = [name for name, count in Counter(header).items() if count > 1]
        if twice:
            raise DataError(
                f"{path}:1: the column {twice[0]!r} is there twice; number such columns, as in "
                "caption_1, caption_2"
            )
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if not any(cells):
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{where}: {len(cells)} columns, but the header has {len(header)} "
                    f"({', '.join(header)}); quote captions that hold {delimiter!r}"
                )
            yield row_of(dict(zip(header, cells, strict=True)), where)
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: {error}; inside a quoted field a quote is doubled"
        ) from None


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yields the rows of a file that holds one JSON object a line."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg}); one object a line") from None
        yield row_of(record, where)
