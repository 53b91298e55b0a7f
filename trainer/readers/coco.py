"""Readers of JSON documents: COCO captions, Karpathy's splits, Label Studio, lists of records."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from trainer.errors import DataError
from trainer.readers.label_studio import is_tasks, read_tasks
from trainer.readers.row import OnFault, Row, captions_of, parse_json, read_text, refuse, row_of


class _CocoImage(BaseModel):
    id: int | str
    file_name: str
    split: str | None = None
    source: str = "human"


class _CocoAnnotation(BaseModel):
    image_id: int | str
    caption: str


class _Coco(BaseModel):
    images: list[_CocoImage]
    annotations: list[_CocoAnnotation]


class _KarpathySentence(BaseModel):
    raw: str


class _KarpathyImage(BaseModel):
    filename: str
    filepath: str = ""
    split: str
    sentences: list[_KarpathySentence]


class _Karpathy(BaseModel):
    images: list[_KarpathyImage]


_Model = TypeVar("_Model", bound=BaseModel)


def _validate(model: type[_Model], document: object, path: Path, kind: str) -> _Model:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(
            f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]
        )
        raise DataError(f"{path}: read as {kind}: {place.lstrip('.')}: {first['msg']}") from None


def read_json(path: Path, on_fault: OnFault = refuse) -> tuple[str, list[Row]]:
    """Returns the kind of a JSON document and its rows."""
    document = parse_json(read_text(path, on_fault), path)
    if is_tasks(document):
        tasks = read_tasks(document, path, on_fault)
        return "Label Studio", [task.row for task in tasks]
    if isinstance(document, list):
        return "JSON records", list(_read_records(document, path, on_fault))
    if isinstance(document, dict) and isinstance(document.get("images"), list):
        if "annotations" in document:
            return "COCO", _read_coco(_validate(_Coco, document, path, "COCO captions"), path)
        return "Karpathy", _read_karpathy(_validate(_Karpathy, document, path, "Karpathy"), path)
    raise DataError(
        f"{path}: neither COCO captions (images and annotations), Karpathy JSON (images with "
        "sentences), Label Studio's tasks nor a list of records"
    )


def _read_records(document: list[object], path: Path, on_fault: OnFault) -> Iterator[Row]:
    for number, record in enumerate(document):
        try:
            yield row_of(record, f"{path}: record {number}")
        except DataError as fault:
            on_fault(fault)


def _read_coco(coco: _Coco, path: Path) -> list[Row]:
    captions: dict[int | str, list[str]] = {}
    for number, image in enumerate(coco.images):
        if image.id in captions:
            raise DataError(f"{path}: images[{number}]: the id {image.id!r} is there twice")
        captions[image.id] = []
    for number, annotation in enumerate(coco.annotations):
        if annotation.image_id not in captions:
            raise DataError(
                f"{path}: annotations[{number}]: no image has the id {annotation.image_id!r}"
            )
        captions[annotation.image_id].extend(captions_of(annotation.caption, str(path)))
    return [
        Row(
            image=image.file_name,
            captions=tuple(captions[image.id]),
            split=image.split,
            source=image.source,
            where=f"{path}: images[{number}]",
        )
        for number, image in enumerate(coco.images)
    ]


def _read_karpathy(dataset: _Karpathy, path: Path) -> list[Row]:
    return [
        Row(
            image=(PurePosixPath(image.filepath) / image.filename).as_posix(),
            captions=tuple(captions_of([item.raw for item in image.sentences], str(path))),
            split=image.split,
            source="human",
            where=f"{path}: images[{number}]",
        )
        for number, image in enumerate(dataset.images)
    ]
