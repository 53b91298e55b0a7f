"""The decode step with its dense layers in 8-bit integers, for CPUs.

Activations are quantised with one scale and zero point a tensor, fixed beforehand by the range that
calibration images give; weights with one scale an output column. The product is exact in integers:

    y = (x_q - z) W_q * (s_x * s_w) + bias,   x_q = round(x / s_x) + z in 0..255, W_q in -63..63.

With fixed ranges a row's result does not depend on other rows, which scales taken from the data at
each step (dynamic quantisation) would break. Weights keep 7 bits, since processors without VNNI add
two products of 8 bits in 16 and would saturate. Attention, norms and embeddings stay in float32.
Jacob et al., 2017, https://arxiv.org/abs/1712.05877, section 2.
"""

from collections.abc import Iterator

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from exports.manifest import Generation
from trainer.calibration import Range, Ranges
from trainer.decoding import best_hypotheses
from trainer.onnx_steps import OnnxSteps, session

_MICROSOFT = "com.microsoft"
WEIGHT_LEVELS = 63  # of a weight, on either side of 0

Weights = dict[str, NDArray[np.float32]]


def quantise_decoder(
    graph: bytes, steps: OnnxSteps, images: NDArray[np.uint8], generation: Generation
) -> bytes:
    """Returns the decode-step graph in integers.

    Args:
        graph: of `export_decoder`.
        steps: the captioner whose decoder that is.
        images: (n, H, W, 3), captioned to see what ranges the activations have.
        generation: how they are captioned.

    Raises:
        QuantisationError: an activation is not finite on these images.
    """
    model = onnx.load_from_string(graph)
    weights = _weights(model)
    ranges = _ranges(model, weights, steps, images, generation)
    return _rewrite(model, weights, ranges)


def _weights(model: onnx.ModelProto) -> Weights:
    """Returns the weights by name, those that are stored narrow as the graph widens them."""
    found = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    for node in model.graph.node:
        if not all(name in found for name in node.input):
            continue
        stored = [found[name] for name in node.input]
        if node.op_type == "Cast":
            found[node.output[0]] = stored[0].astype(np.float32)
        if node.op_type == "Mul":
            found[node.output[0]] = stored[0] * stored[1]
    return found


def _dense(model: onnx.ModelProto, weights: Weights) -> Iterator[onnx.NodeProto]:
    for node in model.graph.node:
        if node.op_type in ("Gemm", "MatMul") and node.input[1] in weights:
            yield node


def _ranges(
    model: onnx.ModelProto,
    weights: Weights,
    steps: OnnxSteps,
    images: NDArray[np.uint8],
    generation: Generation,
) -> dict[str, Range]:
    """Returns the range of every dense layer's input while the images are captioned."""
    names = list(dict.fromkeys(node.input[0] for node in _dense(model, weights)))
    telling = onnx.ModelProto()
    telling.CopyFrom(model)
    telling.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    watched = _Watched(session(telling.SerializeToString()), names)
    before, steps.decoder = steps.decoder, watched
    try:
        best_hypotheses(steps, images, generation)
    finally:
        steps.decoder = before
    return watched.ranges.found()


class _Watched:
    """A session that has more outputs, of which it keeps the ranges."""

    def __init__(self, inner: onnxruntime.InferenceSession, names: list[str]) -> None:
        self._inner, self._names = inner, names
        self.ranges = Ranges()

    def run(self, outputs: list[str], feeds: dict[str, NDArray[np.generic]]) -> list[object]:
        found = self._inner.run([*outputs, *self._names], feeds)
        self.ranges.add(dict(zip(self._names, found[len(outputs) :], strict=True)))
        return list(found[: len(outputs)])


def _rewrite(model: onnx.ModelProto, weights: Weights, ranges: dict[str, Range]) -> bytes:
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    for name, found in ranges.items():
        scale, zero = found.steps
        _store(graph, f"{name}.scale", scale)
        _store(graph, f"{name}.zero", zero)
    quantised: set[str] = set()
    dense = {node.output[0] for node in _dense(model, weights)}
    for node in graph.node:
        if node.output[0] not in dense:
            nodes.append(node)
            continue
        source = node.input[0]
        if source not in quantised:
            quantised.add(source)
            inputs = [source, f"{source}.scale", f"{source}.zero"]
            nodes.append(helper.make_node("QuantizeLinear", inputs, [f"{source}.q"]))
        nodes.append(_integer(graph, node, weights[node.input[1]]))
    _drop_unused(graph, nodes)
    if all(opset.domain != _MICROSOFT for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _integer(
    graph: onnx.GraphProto, node: onnx.NodeProto, matrix: NDArray[np.float32]
) -> onnx.NodeProto:
    """Returns a dense layer's integer twin, whose weights it adds to the graph."""
    if any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
        matrix = matrix.T
    scale = np.abs(matrix).max(0) / np.float32(WEIGHT_LEVELS)
    steps = np.rint(np.divide(matrix, scale, out=np.zeros_like(matrix), where=scale > 0))
    source, name = node.input[0], node.output[0]
    _store(graph, f"{name}.weight", steps.astype(np.int8))
    _store(graph, f"{name}.weight.scale", scale)
    inputs = [f"{source}.q", f"{name}.weight", f"{source}.scale", f"{name}.weight.scale"]
    inputs += [f"{source}.zero", "", *node.input[2:]]
    return helper.make_node("MatMulIntegerToFloat", inputs, [name], domain=_MICROSOFT)


def _store(graph: onnx.GraphProto, name: str, value: NDArray[np.generic] | np.generic) -> None:
    graph.initializer.append(
        numpy_helper.from_array(np.ascontiguousarray(value).reshape(np.shape(value)), name)
    )


def _drop_unused(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Gives the graph these nodes, without what nothing asks for: they are in order of use."""
    asked = {output.name for output in graph.output}
    kept = []
    for node in reversed(nodes):
        if asked.intersection(node.output):
            asked.update(node.input)
            kept.append(node)
    weights = [one for one in graph.initializer if one.name in asked]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(weights)
