"""Where a filter cuts: at the lowest threshold that reaches a precision on known captions."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exports.images import ImageSpec
from trainer.data import Example
from trainer.errors import DataError
from trainer.photos import load_all
from trainer.retrieval import Reader


@dataclass(frozen=True, slots=True)
class Threshold:
    """Where to cut, and what that comes to on captions of which the truth is known."""

    value: float
    precision: float
    recall: float


def known_matches(
    reader: Reader, image: ImageSpec, examples: Sequence[Example], *, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns how likely the filter finds true captions, and as many of other images."""
    draw = random.Random(seed)
    flat = [caption for example in examples for caption in example.captions]
    true = [list(example.captions) for example in examples]
    false = []
    for own in true:
        drawn = [text for text in draw.choices(flat, k=20 * len(own)) if text not in own]
        false.append(drawn[: len(own)])
    if not any(false):
        raise DataError("all captions read the same: no threshold can be chosen by them")
    pixels = load_all(examples, image)
    found = reader.probabilities(pixels, [a + b for a, b in zip(true, false, strict=True)])
    parts = [(row[: len(own)], row[len(own) :]) for row, own in zip(found, true, strict=True)]
    return np.concatenate([own for own, _ in parts]), np.concatenate([rest for _, rest in parts])


def choose_threshold(
    true: NDArray[np.float64], false: NDArray[np.float64], *, precision: float, wrong: float
) -> Threshold:
    """Returns the lowest threshold that reaches a precision.

    Args:
        true: how likely true captions were found; (m,).
        false: how likely false ones were; (k,).
        precision: share of what is kept that shall be true.
        wrong: share of false ones among those that will be filtered.

    Raises:
        DataError: none reaches it.
    """
    cuts = np.unique(true)
    recall = 1 - np.searchsorted(np.sort(true), cuts) / len(true)
    passed = 1 - np.searchsorted(np.sort(false), cuts) / len(false)
    reached = (1 - wrong) * recall / ((1 - wrong) * recall + wrong * passed)
    enough = np.flatnonzero(reached >= precision)
    if not len(enough):
        best = int(reached.argmax())
        raise DataError(
            f"no threshold reaches a precision of {precision}: the best is {reached[best]:.3f}, "
            f"which keeps {recall[best]:.0%} of the true captions; ask for less, or train the "
            "filter further"
        )
    place = int(enough[0])
    return Threshold(float(cuts[place]), float(reached[place]), float(recall[place]))
