"""A graph whose weights, products and caches are in half precision, for GPUs.

Half precision (IEEE 754 binary16) has 11 significant bits and ends at 65504. What needs more stays
in float32 (Micikevicius et al., 2017, "Mixed precision training",
https://arxiv.org/abs/1710.03740, section 3.3), between casts: sums, squares, softmax, log-softmax,
what is chosen by them, and what is computed elementwise of these alone. So does what leaves the
graph, but for the names that are asked for in half. LayerNormalization sums in float32 by itself.
"""

from collections.abc import Collection

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from trainer.calibration import revealing
from trainer.errors import QuantisationError
from trainer.folding import Graph, fold

_FLOAT = (
    *("Softmax", "LogSoftmax", "TopK", "Exp", "Log", "Pow", "BatchNormalization"),
    *("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2"),
)
# Where all that such a node reads is in float32 already, so is what it gives.
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Reciprocal", "Clip", "Max", "Expand")
_LARGEST = np.finfo(np.float16).max


def to_half(graph: bytes, half: Collection[str]) -> bytes:
    """Returns the graph in half precision.

    Args:
        graph: of `trainer.graphs`, in float32.
        half: inputs and outputs that become half precision; all others stay as they are.

    Raises:
        QuantisationError: a weight is larger than half precision holds.
    """
    folded = fold(graph)
    writer = _Writer(folded, half)
    for node in folded.nodes:
        writer.write(node)
    folded.rewrite(writer.nodes)
    model = folded.finish()
    for tensor in (*model.graph.input, *model.graph.output):
        if tensor.name in half:
            tensor.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.checker.check_model(model)
    return model.SerializeToString()


class _Writer:
    """Nodes with casts between them: a tensor that both precisions ask for has two names."""

    def __init__(self, graph: Graph, half: Collection[str]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._graph, self._asked = graph, half
        self._floats = _floats(graph)
        inputs = {tensor.name for tensor in graph.model.graph.input}
        self._is_half = {name: name in half for name in self._floats & inputs}
        self._names: dict[tuple[str, bool], str] = {}

    def write(self, node: onnx.NodeProto) -> None:
        """Takes the next node, in whichever precision suits it."""
        read = [name for name in node.input if name in self._floats]
        half = bool(read) and not self._stays(node, read)
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        for place, name in enumerate(node.input):
            if name in self._floats:
                copy.input[place] = self._in(name, half)
        if half and node.op_type == "Cast" and node.output[0] in self._floats:
            copy = _cast(copy.input[0], node.output[0], half=True)  # from float32 to float32
        casts = []
        for place, name in enumerate(node.output):
            if name not in self._floats:
                continue
            self._is_half[name] = half
            if name in self._graph.outputs and (name in self._asked) != half:
                copy.output[place] = f"{name}.computed"
                self._is_half[name] = not half
                casts.append(_cast(copy.output[place], name, half=not half))
        self.nodes += [copy, *casts]

    def _stays(self, node: onnx.NodeProto, read: list[str]) -> bool:
        """Returns whether a node computes in float32."""
        if node.op_type in _ELEMENTWISE:
            computed = [name for name in read if name in self._is_half]
            return bool(computed) and not any(self._is_half[name] for name in computed)
        return node.op_type in _FLOAT

    def _in(self, name: str, half: bool) -> str:
        """Returns the name of a tensor in a precision; casts it if nobody has so far."""
        if (name, half) not in self._names:
            self._names[name, half] = self._converted(name, half)
        return self._names[name, half]

    def _converted(self, name: str, half: bool) -> str:
        constant = self._graph.constants.get(name)
        if constant is not None and half:
            return self._graph.store(f"{name}.half", _halved(name, constant))
        if constant is not None or self._is_half[name] == half:
            return name
        other = f"{name}.{'half' if half else 'float'}"
        self.nodes.append(_cast(name, other, half=half))
        return other


def _floats(graph: Graph) -> set[str]:
    """Returns the names of all float32 tensors; a session knows of what type each is."""
    session = revealing(graph.finish(), [name for n in graph.nodes for name in n.output if name])
    tensors = (*session.get_inputs(), *session.get_outputs())
    found = {tensor.name for tensor in tensors if tensor.type == "tensor(float)"}
    constants = graph.constants.items()
    return found | {name for name, value in constants if value.dtype == np.float32}


def _halved(name: str, values: NDArray[np.float32]) -> NDArray[np.float16]:
    # The ends of float32 stand for what is as good as infinite: they become the ends of half.
    endless = np.abs(values) == np.finfo(np.float32).max
    values = np.where(endless, np.copysign(_LARGEST, values), values)
    with np.errstate(over="ignore"):
        found = values.astype(np.float16)
    if np.isinf(found[np.isfinite(values)]).any():
        raise QuantisationError(
            f"{name} does not fit half precision (beyond +-65504): export without [fp16]"
        )
    return found


def _cast(name: str, other: str, *, half: bool) -> onnx.NodeProto:
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    return helper.make_node("Cast", [name], [other], to=kind)
