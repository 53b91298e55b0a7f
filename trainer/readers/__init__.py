"""The formats of caption data sets, each read into the same rows.

| format   | recognised by                                                                   |
|----------|---------------------------------------------------------------------------------|
| folder   | a folder: its images, recursively, with captions in a `.txt` beside each        |
| COCO     | JSON object with `images` and `annotations`                                     |
| Karpathy | JSON object whose `images` hold `sentences` and `split`                         |
| records  | JSON list of objects, or JSONL: one object a line                               |
| table    | CSV, TSV (also `;` and `|`) with a header; a `.txt` whose header names columns  |
| list     | any other `.txt`: one image name a line, no captions                            |

Columns and keys are found by name, whatever their case. Text must be UTF-8. Every error names
the file and, where the format has lines, the line.
"""

from pathlib import Path

from trainer.errors import DataError
from trainer.readers.coco import read_json
from trainer.readers.files import (
    IMAGE_SUFFIXES,
    names_columns,
    read_folder,
    read_jsonl,
    read_list,
    read_table,
)
from trainer.readers.row import Row, read_text

__all__ = ["IMAGE_SUFFIXES", "Row", "read_rows"]


def read_rows(source: Path) -> tuple[str, list[Row]]:
    """Returns the detected format's name and every row of a data set.

    Raises:
        DataError: The source is missing, is of no known format, or holds no image.
    """
    if source.is_dir():
        kind, rows = "folder", list(read_folder(source))
    elif not source.is_file():
        raise DataError(f"{source}: no such file or folder")
    else:
        kind, rows = _read_file(source)
    if not rows:
        raise DataError(f"{source}: holds no images (read as {kind})")
    return kind, rows


def _read_file(source: Path) -> tuple[str, list[Row]]:
    suffix = source.suffix.lower()
    if suffix == ".json":
        return read_json(source)
    if suffix in {".jsonl", ".ndjson"}:
        return "JSONL", list(read_jsonl(source))
    if suffix in {".csv", ".tsv", ".tab"}:
        return "table", list(read_table(source))
    if suffix == ".txt":
        if names_columns(read_text(source).partition("\n")[0]):
            return "table", list(read_table(source))
        return "list", list(read_list(source))
    raise DataError(
        f"{source}: unknown format {suffix or 'without a suffix'}; "
        "give a folder of images or a .json, .jsonl, .csv, .tsv or .txt file"
    )
