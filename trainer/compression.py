"""Weights in fewer bytes, before and in a graph: what is rounded once is stored without loss.

Matrices of the decoder become int8 with a scale for each row, everything else half precision:

    w = q * s, q in -127..127, s = max |w| / 127 of the row, rounded to bfloat16.

A scale of 8 significant bits times an integer of 7 is exact in float32. So a captioner whose
weights were rounded (`round_weights`) computes in float32 what its graph computes after a session
has widened the weights again; the two differ by the order of their sums alone. Linear quantisation
of weights: Jacob et al., 2017, https://arxiv.org/abs/1712.05877.
"""

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from trainer.captioner import Captioner
from trainer.errors import ParityError

_SMALLEST = 256  # elements; what is smaller is not worth a node
_LEVELS = 127


def round_weights(captioner: Captioner) -> Captioner:
    """Returns the captioner with every parameter and buffer rounded as the module says, in float32.

    Raises:
        ParityError: a weight is not finite, or too large for half precision.
    """
    with torch.no_grad():
        for name, tensor in captioner.state_dict().items():
            if not tensor.is_floating_point():
                continue
            matrix = name.startswith("decoder.") and tensor.ndim == 2
            tensor.copy_(_to_int8(tensor) if matrix else tensor.half().float())
            if not bool(tensor.isfinite().all()):
                raise ParityError(f"{name} does not fit half precision (beyond +-65504)")
    return captioner


def _to_int8(matrix: Tensor) -> Tensor:
    scale = (matrix.abs().amax(1, keepdim=True) / _LEVELS).bfloat16().float()
    steps = (matrix / scale).nan_to_num(0.0).round().clamp(-_LEVELS, _LEVELS)  # 0 / 0 is a row of 0
    return steps * scale


def compress(model: onnx.ModelProto) -> bytes:
    """Returns the model's bytes, large float32 weights in the fewest bytes that hold them exactly.

    Nodes in front of the graph widen the weights; a session folds them when it loads. What no node
    asks for, and what would tell of the exporting machine, is left out.
    """
    graph = model.graph
    asked = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    kept = [initializer for initializer in graph.initializer if initializer.name in asked]
    stored, widening = [], []
    for initializer in kept:
        tensors, nodes = _narrow(initializer)
        stored += tensors
        widening += nodes
    nodes = [*widening, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(stored)
    graph.node.extend(nodes)
    del graph.value_info[:]  # shapes that a session infers anew
    for node in graph.node:
        del node.metadata_props[:]  # stack traces of the exporting machine, paths included
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _narrow(weight: onnx.TensorProto) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
    """Returns what is stored for a weight, and the nodes that make it of that."""
    values = numpy_helper.to_array(weight)
    if values.dtype != np.float32 or values.size < _SMALLEST:
        return [weight], []
    name = weight.name
    steps, scale, wide = f"{name}.int8", f"{name}.scale", f"{name}.wide"
    for axis in (1, 0) if values.ndim == 2 else ():  # 0: a matrix that the exporter transposed
        found = _int8_exactly(values, axis)
        if found is not None:
            parts = [
                numpy_helper.from_array(found[0], steps),
                numpy_helper.from_array(found[1], scale),
            ]
            widen = helper.make_node("Cast", [steps], [wide], to=TensorProto.FLOAT)
            return parts, [widen, helper.make_node("Mul", [wide, scale], [name])]
    half = values.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), values):
        return [weight], []
    widen = helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT)
    return [numpy_helper.from_array(half, f"{name}.half")], [widen]


def _int8_exactly(
    values: NDArray[np.float32], axis: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None:
    """Returns steps and scale whose product is `values` (a, b), bit for bit, if there are any."""
    scale = np.abs(values).max(axis, keepdims=True) / np.float32(_LEVELS)
    steps = np.rint(np.divide(values, scale, out=np.zeros_like(values), where=scale > 0))
    if not np.array_equal(steps * scale, values):
        return None
    return steps.astype(np.int8), scale
