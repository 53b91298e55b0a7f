"""Images with one label each, for probes: a CSV file with the columns `image` and `label`."""

import csv
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

from trainer.data import image_roots, locate
from trainer.errors import DataError
from trainer.readers.row import read_text

_SPLITS = {"train": True, "test": False}


@dataclass(frozen=True, slots=True)
class Labelled:
    """One image with its label.

    Attributes:
        image: The image file.
        label: As it was written.
        known: Whether a probe may learn from it; it is measured on the others.
    """

    image: Path
    label: str
    known: bool


def read_labels(path: Path, *, images: Path | None = None) -> list[Labelled]:
    """Returns the labelled images of a CSV file, in file order.

    A third column, `split`, says "train" or "test"; without it a hash of the image's name puts
    about half of the images on either side, the same half every time.

    Args:
        path: The CSV file, with a header.
        images: The folder that image names are relative to; by default the file's own folder, then
            its `images/` subfolder.

    Raises:
        DataError: A column or a value is missing, a split is neither of the two, or an image is
            there twice.
    """
    roots = image_roots(path, images)
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), skipinitialspace=True)
    columns = reader.fieldnames or []
    if not {"image", "label"} <= set(columns):
        raise DataError(f"{path}:1: columns {', '.join(columns)}; it needs image and label")
    found: dict[str, Labelled] = {}
    for row in reader:
        where, name, label = f"{path}:{reader.line_num}", row["image"], row["label"]
        if not name or not label:
            raise DataError(f"{where}: image or label is empty")
        if name in found:
            raise DataError(f"{where}: {name} is there twice; an image has one label")
        known = _half(name) if "split" not in row else _SPLITS.get(row["split"])
        if known is None:
            raise DataError(f"{where}: split is {row['split']!r}; expected train or test")
        found[name] = Labelled(locate(name, roots), label, known)
    return list(found.values())


def _half(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 0
