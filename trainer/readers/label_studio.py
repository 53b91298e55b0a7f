"""Reader of Label Studio's tasks: its JSON export, and what it imports.

A task is an object whose `data` names an image. `annotations` (`completions` in old versions) hold
what people wrote and `predictions` what a model did: results of the type `textarea`, each with one
text or several. Label Studio, https://labelstud.io/guide/task_format.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from trainer.errors import DataError
from trainer.readers.row import IMAGE_KEYS, OnFault, Row, captions_of, find_key

_UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")  # what Label Studio puts before an uploaded file's name


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        row: The image as its address names it, with the captions that people wrote.
        predictions: Captions that a model wrote, best first.
        skipped: Whether a person had the image and gave it no caption.
    """

    row: Row
    predictions: tuple[str, ...]
    skipped: bool


def is_tasks(document: object) -> bool:
    """Says whether a JSON document is a list of tasks."""
    return (
        isinstance(document, list)
        and bool(document)
        and all(isinstance(one, Mapping) and "data" in one for one in document)
    )


def read_tasks(document: list[object], path: Path, on_fault: OnFault) -> Iterator[Task]:
    """Yields the tasks of a document that `is_tasks`."""
    for number, task in enumerate(document):
        try:
            yield _read_task(task, f"{path}: task {number}")
        except DataError as fault:
            on_fault(fault)


def image_name(address: str) -> str:
    """Returns the image's path that stands in an address.

    `/data/local-files/?d=photos/a.jpg` is `photos/a.jpg`; of other addresses the path counts,
    without the mark that Label Studio gives to an uploaded file.
    """
    parts = urlsplit(address)
    if parts.path.startswith("/data/local-files"):
        return parse_qs(parts.query).get("d", [""])[0]
    is_url = bool(parts.scheme) or parts.path.startswith("/data/")
    folder, slash, name = (unquote(parts.path) if is_url else address).rpartition("/")
    if folder.startswith("/data/upload"):
        return _UPLOAD.sub("", name, count=1)
    return f"{folder}{slash}{name}"


def _read_task(task: object, where: str) -> Task:
    assert isinstance(task, Mapping)
    data = task["data"]
    named = data if isinstance(data, Mapping) else {}
    fields = {str(key).lower(): value for key, value in named.items()}
    key = find_key(fields, IMAGE_KEYS)
    name = image_name(fields[key]) if key and isinstance(fields[key], str) else ""
    if not name:
        raise DataError(f"{where}: data names no image; the key is {' or '.join(IMAGE_KEYS[:3])}")
    written = _entries(task, where, "annotations", "completions")
    kept = [one for one in written if not one.get("was_cancelled")]
    captions = tuple(dict.fromkeys(text for one in kept for text in _texts(one, where)))
    told = _entries(task, where, "predictions")
    predictions = tuple(dict.fromkeys(text for one in told for text in _texts(one, where)))
    row = Row(name, captions, None, "human", where)
    return Task(row, predictions, skipped=bool(written) and not captions)


def _entries(task: Mapping[str, object], where: str, *keys: str) -> list[Mapping[str, object]]:
    value = next((task[key] for key in keys if task.get(key)), [])
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise DataError(f"{where}: {keys[0]} is not a list of objects")
    return value


def _texts(entry: Mapping[str, object], where: str) -> Iterator[str]:
    """Yields the texts of an annotation or a prediction."""
    results = entry.get("result") or []
    if not isinstance(results, list):
        raise DataError(f"{where}: result is not a list")
    for result in results:
        if not isinstance(result, Mapping) or result.get("type") != "textarea":
            continue
        value = result.get("value")
        if not isinstance(value, Mapping):
            raise DataError(f"{where}: a textarea without a value")
        yield from captions_of(value.get("text"), f"{where}: text")
