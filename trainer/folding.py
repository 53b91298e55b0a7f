"""ONNX graphs rewritten; the encoder's folded and made to take pixels as they are."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trainer.calibration import ERRORS_ONLY

Array = NDArray[Any]

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

PIXELS = "pixels"
"""The tensor that `pixels_as_integers` makes: what the first convolution reads."""
_CLOSE = 1e-6  # of the normalised pixels' standard deviation


class Graph:
    """An ONNX graph with its constants and who reads what, for rewriting."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.constants = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
        self.outputs = {output.name for output in model.graph.output}
        self.input: str = model.graph.input[0].name
        # Copies: what the model lets go of in `finish` must not be read any more.
        self.rewrite([onnx.NodeProto.FromString(n.SerializeToString()) for n in model.graph.node])

    def rewrite(self, nodes: list[onnx.NodeProto]) -> None:
        """Takes other nodes, in topological order; those that nothing needs are left out."""
        asked = set(self.outputs)
        self.nodes: list[onnx.NodeProto] = []
        for node in reversed(nodes):
            if asked.intersection(node.output):
                self.nodes.insert(0, node)
                asked.update(node.input)
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)

    def replace(self, node: onnx.NodeProto, others: list[onnx.NodeProto]) -> None:
        """Puts other nodes in the place of one."""
        at = self.nodes.index(node)
        self.rewrite([*self.nodes[:at], *others, *self.nodes[at + 1 :]])

    def store(self, name: str, value: Array) -> str:
        """Returns the name of a constant, new or replaced."""
        self.constants[name] = value
        return name

    def finish(self) -> onnx.ModelProto:
        """Returns a checked model of the nodes and the constants that they read."""
        nodes, graph = self.nodes, self.model.graph
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(nodes)
        asked = {name for node in nodes for name in node.input}
        graph.initializer.extend(
            numpy_helper.from_array(value, name)
            for name, value in self.constants.items()
            if name in asked
        )
        known = {opset.domain: opset.version for opset in self.model.opset_import}
        known.setdefault(MICROSOFT, 1)
        versions = {domain: known[domain] for domain in sorted({node.domain for node in nodes})}
        del self.model.opset_import[:]
        self.model.opset_import.extend(helper.make_opsetid(*pair) for pair in versions.items())
        onnx.checker.check_model(self.model)
        return self.model


def fold(graph: bytes) -> Graph:
    """Returns the graph with its constants folded and BatchNorm gone into the convolutions."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "folded.onnx"
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return Graph(onnx.load(path))


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Returns a node's attributes by name."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def pixels_as_integers(graph: Graph) -> int | None:
    """Lets the first convolution read the uint8 pixels, with the normalisation in its weights.

    With x = a * p + b of a pixel p, w * x = (w * a) * (p - z) + w * (a * z + b) for any z. Padding
    is 0 in x and in p - z alike: so a convolution that pads needs a * z + b = 0 in every channel.

    Where no integer z will do, pixels are scaled to floats in one step and shifted in another.

    Returns:
        z, the pixel value that stands for 0, or None if the convolution, or whatever else reads the
        pixels, still reads floats.
    """
    found = _first_convolution(graph)
    if found is None:
        return None
    convolution, before, scale, offset = found
    zero = int(np.clip(np.rint(-(offset / scale).mean()), 0, 255))
    rest = scale * zero + offset  # (1, 3, 1, 1)
    if any(attributes(convolution).get("pads", ())) and np.abs(rest).max() > _CLOSE:
        _scale_and_shift(graph, convolution, before, scale, offset)
        return None
    weight = graph.constants[convolution.input[1]].astype(np.float64)
    bias = graph.constants[convolution.input[2]] if len(convolution.input) > 2 else 0.0
    names = [f"{PIXELS}.weight", f"{PIXELS}.bias"]
    graph.store(names[0], (weight * scale).astype(np.float32))
    graph.store(names[1], (bias + (weight * rest).sum((1, 2, 3))).astype(np.float32))
    step = graph.store(f"{PIXELS}.scale", np.array(1, np.float32))
    origin = graph.store(f"{PIXELS}.zero", np.array(zero, np.uint8))
    widen = helper.make_node("DequantizeLinear", [before, step, origin], [PIXELS])
    first = helper.make_node("Conv", [PIXELS, *names], list(convolution.output))
    first.attribute.extend(convolution.attribute)
    graph.replace(convolution, [widen, first])
    return zero


def _scale_and_shift(
    graph: Graph, convolution: onnx.NodeProto, before: str, scale: Array, offset: Array
) -> None:
    names = [f"{PIXELS}.scaled", f"{PIXELS}.normalised"]
    step = graph.store(f"{PIXELS}.scale", scale.astype(np.float32).ravel())
    origin = graph.store(f"{PIXELS}.zero", np.zeros(scale.size, np.uint8))
    shift = graph.store(f"{PIXELS}.shift", offset.astype(np.float32))
    widen = helper.make_node("DequantizeLinear", [before, step, origin], names[:1], axis=1)
    add = helper.make_node("Add", [names[0], shift], names[1:])
    first = helper.make_node("Conv", [names[1], *convolution.input[1:]], convolution.output)
    first.attribute.extend(convolution.attribute)
    graph.replace(convolution, [widen, add, first])


def _first_convolution(graph: Graph) -> tuple[onnx.NodeProto, str, Array, Array] | None:
    """Returns the convolution that reads the pixels, the uint8 tensor and (a, b) before it."""
    name, integers = graph.input, graph.input
    scale, offset = np.ones((1, 3, 1, 1)), np.zeros((1, 3, 1, 1))  # 3 channels
    while True:
        readers = [node for node in graph.readers.get(name, []) if node.op_type != "Shape"]
        if len(readers) != 1:
            return None
        node = readers[0]
        if node.op_type == "Conv":
            plain = node.input[1] in graph.constants and attributes(node).get("group", 1) == 1
            return (node, integers, scale, offset) if plain else None
        if node.op_type == "Transpose" and name == integers:
            integers = node.output[0]
        elif node.op_type in ("Sub", "Div") and node.input[1] in graph.constants:
            by = graph.constants[node.input[1]].astype(np.float64)
            if node.op_type == "Sub":
                offset = offset - by
            else:
                scale, offset = scale / by, offset / by
        elif node.op_type != "Cast":
            return None
        name = node.output[0]
