"""Readers of folders, name lists, tables and JSONL."""

import csv
import io
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import DataError
from trainer.readers.row import (
    IMAGE_KEYS,
    OnFault,
    Row,
    decoded,
    find_key,
    parse_json,
    read_lines,
    read_text,
    refuse,
    row_of,
)

if TYPE_CHECKING:
    import _csv

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


def read_list(path: Path, on_fault: OnFault = refuse) -> Iterator[Row]:
    """Yields the images that a text file names, one a line."""
    for number, line in enumerate(read_text(path, on_fault).splitlines(), start=1):
        name, where = line.strip(), f"{path}:{number}"
        if not name:
            continue
        if Path(name).suffix.lower() not in IMAGE_SUFFIXES:
            on_fault(
                DataError(
                    f"{where}: {name[:60]!r} is not an image name; a .txt data set holds one image "
                    "name a line, or a table whose first line names its columns (image,caption)"
                )
            )
            continue
        yield Row(name, (), None, "human", where)


def names_columns(line: str) -> bool:
    """Says whether a line is the header of a table: several columns, one of them the image."""
    columns = [name.strip().strip('"').lower() for name in line.split(_delimiter(line))]
    return len(columns) > 1 and find_key(columns, IMAGE_KEYS) is not None


def _delimiter(header: str) -> str:
    return max("\t,;|", key=header.count)


def read_table(path: Path, on_fault: OnFault = refuse) -> Iterator[Row]:
    """Yields the rows of a table whose first line names its columns.

    Raises:
        DataError: The header names a column twice, which leaves no row readable.
    """
    text = read_text(path, on_fault)
    delimiter = _delimiter(text.partition("\n")[0])
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    header = [name.strip().lower() for name in next(_records(reader, path, on_fault), [])]
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise DataError(
            f"{path}:1: the column {twice[0]!r} is there twice; number such columns, as in "
            "caption_1, caption_2"
        )
    for cells in _records(reader, path, on_fault):
        if not any(cells):
            continue
        try:
            yield _row_of_cells(header, cells, f"{path}:{reader.line_num}", delimiter)
        except DataError as fault:
            on_fault(fault)


def _records(reader: "_csv.Reader", path: Path, on_fault: OnFault) -> Iterator[list[str]]:
    """Yields the records that can be told apart; a faulty one ends with its line."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            where = f"{path}:{reader.line_num}"
            on_fault(DataError(f"{where}: {error}; inside a quoted field a quote is doubled"))


def _row_of_cells(header: list[str], cells: list[str], where: str, delimiter: str) -> Row:
    if len(cells) != len(header):
        raise DataError(
            f"{where}: {len(cells)} columns, but the header has {len(header)} "
            f"({', '.join(header)}); quote captions that hold {delimiter!r}"
        )
    return row_of(dict(zip(header, cells, strict=True)), where)


def read_jsonl(path: Path, on_fault: OnFault = refuse) -> Iterator[Row]:
    """Yields the rows of a file that holds one JSON object a line.

    Of an image's answers (see `is_answer`) the last one counts, and half a line at the file's end
    is what a process that was killed left behind: worth a warning, no fault.
    """
    answers: dict[str, Row] = {}
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = parse_json(decoded(line, where), path, number)
            row = row_of(record, where)
        except DataError as fault:
            if answers and number == len(lines):
                logger.warning("%s; left out, for its writing was cut off", fault)
            else:
                on_fault(fault)
            continue
        if is_answer(record):
            answers[row.image] = row
        else:
            yield row
    yield from answers.values()


def is_answer(record: Mapping[str, object]) -> bool:
    """Says whether a record is an answer given on the labelling page, newer ones below."""
    return "action" in record and "revision" in record
