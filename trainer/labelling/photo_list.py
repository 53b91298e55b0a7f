"""Which photographs there are to label, and which of them come first."""

from collections.abc import Sequence
from pathlib import Path

from trainer.data import image_roots, locate, read_examples
from trainer.errors import DataError
from trainer.labelling.session import Photo
from trainer.readers import read_rows


def read_photos(source: Path, folder: Path | None) -> tuple[list[Photo], Path, list[str]]:
    """Returns the images of a data set that have no caption there.

    Args:
        source: a folder or any data set (see `trainer.data`).
        folder: that image names are relative to; by default found beside the data set.

    Returns:
        The images; the folder that their names are relative to; what was left out, each with its
        line and the reason.

    Raises:
        DataError: the data set cannot be read, or no image is left.
    """
    read_examples(source, images=folder)  # whose errors say what to do
    rows = read_rows(source)[1]
    roots = [source] if source.is_dir() else image_roots(source, folder)
    paths = {row.image: locate(row.image, roots) for row in rows}
    root = _root(roots, [path for path in paths.values() if path.is_file()])
    captioned = {row.image for row in rows if row.captions}
    photos: dict[str, Photo] = {}
    notes = []
    for row in rows:
        path = paths[row.image]
        if row.image in captioned:
            continue
        if reason := _why_not(path, root):
            notes.append(f"{row.where}: {row.image!r} {reason}; left out")
        else:
            name = path.relative_to(root).as_posix()
            photos[name] = Photo(name, path)
    if captioned:
        notes.append(f"{source}: {len(captioned)} images have captions there already; left out")
    if not photos:
        raise DataError(
            f"{source}: none of its {len(paths)} images is left to label" + _first(notes)
        )
    return list(photos.values()), root, notes


def read_picks(path: Path, photos: Sequence[Photo]) -> tuple[list[str], list[str]]:
    """Returns the names that a table of picks gives, in its order, and which it gives in vain.

    Raises:
        DataError: it cannot be read.
    """
    known = {photo.name for photo in photos}
    rows = read_rows(path)[1]
    picks = dict.fromkeys(row.image for row in rows if row.image in known)
    notes = [
        f"{row.where}: {row.image} is not among the images to label; passed over"
        for row in rows
        if row.image not in known
    ]
    return list(picks), notes


def _root(roots: Sequence[Path], paths: Sequence[Path]) -> Path:
    """Returns the innermost folder that all images lie in, the first one if none does."""
    holds_all = [root for root in roots if all(path.is_relative_to(root) for path in paths)]
    return holds_all[-1] if holds_all else roots[0]


def _why_not(path: Path, root: Path) -> str:
    """Returns what keeps an image from being labelled, empty if nothing does."""
    if not path.is_file():
        return f"is not in {root}"
    if not path.is_relative_to(root) or ".." in path.relative_to(root).parts:
        return f"lies outside {root}"
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return "has a name that is not UTF-8: rename it"
    return ""


def _first(notes: Sequence[str]) -> str:
    return f"; the first: {notes[0]}" if notes else ""
