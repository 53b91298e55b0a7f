"""Nearness to what a person accepted, less nearness to what that person turned down: -1 to 1.

A label file says of some images which proposals a person let stand, corrected or replaced. What
was turned down looks good to a model and wrong to a person: no reference tells that.

r(c) = max_a s(c, a) - max_b s(c, b)

over the accepted captions a and the rejected ones b of the image, with s the CIDEr-D against that
one caption, divided by its largest value, 10; without a rejected one the second term is 0. Images
of which the file says nothing, and mirror images, give all captions 0, and so no advantage.

The file is JSONL; the last row of an image counts:

    {"image": "a.jpg", "captions": ["a red bus"], "rejected": ["a red car"]}

Where `rejected` is missing, it is the `proposals` that are not among the captions. Rows without a
caption (skipped images) say nothing. An image is found by its name, or by as much of its path as
the row gives.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from trainer.data import Example
from trainer.errors import ConfigError, DataError
from trainer.metrics.cider import CiderD
from trainer.readers.row import captions_of, read_text, row_of
from trainer.rewards._reward import Floats, Sampled, Sources, marked
from trainer.rewards._reward import Reward as BaseReward

_MOST = 10.0  # of CIDEr-D


class Reward(BaseReward):
    """See the module.

    Raises:
        ConfigError: no label file is named, or none of its images is trained on.
        DataError: it cannot be read, or a name fits two images.
    """

    def __init__(self, sources: Sources) -> None:
        super().__init__(sources)
        if sources.edits is None:
            raise ConfigError(
                "objective.rewards has edits, which reads what people corrected: name a label file "
                "(JSONL with image, captions, rejected) as objective.edits"
            )
        self._judged: dict[int, tuple[list[int], list[int]]] = {}
        texts: list[str] = []
        for example, answer in _answers_of(sources.edits, sources).items():
            ends = np.cumsum([len(texts), len(answer.accepted), len(answer.rejected)]).tolist()
            self._judged[example] = (list(range(*ends[:2])), list(range(*ends[1:])))
            texts += [*answer.accepted, *answer.rejected]
        # Every caption is an image of one reference.
        self._scorer = CiderD([[text] for text in marked(texts)], frequencies=sources.frequencies)

    def scores(self, sampled: Sampled) -> Floats:
        """See `_reward.Reward`."""
        found = np.zeros(len(sampled.texts))
        asked: list[tuple[int, list[int], list[int]]] = []
        for row, example in enumerate(sampled.references):
            if example in self._judged:
                asked.append((row, *self._judged[example]))
        if not asked:
            return found
        marks = sampled.marked
        near = self._scorer.scores(
            [own for _, accepted, rejected in asked for own in (*accepted, *rejected)],
            [marks[row] for row, accepted, rejected in asked for _ in (*accepted, *rejected)],
        )
        start = 0
        for row, accepted, rejected in asked:
            middle, end = start + len(accepted), start + len(accepted) + len(rejected)
            found[row] = near[start:middle].max() - near[middle:end].max(initial=0.0)
            start = end
        return found / _MOST


@dataclass(frozen=True, slots=True)
class Answer:
    """What a person said of the proposals for an image."""

    image: str
    accepted: tuple[str, ...]
    rejected: tuple[str, ...]


def read_answers(path: Path) -> list[Answer]:
    """Returns the last answer on every image of a label file that was not skipped.

    Raises:
        DataError: no such file, or a line of it is broken. A last line that a killed process left
            half written is passed over.
    """
    if not path.is_file():
        raise DataError(f"objective.edits = {path}: no such file")
    last = {answer.image: answer for answer in _read(path)}
    return [answer for answer in last.values() if answer.accepted]


def _read(path: Path) -> Iterator[Answer]:
    *lines, torn = read_text(path).split("\n")
    for number, line in enumerate([*lines, torn], start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record: Any = json.loads(line)
        except json.JSONDecodeError as error:
            if number > len(lines):
                print(f"{where}: half a line, left out")
                return
            raise DataError(f"{where}: not JSON ({error.msg}); one object a line") from None
        row = row_of(record, where)
        fields = {str(key).lower(): value for key, value in record.items()}
        rejected = captions_of(fields.get("rejected"), f"{where}: rejected")
        if "rejected" not in fields:
            proposed = captions_of(fields.get("proposals"), f"{where}: proposals")
            rejected = [text for text in proposed if text not in row.captions]
        yield Answer(row.image, row.captions, tuple(rejected))


def _answers_of(path: Path, sources: Sources) -> dict[int, Answer]:
    """Returns the answers by the number of the example that each is about."""
    answers = read_answers(path)
    by_name: dict[str, list[tuple[int, Example]]] = defaultdict(list)
    for number, example in enumerate(sources.examples):
        by_name[example.image.name].append((number, example))
    found: dict[int, Answer] = {}
    for answer in answers:
        parts = PurePosixPath(answer.image).parts
        fits = [
            number
            for number, example in by_name[parts[-1]]
            if example.image.parts[-len(parts) :] == parts
        ]
        if len(fits) > 1:
            raise DataError(
                f"{path}: {answer.image} may be {len(fits)} of the images trained on; give more of "
                "its path"
            )
        found |= dict.fromkeys(fits, answer)
    if not found:
        raise ConfigError(
            f"objective.edits = {path}: none of its {len(answers)} answered images is trained on"
        )
    print(f"edits: {len(found)} of the {len(answers)} answered images are trained on")
    return found
