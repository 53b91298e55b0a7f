"""The formats of caption data sets, each read into the same rows.

| format   | recognised by                                                                   |
|----------|---------------------------------------------------------------------------------|
| folder   | a folder: its images, recursively, with captions in a `.txt` beside each        |
| COCO     | JSON object with `images` and `annotations`                                     |
| Karpathy | JSON object whose `images` hold `sentences` and `split`                         |
| Studio   | JSON list of Label Studio's tasks, each with `data` that names an image         |
| records  | JSON list of objects, or JSONL: one object a line                               |
| table    | CSV, TSV (also `;` and `|`) with a header; a `.txt` whose header names columns  |
| list     | any other `.txt`: one image name a line, no captions                            |

Columns and keys are found by name, whatever their case. Text must be UTF-8. Every error names
the file and, where the format has lines, the line. Of JSONL that the labelling page wrote, the
last answer of an image counts.
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
from trainer.readers.row import OnFault, Row, refuse

__all__ = ["IMAGE_SUFFIXES", "OnFault", "Row", "read_rows"]


def read_rows(source: Path, on_fault: OnFault = refuse) -> tuple[str, list[Row]]:
    """Returns the detected format's name and every row of a data set.

    Args:
        source: a folder or a file.
        on_fault: told of each line or record that cannot be read; by default the first one is
            raised.

    Raises:
        DataError: The source is missing, is of no known format, or holds no image.
    """
    if source.is_dir():
        kind, rows = "folder", list(read_folder(source))
    elif not source.is_file():
        raise DataError(f"{source}: no such file or folder")
    else:
        kind, rows = _read_file(source, on_fault)
    if not rows:
        raise DataError(f"{source}: holds no images (read as {kind})")
    return kind, rows


def _read_file(source: Path, on_fault: OnFault) -> tuple[str, list[Row]]:
    suffix = source.suffix.lower()
    if suffix == ".json":
        return read_json(source, on_fault)
    if suffix in {".jsonl", ".ndjson"}:
        return "JSONL", list(read_jsonl(source, on_fault))
    if suffix in {".csv", ".tsv", ".tab"}:
        return "table", list(read_table(source, on_fault))
    if suffix == ".txt":
        with source.open("rb") as file:
            first = file.readline().decode("utf-8-sig", "replace")
        if names_columns(first.rstrip("\r\n")):
            return "table", list(read_table(source, on_fault))
        return "list", list(read_list(source, on_fault))
    raise DataError(
        f"{source}: unknown format {suffix or 'without a suffix'}; "
        "give a folder of images or a .json, .jsonl, .csv, .tsv or .txt file"
    )
