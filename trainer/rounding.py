"""Rounding weights to integers so that what they compute changes least, not they themselves.

Column by column, the error of rounding one weight is made up for by those not yet rounded, as far
as the inputs that they multiply go together (GPTQ: Frantar et al., 2022,
https://arxiv.org/abs/2210.17323, equations 2 and 3 through the Cholesky factor of section 3.3).

Departures:

1. Groups of a convolution are matrices of their own, rounded side by side.
2. Where there is a bias the inputs' covariance takes the place of their second moment, and the
   bias takes the mean of the error that is left.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_DAMPING = 0.01  # of the mean diagonal, as in the paper

Array = NDArray[Any]


class Moments:
    """Mean and second moment of the inputs of G matrices with C columns, gathered call by call."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Array = np.zeros(())
        self._products: Array = np.zeros(())

    def add(self, inputs: Array) -> None:
        """Takes inputs (samples, G, C)."""
        columns = inputs.transpose(1, 0, 2)  # (G, samples, C)
        self._count += len(inputs)
        self._sum = self._sum + columns.sum(1, dtype=np.float64)
        self._products = self._products + columns.swapaxes(1, 2) @ columns

    def mean(self) -> Array:
        """Returns (G, C)."""
        return self._sum / self._count

    def second(self, *, centred: bool) -> Array:
        """Returns (G, C, C)."""
        mean = self.mean()
        products = self._products / self._count
        return products - mean[:, :, None] * mean[:, None] if centred else products


def scales(weights: Array, levels: int) -> Array:
    """Returns the step of each row (..., 1) of weights (..., C); 1 for a row of zeros.

    The largest weight of a row is `levels` steps.
    """
    largest = np.abs(weights).max(-1, keepdims=True)
    return np.where(largest > 0, largest / levels, 1.0).astype(np.float32)


def round_together(
    weights: Array, scale: Array, second: Array | None, levels: int
) -> NDArray[np.int8]:
    """Returns integers (G, R, C) whose products with `scale` stand for the weights.

    Args:
        weights: (G, R, C), R rows for each of G matrices.
        scale: (G, R, 1).
        second: (G, C, C), the inputs' second moment; without it each weight is rounded by itself.
        levels: the largest integer, 127 at most.
    """
    if second is None:
        return _nearest(weights / scale, levels)
    left = weights.astype(np.float64)
    factor = _factor(second)
    rounded = np.empty(weights.shape, np.int8)
    for column in range(weights.shape[-1]):
        values = left[:, :, column]
        rounded[:, :, column] = _nearest(values / scale[:, :, 0], levels)
        error = values - rounded[:, :, column] * scale[:, :, 0].astype(np.float64)
        row = factor[:, column, column:]  # (G, what is left of C)
        left[:, :, column:] -= (error / row[:, :1])[:, :, None] * row[:, None]
    return rounded


def _nearest(steps: Array, levels: int) -> NDArray[np.int8]:
    return np.clip(np.rint(steps), -levels, levels).astype(np.int8)


def _factor(second: Array) -> Array:
    """Returns the upper Cholesky factor (G, C, C) of the damped moment's inverse."""
    diagonal = np.einsum("gcc->gc", second)
    damping = _DAMPING * diagonal.mean(1, keepdims=True)
    damping = np.where(damping > 0, damping, 1.0)  # inputs that are always 0
    damped = second + np.eye(second.shape[-1]) * damping[:, :, None]
    inverse = np.linalg.inv(damped)
    return np.linalg.cholesky((inverse + inverse.swapaxes(1, 2)) / 2).swapaxes(1, 2)
