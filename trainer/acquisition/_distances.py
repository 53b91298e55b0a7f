"""Euclidean distances among many images, block by block, in float32.

Shapes: n, m or k rows of D features.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float32]
_CELLS = 1 << 24  # of a block of distances: 64 megabytes


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yields slices of `rows` rows that have `_CELLS` cells with so many columns."""
    step = max(1, _CELLS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def distances(rows: Features, others: Features) -> Features:
    """Returns how far (n, D) are from (m, D), (n, m); all at once."""
    squared = rows @ others.T
    squared *= -2
    squared += np.einsum("nd,nd->n", rows, rows)[:, None]
    squared += np.einsum("md,md->m", others, others)
    return np.sqrt(np.maximum(squared, 0, out=squared), out=squared)


def nearest(rows: Features, others: Features) -> tuple[NDArray[np.int64], Features]:
    """Returns for each of (n, D) which of (m, D) is nearest, and how far it is, (n,) both."""
    places = np.empty(len(rows), np.int64)
    found = np.empty(len(rows), np.float32)
    for block in blocks(len(rows), len(others)):
        apart = distances(rows[block], others)
        places[block] = apart.argmin(1)
        found[block] = np.take_along_axis(apart, places[block, None], 1)[:, 0]
    return places, found


def distance_to(features: Features, place: int) -> Features:
    """Returns how far each of (n, D) is from the one at `place`, (n,)."""
    return distances(features, features[place : place + 1])[:, 0]
