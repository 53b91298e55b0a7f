"""What every metric returns: figures of the corpus, of each image, and of any resampling."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Combine = Callable[[NDArray[np.float64], int], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Scores:
    """The F figures that one metric gives a corpus of n images.

    Attributes:
        names: The figures' names, such as "BLEU-4".
        per_image: (n, F), each image as if it were a corpus (CIDEr-D: with the corpus's
            document frequencies).
        statistics: (n, S), what each image adds to the corpus figures.
        combine: Maps sums of statistics over m images, shape (..., S), and m to figures
            (..., F). Summing over a resample of the images gives that resample's figures.
    """

    names: tuple[str, ...]
    per_image: NDArray[np.float64]
    statistics: NDArray[np.float64]
    combine: Combine

    @property
    def corpus(self) -> dict[str, float]:
        """The corpus figures by name."""
        values = self.combine(self.statistics.sum(axis=0), len(self.statistics))
        return dict(zip(self.names, values.tolist(), strict=True))


def mean_scores(name: str, per_image: NDArray[np.float64]) -> Scores:
    """Returns the scores of a metric whose one corpus figure is the mean over images (n,)."""
    column = per_image[:, None]
    return Scores(names=(name,), per_image=column, statistics=column, combine=_mean)


def _mean(sums: NDArray[np.float64], images: int) -> NDArray[np.float64]:
    return sums / images
