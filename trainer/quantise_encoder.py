"""An encoder graph in 8-bit integers, for processors that multiply those faster than floats.

Pairs of QuantizeLinear and DequantizeLinear say what is an integer; a session fuses them with the
convolutions and matrix products between them:

    activations x = (q - z) * s, q in 0..255, one s and z a tensor, from calibration images;
    weights     w = q * s, q in -63..63, one s an output channel.

Jacob et al., 2017, https://arxiv.org/abs/1712.05877, with these departures:

1. A matrix product takes integers and gives floats, so that norms, attention and what the decoder
   reads are never rounded. Integers stay integers between convolutions only.
2. ReLU and ReLU6 are no nodes: the range of a convolution's integers cuts off what they would.
3. Weights are rounded for what they compute (`trainer.rounding`), pixels are integers already
   (`trainer.folding`).

No range depends on the images at hand, so neither does what an image gives on its batch.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import helper

from trainer.calibration import WEIGHT_LEVELS, Ranges, observe
from trainer.folding import PIXELS, Graph, attributes, fold, pixels_as_integers
from trainer.rounding import Moments, round_together, scales

Array = NDArray[Any]
_PRODUCTS = ("Conv", "MatMul", "Gemm")
# What a session has integer kernels for, one or two integer tensors in and one out.
_BETWEEN = ("Add", "Mul", "Sigmoid", "Concat", "AveragePool", "GlobalAveragePool")
_CALL = 8  # images: all activations of a call are in memory together
_PLACES = 128  # of each image at which a convolution's inputs are sampled
_LARGEST_BIAS = 2**30  # steps, in int32


def quantise_encoder(
    graph: bytes,
    batches: Iterable[NDArray[np.uint8]],
    *,
    floats: Collection[str] = (),
    outside: float = 1e-5,
    levels: int = WEIGHT_LEVELS,
    compensate: bool = True,
) -> bytes:
    """Returns the encoder graph with integer weights and activations.

    Args:
        graph: the graph of `trainer.graphs.export_encoder`.
        batches: images (B, H, W, 3) like those that it will see; about a hundred are enough.
        floats: outputs that are computed in floats from where they part from the others: a row an
            image is too little to see what rounding changes, and not worth integers.
        outside: share of a tensor's values that its range may cut off at either end.
        levels: the largest weight, 127 at most.
        compensate: round weights together, not each by itself.

    Raises:
        QuantisationError: no images, or an activation is not finite.
    """
    folded = fold(graph)
    zero = pixels_as_integers(folded)
    plan = _Plan(folded, folded.outputs.difference(floats))
    feeds = (
        {folded.input: batch[start : start + _CALL]}
        for batch in batches
        for start in range(0, len(batch), _CALL)
    )
    ranges, moments = Ranges(outside), {id(node): Moments() for node in plan.products}
    draw = np.random.default_rng(0)
    for values in observe(folded.finish(), plan.tensors, feeds):
        ranges.add(values)
        for node in plan.products if compensate else ():
            moments[id(node)].add(_inputs(folded, node, values[node.input[0]], draw))
    steps = {name: found.steps for name, found in ranges.found().items()}
    if zero is not None:
        steps[PIXELS] = (np.float32(1), np.uint8(zero))
    writer = _Writer(folded, plan, steps, levels)
    folded.rewrite(writer.nodes(moments if compensate else {}))
    return folded.finish().SerializeToString()


class _Plan:
    """Which nodes compute with integers for `outputs`, and which tensors are integers for them.

    `products` have constant weights; `between` read nothing but what is an integer anyway; `cut`
    maps what comes before a ReLU to what comes after; `integers` are made by either.
    """

    def __init__(self, graph: Graph, outputs: Collection[str]) -> None:
        self.products: list[onnx.NodeProto] = []
        self.between: list[onnx.NodeProto] = []
        self.cut: dict[str, str] = {}
        self.integers: set[str] = set()
        for node in _leading_to(graph, outputs):
            weighted = _has_weights(graph, node)
            between = node.op_type in _BETWEEN and self.integers.issuperset(node.input)
            if weighted:
                self.products.append(node)
            elif between:
                self.between.append(node)
            if between or (weighted and node.op_type == "Conv"):
                self.cut |= _cut(graph, node.output[0])
                self.integers.add(self.cut.get(node.output[0], node.output[0]))
        self.integers -= graph.outputs
        read = {node.input[0] for node in self.products}
        self.tensors = sorted(self.integers | read)


def _leading_to(graph: Graph, outputs: Collection[str]) -> list[onnx.NodeProto]:
    """Returns the nodes, in order, that some of the outputs need."""
    asked, found = set(outputs), []
    for node in reversed(graph.nodes):
        if asked.intersection(node.output):
            found.append(node)
            asked.update(node.input)
    return found[::-1]


def _has_weights(graph: Graph, node: onnx.NodeProto) -> bool:
    if node.op_type not in _PRODUCTS or node.output[0] in graph.outputs:
        return False
    given = attributes(node)
    plain = given.get("alpha", 1) == given.get("beta", 1) == 1 and not given.get("transA")
    automatic = given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    constant = all(name in graph.constants for name in node.input[1:])
    matrix = constant and graph.constants[node.input[1]].ndim in (2, 4)
    return plain and not automatic and matrix


def _cut(graph: Graph, output: str) -> dict[str, str]:
    """Returns {output: what its ReLU gives} if integers from 0 on do what the ReLU does."""
    readers = graph.readers.get(output, [])
    if len(readers) != 1 or readers[0].op_type not in ("Relu", "Clip"):
        return {}
    (node,) = readers
    if node.op_type == "Clip":
        bounds = [graph.constants.get(name) for name in node.input[1:]]
        if len(bounds) < 1 or any(bound is None for bound in bounds) or bounds[0] != 0:
            return {}
    return {output: node.output[0]}


def _matrix(node: onnx.NodeProto, weight: Array) -> Array:
    """Returns a node's weight as (G, rows, columns): rows are its output channels."""
    given = attributes(node)
    if node.op_type == "Conv":
        groups = given.get("group", 1)
        return weight.reshape(groups, len(weight) // groups, -1)
    return (weight if given.get("transB") else weight.T)[None]


def _inputs(graph: Graph, node: onnx.NodeProto, values: Array, draw: np.random.Generator) -> Array:
    """Returns what a node's weights are multiplied with: samples (n, G, columns) of its input."""
    if node.op_type != "Conv":
        return values.reshape(-1, 1, values.shape[-1])
    given = attributes(node)
    height, width = graph.constants[node.input[1]].shape[2:]
    top, left, bottom, right = given.get("pads", (0, 0, 0, 0))
    down, along = given.get("strides", (1, 1))
    apart = given.get("dilations", (1, 1))
    padded = np.pad(values, ((0, 0), (0, 0), (top, bottom), (left, right)))
    size = ((height - 1) * apart[0] + 1, (width - 1) * apart[1] + 1)
    windows = sliding_window_view(padded, size, (2, 3))
    windows = windows[:, :, ::down, ::along, :: apart[0], :: apart[1]]
    images, _, rows, columns = windows.shape[:4]
    places = draw.integers(0, (images, rows, columns), (images * min(_PLACES, rows * columns), 3)).T
    taken = windows[places[0], :, places[1], places[2]]  # (n, channels, height, width)
    return taken.reshape(len(taken), given.get("group", 1), -1)


class _Writer:
    """The nodes of a graph with those that make integers between them."""

    def __init__(
        self,
        graph: Graph,
        plan: _Plan,
        steps: dict[str, tuple[np.float32, np.uint8]],
        levels: int,
    ) -> None:
        self._graph, self._plan, self._steps, self._levels = graph, plan, steps, levels

    def nodes(self, moments: Mapping[int, Moments]) -> list[onnx.NodeProto]:
        """Returns all nodes, in order."""
        plan, written = self._plan, []
        products = {id(node) for node in plan.products}
        integer = products | {id(node) for node in plan.between}
        after = {name: output for output, name in plan.cut.items()}
        for node in self._graph.nodes:
            output = node.output[0]
            if output in after:  # a ReLU
                written += self._pair(after[output], output)
                continue
            copy = onnx.NodeProto.FromString(node.SerializeToString())
            if id(node) in products:
                written += self._weights(node, copy, moments.get(id(node)))
            for index, name in enumerate(node.input):
                made = name in plan.integers
                if made or (id(node) in integer and index == 0 and name != PIXELS):
                    copy.input[index] = f"{name}.rounded"
            written.append(copy)
            if output in plan.tensors:
                written += self._pair(output, output)
        return written

    def _pair(self, source: str, name: str) -> list[onnx.NodeProto]:
        scale, zero = self._steps[name]
        constants = [
            self._graph.store(f"{name}.scale", np.array(scale)),
            self._graph.store(f"{name}.zero", np.array(zero)),
        ]
        integer = f"{name}.integer"
        return [
            helper.make_node("QuantizeLinear", [source, *constants], [integer]),
            helper.make_node("DequantizeLinear", [integer, *constants], [f"{name}.rounded"]),
        ]

    def _weights(
        self, node: onnx.NodeProto, copy: onnx.NodeProto, moments: Moments | None
    ) -> list[onnx.NodeProto]:
        """Returns the nodes that make a product's weights and bias of integers."""
        graph = self._graph
        weight = graph.constants[node.input[1]]
        matrix = _matrix(node, weight)  # (G, R, C)
        bias = graph.constants[node.input[2]].ravel() if len(node.input) > 2 else None
        step = self._steps[node.input[0]][0]
        scale = scales(matrix, self._levels)
        if bias is not None:  # a channel without weights may have a bias all the same
            least = np.abs(bias).reshape(*scale.shape) / (step * _LARGEST_BIAS)
            scale = np.maximum(scale, least.astype(np.float32))
        second = None if moments is None else moments.second(centred=bias is not None)
        rounded = round_together(matrix, scale, second, self._levels)
        if moments is not None and bias is not None:
            lost = matrix - rounded * scale.astype(np.float64)
            bias = bias + (lost * moments.mean()[:, None]).sum(-1).ravel()
        name, axis = f"{node.output[0]}.weight", 0
        if node.op_type == "Conv":
            stored = rounded.reshape(weight.shape)
        elif attributes(node).get("transB"):
            stored = rounded[0]
        else:
            stored, axis = rounded[0].T, 1
        copy.input[1] = name
        made = [self._widen(name, stored, scale.ravel(), axis)]
        if bias is not None:
            copy.input[2] = f"{node.output[0]}.bias"
            steps = (scale.ravel() * step).astype(np.float32)
            whole = np.rint(bias / steps.astype(np.float64)).astype(np.int32)
            made.append(self._widen(copy.input[2], whole, steps, 0))
        return made

    def _widen(self, name: str, values: Array, scale: Array, axis: int) -> onnx.NodeProto:
        store = self._graph.store
        parts = [
            store(f"{name}.integer", values),
            store(f"{name}.scale", scale),
            store(f"{name}.zero", np.zeros(scale.shape, values.dtype)),
        ]
        return helper.make_node("DequantizeLinear", parts, [name], axis=axis)
