"""Data sets: images with captions, read from whatever format they come in.

`read_examples` detects the format (see `trainer.readers`), finds the image files and merges the
captions of each image. What the images hold is checked by `trainer.photos`, which is also where
they are decoded; `trainer.splits` divides examples into a training and a held-out side.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from trainer.config import Config
from trainer.errors import DataError
from trainer.readers import Row, read_rows

# Karpathy's COCO split: "restval" is the part of val2014 that everyone trains on.
_SPLIT_MEMBERS = {"train": frozenset({"train", "restval"})}


@dataclass(frozen=True, slots=True)
class Example:
    """One image with the captions that one source gave it.

    Attributes:
        image: The image file.
        captions: As they were written, blank ones left out; empty for an unlabelled image.
        split: The split that the data set declares, or None.
        source: Who wrote the captions: "human", or what a `source` column says.
    """

    image: Path
    captions: tuple[str, ...]
    split: str | None
    source: str = "human"


class Only(Config):
    """A part of a data set."""

    names: Path | None = None
    """Any file that names images, such as the `picks.csv` of `acquire`: these, in its order."""
    first: int | None = Field(default=None, ge=1)
    """So many of them, the first ones."""


def read_examples(
    source: Path,
    *,
    images: Path | None = None,
    split: str | None = None,
    only: Only | None = None,
) -> list[Example]:
    """Returns the examples of a data set, in file order, one for each image.

    Args:
        source: A folder of images (searched recursively, captions in `photo.txt` beside
            `photo.jpg`, one a line), COCO captions JSON, Karpathy JSON, Label Studio's JSON, CSV or
            TSV, JSONL, a JSON list of records, or a `.txt` list of image names.
        images: The folder that image names are relative to; by default the file's own
            folder, then its `images/` subfolder.
        split: Keeps the examples of this split only; "train" includes Karpathy's "restval".
        only: Keeps a part of these.

    Raises:
        DataError: The file cannot be understood, none of its images exist, the split is unknown,
            or it lacks an image that `only` names. A few missing images are no error here:
            `photos.scan_images` names them.
    """
    kind, rows = read_rows(source)
    _check_splits(rows)
    if split is not None:
        rows = _rows_of_split(source, rows, split)
    roots = [source] if kind == "folder" else image_roots(source, images)
    examples = _merge(rows, roots)
    if not any(example.image.is_file() for example in examples):
        looked = " and ".join(str(root) for root in roots)
        raise DataError(
            f"{source}: none of its {len(examples)} images exist (looked in {looked} for "
            f"{rows[0].image}); name the folder that holds them with `images`"
        )
    if only is not None and only.names is not None:
        examples = _named(source, examples, only.names, roots)
    return examples[: only.first if only is not None else None]


def _named(
    source: Path, examples: list[Example], names: Path, roots: Sequence[Path]
) -> list[Example]:
    """Returns the examples of the images that a file names, in its order."""
    known: dict[Path, list[Example]] = {}
    for example in examples:
        known.setdefault(example.image, []).append(example)
    rows = {locate(row.image, roots): row for row in read_rows(names)[1]}
    if missing := [row for path, row in rows.items() if path not in known]:
        raise DataError(
            f"{missing[0].where}: {missing[0].image} is not in {source}, nor are "
            f"{len(missing) - 1} others of the {len(rows)} images that {names} names"
        )
    return [example for path in rows for example in known[path]]


def _rows_of_split(source: Path, rows: list[Row], split: str) -> list[Row]:
    """Returns the rows of one split; an unknown split lists the ones that exist."""
    wanted = _SPLIT_MEMBERS.get(split, frozenset({split}))
    kept = [row for row in rows if row.split in wanted]
    if not kept:
        declared = sorted({row.split for row in rows if row.split is not None})
        found = f"it has {', '.join(declared)}" if declared else "it declares none: leave it out"
        raise DataError(f"{source}: no image of split {split!r}; {found}")
    return kept


def _check_splits(rows: Iterable[Row]) -> None:
    splits: dict[str, Row] = {}
    for row in rows:
        first = splits.setdefault(row.image, row)
        if first.split != row.split:
            raise DataError(
                f"{row.where}: {row.image} is in split {row.split!r} here but in "
                f"{first.split!r} at {first.where}; one image belongs to one split"
            )


def _merge(rows: Iterable[Row], roots: Sequence[Path]) -> list[Example]:
    """Returns one example for each image and source, captions in file order."""
    merged: dict[tuple[str, str], tuple[Row, list[str]]] = {}
    for row in rows:
        merged.setdefault((row.image, row.source), (row, []))[1].extend(row.captions)
    return [
        Example(
            image=locate(row.image, roots),
            captions=tuple(captions),
            split=row.split,
            source=row.source,
        )
        for row, captions in merged.values()
    ]


def image_roots(source: Path, images: Path | None) -> list[Path]:
    """Returns the folders that the image names of a file may be relative to."""
    return [source.parent, source.parent / "images"] if images is None else [images]


def locate(name: str, roots: Sequence[Path]) -> Path:
    """Returns the first existing candidate, or the first candidate when none exists."""
    return next((root / name for root in roots if (root / name).is_file()), roots[0] / name)


def check_apart(first: Sequence[Example], second: Sequence[Example], one: str, other: str) -> None:
    """Raises DataError where two sets of examples, called `one` and `other`, share an image."""
    known = {example.image.resolve() for example in first}
    shared = [example.image for example in second if example.image.resolve() in known]
    if shared:
        raise DataError(
            f"{len(shared)} images are in both {one} and {other}, such as {shared[0]}; what is "
            "measured must not have been seen: name other files or splits"
        )


def describe(source: Path, examples: Sequence[Example], *, rows: int = 3) -> str:
    """Returns what was understood of a data set: its format, its size and its first rows."""
    kind, _ = read_rows(source)
    captions = sum(len(example.captions) for example in examples)
    lines = [f"{source}: read as {kind}, {len(examples)} images, {captions} captions"]
    for example in examples[:rows]:
        first = repr(example.captions[0]) if example.captions else "no caption"
        more = f" (+{len(example.captions) - 1})" if len(example.captions) > 1 else ""
        tag = f" [{example.split}]" if example.split else ""
        lines.append(f"  {example.image.name}{tag}: {first}{more}")
    return "\n".join(lines)


def write_coco(examples: Sequence[Example], path: Path, *, images: Path | None = None) -> None:
    """Writes examples as COCO captions JSON, the format that every tool of the field reads.

    Reading the file back gives the same examples in the same order.

    Args:
        examples: What to write; ids count from 0 in this order.
        path: The JSON file, replaced at once when it exists.
        images: The folder that file names are made relative to; by default the folder of
            `path`. Images elsewhere keep their absolute path.
    """
    root = (path.parent if images is None else images).resolve()
    coco: dict[str, list[dict[str, object]]] = {"images": [], "annotations": []}
    for number, example in enumerate(examples):
        image = example.image.resolve()
        name = image.relative_to(root) if image.is_relative_to(root) else image
        entry: dict[str, object] = {"id": number, "file_name": name.as_posix()}
        if example.split is not None:
            entry["split"] = example.split
        if example.source != "human":
            entry["source"] = example.source
        coco["images"].append(entry)
        for caption in example.captions:
            annotation = {"id": len(coco["annotations"]), "image_id": number, "caption": caption}
            coco["annotations"].append(annotation)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(coco, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)
