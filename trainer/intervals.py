"""Bootstrap confidence intervals of corpus metrics, and of the difference of two systems.

Efron 1979, https://doi.org/10.1214/aos/1176344552, the percentile interval: images are drawn with
replacement, as many as there are, and the corpus figure is computed anew from their statistics.
BLEU is thus recomputed from summed counts; CIDEr-D keeps the document frequencies of the whole
corpus. Koehn 2004, https://aclanthology.org/W04-3250, for the paired difference: both systems are
scored on the same draws, so what is hard about an image cancels out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError
from trainer.metrics._scores import Scores

_DRAWS_AT_ONCE = 128  # keeps the count matrix of 10,000 images at ten megabytes


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with the bounds of its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside: for a difference, whether it is significant at this level."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        """Returns, for instance, "0.561 [0.534, 0.589]"."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    scores: Scores, *, seed: int = 0, draws: int = 1000, level: float = 0.95
) -> dict[str, Interval]:
    """Returns each corpus figure with its interval; nan bounds for a figure that is nan."""
    resampled = np.concatenate(
        [
            scores.combine(counts @ scores.statistics, len(scores.statistics))
            for counts in resamples(len(scores.statistics), draws, seed)
        ]
    )  # (draws, F)
    return _intervals(scores.corpus, resampled, level)


def paired_difference(
    first: Scores, second: Scores, *, seed: int = 0, draws: int = 1000, level: float = 0.95
) -> dict[str, Interval]:
    """Returns first minus second of each corpus figure, both scored on the same images.

    Raises:
        DataError: The two are of different metrics or of different numbers of images.
    """
    images = len(first.statistics)
    if first.names != second.names or images != len(second.statistics):
        raise DataError(
            f"cannot pair {', '.join(first.names)} of {images} images with "
            f"{', '.join(second.names)} of {len(second.statistics)}: score the same images"
        )
    resampled = np.concatenate(
        [
            first.combine(counts @ first.statistics, images)
            - second.combine(counts @ second.statistics, images)
            for counts in resamples(images, draws, seed)
        ]
    )  # (draws, F)
    other = second.corpus
    difference = {name: value - other[name] for name, value in first.corpus.items()}
    return _intervals(difference, resampled, level)


def resamples(images: int, draws: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Yields blocks of draws (d, n): how often each of n images occurs in each draw."""
    generator = np.random.default_rng(seed)
    for start in range(0, draws, _DRAWS_AT_ONCE):
        block = min(_DRAWS_AT_ONCE, draws - start)
        chosen = generator.integers(images, size=(block, images))
        chosen += np.arange(block)[:, None] * images  # a separate range of bins for each draw
        counts = np.bincount(chosen.ravel(), minlength=block * images)
        yield counts.reshape(block, images).astype(np.float64)


def _intervals(
    values: dict[str, float], resampled: NDArray[np.float64], level: float
) -> dict[str, Interval]:
    tail = (1 - level) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    return {
        name: Interval(value, float(low[place]), float(high[place]))
        for place, (name, value) in enumerate(values.items())
    }
