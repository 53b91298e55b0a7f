"""A captioner as two ONNX graphs: the encoder, and one decode step.

What the graphs take and give stands in `exports/README.md`, how their weights are stored in
`trainer.compression`.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxscript.optimizer
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from exports.manifest import DecoderSpec, EncoderSpec
from trainer.captioner import Captioner
from trainer.compression import compress

OPSET = 20


def export_encoder(captioner: Captioner) -> tuple[bytes, EncoderSpec]:
    """Returns the encoder graph, uint8 images (B, H, W, 3) to the decoder's memory."""
    spec = EncoderSpec(outputs=_names("memory", captioner.decoder.layers))
    pixels = torch.zeros(2, captioner.image.height, captioner.image.width, 3, dtype=torch.uint8)
    # Constants are folded, but not BatchNorm: the session folds it after the weights are widened.
    # Folded here, other numbers would be rounded than those of the captioner.
    model = _export(
        _EncoderGraph(captioner),
        (pixels,),
        {"images": {0: "B"}},
        inputs=[spec.input],
        outputs=spec.outputs,
        optimize=False,
    )
    return compress(model), spec


def export_decoder(captioner: Captioner) -> tuple[bytes, DecoderSpec]:
    """Returns the decode-step graph: newest tokens and caches to the best M continuations."""
    decoder = captioner.decoder
    memory, past = _names("memory", decoder.layers), _names("past", decoder.layers)
    present = _names("present", decoder.layers)
    spec = DecoderSpec(
        layers=decoder.layers,
        heads=decoder.heads,
        head_dim=decoder.head_dim,
        memory=memory,
        past=past,
        present=present,
    )
    images, rows, previous, length = 2, 6, 4, 3
    with torch.no_grad():
        size = (images, 3, captioner.image.height, captioner.image.width)
        # Contiguous, as a graph's inputs are: otherwise the exporter asks for their strides.
        memories = [m.contiguous() for m in captioner.memory_cache(torch.zeros(size))]
    shape = (previous, decoder.heads, length, decoder.head_dim)
    example = (
        torch.zeros(rows, dtype=torch.int64),
        torch.tensor(length),
        torch.zeros(rows, dtype=torch.int64),
        # Distinct tensors: the exporter would take one object for one input.
        [torch.zeros(shape) for _ in past],
        memories,
    )
    dynamic = {
        "token_ids": {0: "R"},
        "position": {},
        "beam_index": {0: "R"},
        "past": [{0: "previous_R", 2: "T"} for _ in past],
        "memory": [{0: "B"} for _ in memory],
    }
    model = _export(
        _DecoderGraph(captioner),
        example,
        dynamic,
        inputs=["token_ids", "position", "beam_index", *past, *memory],
        outputs=["all_log_probs", *present],
        optimize=True,
    )
    _append_top_k(model, captioner.text.vocab_size)
    return compress(model), spec


def _names(kind: str, layers: int) -> tuple[str, ...]:
    return tuple(f"{kind}_{part}.{layer}" for layer in range(layers) for part in "kv")


class _EncoderGraph(nn.Module):
    def __init__(self, captioner: Captioner) -> None:
        super().__init__()
        self.captioner = captioner

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.captioner.memory_cache(images.permute(0, 3, 1, 2)))


class _DecoderGraph(nn.Module):
    def __init__(self, captioner: Captioner) -> None:
        super().__init__()
        self.captioner = captioner

    def forward(
        self,
        token_ids: Tensor,
        position: Tensor,
        beam_index: Tensor,
        past: list[Tensor],
        memory: list[Tensor],
    ) -> tuple[Tensor, ...]:
        past = [cache.index_select(0, beam_index) for cache in past]
        logits, present = self.captioner.step(token_ids, position, past, memory)
        return (logits.log_softmax(-1), *present)


def _export(
    module: nn.Module,
    example: tuple[Any, ...],
    dynamic: dict[str, Any],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    optimize: bool,
) -> onnx.ModelProto:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own use of what torch deprecates
        program = torch.onnx.export(
            module.eval(),
            example,
            dynamo=True,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=_dims(dynamic),
            opset_version=OPSET,
            optimize=optimize,
            verbose=False,
        )
    assert program is not None  # it is with dynamo=True
    if not optimize:
        onnxscript.optimizer.fold_constants(program.model)
    return program.model_proto


def _dims(shapes: Any) -> Any:
    """Returns the same structure with each axis left to the exporter to find dynamic.

    Named dimensions would have to be proven independent, and R is a multiple of B.
    """
    if isinstance(shapes, list):
        return [_dims(shape) for shape in shapes]
    return {
        key: torch.export.Dim.DYNAMIC if isinstance(value, str) else _dims(value)
        for key, value in shapes.items()
    }


def _append_top_k(model: onnx.ModelProto, vocab_size: int) -> None:
    """Replaces the first output, all log-probabilities, by the best min(top_k, V) and their ids."""
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array([vocab_size]), "vocab_size"))
    graph.node.append(helper.make_node("Min", ["top_k", "vocab_size"], ["candidates"]))
    graph.node.append(
        helper.make_node("TopK", ["all_log_probs", "candidates"], ["log_probs", "ids"], axis=-1)
    )
    graph.input.append(helper.make_tensor_value_info("top_k", TensorProto.INT64, [1]))
    present = list(graph.output)[1:]
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("log_probs", TensorProto.FLOAT, ["R", "M"]))
    graph.output.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["R", "M"]))
    graph.output.extend(present)
