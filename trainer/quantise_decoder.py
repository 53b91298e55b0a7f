"""The decode step with its dense layers in 8-bit integers, for CPUs.

Activations are quantised with one scale and zero point a tensor, fixed beforehand by the range that
calibration images give; weights with one scale an output column. The product is exact in integers:

    y = (x_q - z) W_q * (s_x * s_w) + bias,   x_q = round(x / s_x) + z in 0..255, W_q in -63..63.

With fixed ranges a row's result does not depend on other rows, which scales taken from the data at
each step (dynamic quantisation) would break. Weights keep 7 bits, since processors without VNNI add
two products of 8 bits in 16 and would saturate. Attention, norms and embeddings stay in float32.
Jacob et al., 2017, https://arxiv.org/abs/1712.05877, section 2.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from exports.manifest import Generation
from trainer.calibration import WEIGHT_LEVELS, Range, Ranges
from trainer.decoding import best_hypotheses
from trainer.folding import MICROSOFT, Graph, attributes
from trainer.onnx_steps import OnnxSteps, session

Weights = dict[str, NDArray[np.float32]]


def quantise_decoder(
    graph: bytes,
    steps: OnnxSteps,
    images: NDArray[np.uint8],
    generation: Generation,
    prompt: Sequence[int] = (),
) -> bytes:
    """Returns the decode-step graph in integers.

    Args:
        graph: of `export_decoder`.
        steps: the captioner whose decoder that is.
        images: (n, H, W, 3), captioned to see what ranges the activations have.
        generation: how they are captioned.
        prompt: what stands before their captions.

    Raises:
        QuantisationError: an activation is not finite on these images.
    """
    model = onnx.load_from_string(graph)
    weights = _weights(model)

    def search() -> None:
        best_hypotheses(steps, images, generation, prompt=prompt)

    ranges = _ranges(model, weights, steps, search)
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
    search: Callable[[], None],
) -> dict[str, Range]:
    """Returns the range of every dense layer's input while `search` decodes by `steps`."""
    names = list(dict.fromkeys(node.input[0] for node in _dense(model, weights)))
    telling = onnx.ModelProto()
    telling.CopyFrom(model)
    telling.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    watched = _Watched(session(telling.SerializeToString()), names)
    before, steps.decoder = steps.decoder, watched
    try:
        search()
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
    graph = Graph(model)
    for name, found in ranges.items():
        scale, zero = found.steps
        graph.store(f"{name}.scale", np.asarray(scale))
        graph.store(f"{name}.zero", np.asarray(zero))
    nodes: list[onnx.NodeProto] = []
    quantised: set[str] = set()
    dense = {node.output[0] for node in _dense(model, weights)}
    for node in graph.nodes:
        if node.output[0] not in dense:
            nodes.append(node)
            continue
        source = node.input[0]
        if source not in quantised:
            quantised.add(source)
            inputs = [source, f"{source}.scale", f"{source}.zero"]
            nodes.append(helper.make_node("QuantizeLinear", inputs, [f"{source}.q"]))
        nodes.append(_integer(graph, node, weights[node.input[1]]))
    graph.rewrite(nodes)
    return graph.finish().SerializeToString()


def _integer(graph: Graph, node: onnx.NodeProto, matrix: NDArray[np.float32]) -> onnx.NodeProto:
    """Returns a dense layer's integer twin, whose weights it adds to the graph."""
    if attributes(node).get("transB"):
        matrix = matrix.T
    scale = np.abs(matrix).max(0) / np.float32(WEIGHT_LEVELS)
    steps = np.rint(np.divide(matrix, scale, out=np.zeros_like(matrix), where=scale > 0))
    source, name = node.input[0], node.output[0]
    graph.store(f"{name}.weight", steps.astype(np.int8))
    graph.store(f"{name}.weight.scale", scale)
    inputs = [f"{source}.q", f"{name}.weight", f"{source}.scale", f"{name}.weight.scale"]
    inputs += [f"{source}.zero", "", *node.input[2:]]
    return helper.make_node("MatMulIntegerToFloat", inputs, [name], domain=MICROSOFT)
