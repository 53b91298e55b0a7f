"""What the tensors of a graph hold on real inputs: the ranges that integers are spread over."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from trainer.errors import QuantisationError

WEIGHT_LEVELS = 63
"""Of a weight on either side of 0. Two products of it with 255 fit 16 bits, in which processors
with AVX2 and without VNNI add them; they would cut off larger sums, and caption otherwise."""
ERRORS_ONLY = 3  # ONNX Runtime's log severity; its warnings are of what its optimiser tidied up


class Range(NamedTuple):
    """The smallest and the largest value of a tensor."""

    low: float
    high: float

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(abs(self.low), abs(self.high))

    @property
    def steps(self) -> tuple[np.float32, np.uint8]:
        """Scale and zero point of 8-bit integers over it; 0 is one of them, as padding needs it."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = np.float32((high - low) / 255)
        if scale == 0:
            return np.float32(1), np.uint8(0)
        return scale, np.uint8(np.clip(np.rint(-low / scale), 0, 255))


class Ranges:
    """Ranges of named tensors, gathered call by call.

    Args:
        outside: share of a call's values that may lie beyond either end. With 0 a range holds every
            value of every call; with more, its ends are the calls' quantiles, averaged.
    """

    def __init__(self, outside: float = 0.0) -> None:
        self._outside = outside
        self._ends: dict[str, list[tuple[float, float]]] = {}

    def add(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Takes what one call gave."""
        for name, values in tensors.items():
            if values.size:
                self._ends.setdefault(name, []).append(_ends(values, self._outside))

    def found(self) -> dict[str, Range]:
        """Returns every tensor's range.

        Raises:
            QuantisationError: nothing was added, or a tensor held a value that is not finite.
        """
        if not self._ends:
            raise QuantisationError("nothing to calibrate on: at least one image is needed")
        ranges = {name: self._merge(ends) for name, ends in self._ends.items()}
        for name, (low, high) in ranges.items():
            if not math.isfinite(low) or not math.isfinite(high):
                raise QuantisationError(
                    f"{name} takes values from {low} to {high} on the calibration inputs: a graph "
                    "that overflows cannot be quantised"
                )
        return ranges

    def _merge(self, ends: list[tuple[float, float]]) -> Range:
        lows, highs = zip(*ends, strict=True)
        if not self._outside:
            return Range(float(np.min(lows)), float(np.max(highs)))  # NaN stays NaN
        return Range(float(np.mean(lows)), float(np.mean(highs)))


def revealing(model: onnx.ModelProto, tensors: Sequence[str]) -> onnxruntime.InferenceSession:
    """Returns the graph with the named tensors for outputs, on the CPU and not optimised."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in tensors)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        shown.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def observe(
    model: onnx.ModelProto, tensors: Sequence[str], feeds: Iterable[Mapping[str, NDArray[Any]]]
) -> Iterator[dict[str, NDArray[Any]]]:
    """Yields the named tensors' values, inputs' or nodes' outputs, for one feed after the other.

    The graph is run as it stands, on the CPU and without optimisation.
    """
    session = revealing(model, tensors)
    for feed in feeds:
        yield dict(zip(tensors, session.run(list(tensors), dict(feed)), strict=True))


def _ends(values: NDArray[Any], outside: float) -> tuple[float, float]:
    rank = int(outside * values.size)
    if rank == 0 or not np.isfinite(values).all():
        return float(values.min()), float(values.max())
    parts = np.partition(values.ravel(), (rank, values.size - 1 - rank))
    return float(parts[rank]), float(parts[values.size - 1 - rank])
