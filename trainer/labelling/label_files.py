"""Labels made elsewhere become answers, and answers become files that other tools read."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from trainer.data import Example, write_coco
from trainer.labelling.answers import Answers, cleaned
from trainer.labelling.session import Photo, Session
from trainer.readers import read_rows
from trainer.readers.label_studio import Task, is_tasks, read_tasks
from trainer.readers.row import OnFault, parse_json, read_text


@dataclass(slots=True)
class Labels:
    """What a label file says of the photographs, by their numbers.

    Attributes:
        captions: What people wrote.
        skipped: Photographs that a person had and did not caption.
        proposals: What others wrote.
        notes: Each line that was left out, with the reason, and photographs that are there twice.
    """

    captions: dict[int, list[str]] = field(default_factory=dict)
    skipped: set[int] = field(default_factory=set)
    proposals: dict[int, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_labels(path: Path, photos: Sequence[Photo], folder: Path) -> Labels:
    """Returns what a label file says; a fault of one line leaves the others as they are.

    Args:
        path: Any data set with captions (see `trainer.readers`).
        photos: What is labelled here.
        folder: Of the photographs.

    Raises:
        DataError: Nothing of the file can be read.
    """
    found = Labels()
    numbers = {photo.name: number for number, photo in enumerate(photos)}
    places: dict[int, str] = {}
    tasks, addresses = _tasks(path, lambda fault: found.notes.append(f"{fault}; left out"))
    for task in tasks:
        row = task.row
        names = [*_names(row.image, path, folder), *(_endings(row.image) if addresses else ())]
        number = next((numbers[name] for name in names if name in numbers), None)
        if number is None:
            found.notes.append(f"{row.where}: {row.image} {_why_not(row.image, folder)}; left out")
            continue
        _add(found.proposals, number, task.predictions)
        if row.source != "human":
            _add(found.proposals, number, row.captions)
        elif row.captions:
            first = places.setdefault(number, row.where)
            if first != row.where:
                found.notes.append(f"{row.where}: {row.image} is at {first} too; both are kept")
            _add(found.captions, number, row.captions)
        elif task.skipped:
            found.skipped.add(number)
    if not found.captions:
        found.notes.append(f"{path}: no caption that a person wrote of an image here")
    return found


def take_over(labels: Labels, session: Session) -> tuple[int, list[str]]:
    """Stores labels as answers where there is none; returns how many, and what was kept instead."""
    count, notes = 0, []
    for number in sorted(labels.captions.keys() | labels.skipped):
        name = session.photos[number].name
        captions = labels.captions.get(number, [])
        last = session.answers.last(name)
        if last is None:
            session.answer(number, "import" if captions else "skip", captions, revision=0)
            count += 1
        elif captions and list(last.captions) != captions:
            notes.append(f"{name}: has been answered here otherwise ({last.when}), which stays")
    return count, notes


def export_coco(path: Path, answers: Answers, folder: Path) -> None:
    """Writes what has captions as COCO captions JSON, names relative to `folder`."""
    examples = [
        Example(folder / one.image, one.captions, None, one.source)
        for one in answers.all()
        if one.captions
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_coco(examples, path, images=folder)


def _tasks(path: Path, on_fault: OnFault) -> tuple[Iterator[Task], bool]:
    """Returns what a file holds, and whether its images are addresses of Label Studio."""
    if path.suffix.lower() == ".json" and path.is_file():
        document = parse_json(read_text(path), path)
        if is_tasks(document):
            return read_tasks(document, path, on_fault), True
    return (Task(row, (), skipped=False) for row in read_rows(path, on_fault)[1]), False


def _add(found: dict[int, list[str]], number: int, captions: Sequence[str]) -> None:
    known = found.setdefault(number, [])
    known += [one for one in dict.fromkeys(map(cleaned, captions)) if one and one not in known]


def _names(image: str, file: Path, folder: Path) -> Iterator[str]:
    """Yields what an image of a label file may be called here, likeliest first."""
    root = folder.absolute()
    for base in (root, file.absolute().parent):
        place = Path(os.path.normpath(base / image))
        if place.is_relative_to(root):
            yield place.relative_to(root).as_posix()


def _endings(image: str) -> Iterator[str]:
    """Yields the path without its first folder, without its first two, ...: roots differ."""
    parts = PurePosixPath(image).parts
    yield from ("/".join(parts[start:]) for start in range(1, len(parts)))


def _why_not(image: str, folder: Path) -> str:
    root = folder.absolute()
    place = Path(os.path.normpath(root / image))
    if not place.is_relative_to(root):
        return f"lies outside {folder}"
    return "is not among the images to label" if place.is_file() else f"is not in {folder}"
