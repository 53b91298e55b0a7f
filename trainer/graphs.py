"""A captioner as ONNX graphs: the encoder, one decode step, the join between them, the matcher.

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

from exports.manifest import DecoderSpec, Dtype, EncoderSpec, MatcherSpec, encoded_name, next_name
from trainer.attention import Memory, pair_names
from trainer.captioner import IMAGE_EMBEDDING, Captioner
from trainer.compression import compress
from trainer.tree_cache import TreeCache

OPSET = 20


def export_encoder(captioner: Captioner) -> tuple[bytes, EncoderSpec]:
    """Returns the encoder graph: uint8 images (B, H, W, 3) to what the other graphs take."""
    spec = EncoderSpec(outputs=tuple(_example(captioner, 1)))
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
    slots, columns, nodes, rows = 2, 3, 7, 5
    memory = _example_memory(captioner, slots)
    spec = DecoderSpec(
        layers=decoder.layers,
        heads=decoder.heads,
        head_dim=decoder.head_dim,
        memory=tuple(memory),
        cache=pair_names("cache", decoder.layers),
    )
    shape = (slots, decoder.heads, nodes, decoder.head_dim)
    whole = torch.int64
    example = (
        torch.zeros(rows, dtype=whole),
        torch.zeros(rows, dtype=whole),
        torch.zeros(rows, decoder.heads, 3, dtype=whole),
        torch.zeros(rows, 2, dtype=whole),
        torch.zeros(slots, columns, dtype=whole),
        torch.zeros(slots, 1, columns, nodes),
        # Distinct tensors: the exporter would take one object for one input.
        [torch.zeros(shape) for _ in spec.cache],
        list(memory.values()),
        *((torch.zeros(slots, nodes, dtype=whole),) if decoder.asks_for_distances else ()),
    )
    dynamic = {
        "token_ids": {0: "R"},
        "position": {0: "R"},
        "write": {0: "R"},
        "row_cell": {0: "R"},
        "cell_row": {0: "S", 1: "W"},
        "visible": {0: "S", 2: "W", 3: "N"},
        "cache": [{0: "S", 2: "N"} for _ in spec.cache],
        "memory": [{0: "S"} for _ in spec.memory],
    }
    asked = {"node_position": {0: "S", 1: "N"}} if decoder.asks_for_distances else {}
    model = _export(
        _DecoderGraph(captioner, spec.memory),
        example,
        dynamic | asked,
        inputs=[*list(dynamic)[:6], *spec.cache, *spec.memory, *asked],
        outputs=["all_log_probs", *map(next_name, spec.cache)],
        optimize=True,
    )
    _append_top_k(model, captioner.text.vocab_size)
    return compress(model), spec


def join_graph(captioner: Captioner, dtype: Dtype = "float32") -> bytes:
    """Returns the graph that copies encoded images into their slots of the decoder's memory."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def floats(name: str, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    nodes, inputs, outputs = [], [], []
    for name, example in _example_memory(captioner, 1).items():
        shape = example.shape[1:]
        chosen = f"chosen_{name}"
        nodes += [
            helper.make_node("Gather", [encoded_name(name), "source"], [chosen], axis=0),
            helper.make_node("ScatterND", [name, "slot", chosen], [next_name(name)]),
        ]
        inputs += [floats(name, "S", *shape), floats(encoded_name(name), "B", *shape)]
        outputs.append(floats(next_name(name), "S", *shape))
    inputs += [
        helper.make_tensor_value_info("source", TensorProto.INT64, ["J"]),
        helper.make_tensor_value_info("slot", TensorProto.INT64, ["J", 1]),
    ]
    graph = helper.make_graph(nodes, "join", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def export_matcher(captioner: Captioner) -> tuple[bytes, MatcherSpec]:
    """Returns the graph that tells how well captions fit encoded images; there is a matcher."""
    assert captioner.matcher is not None
    captions, tokens, images = 5, 7, 3
    encoded = _example(captioner, images)
    spec = MatcherSpec(
        memory=tuple(name for name in encoded if name != IMAGE_EMBEDDING),
        image_embedding=IMAGE_EMBEDDING,
        reranking=captioner.matcher.reranking,
    )
    whole = torch.int64
    example = (
        torch.zeros(captions, tokens, dtype=whole),
        torch.full((captions,), tokens, dtype=whole),
        torch.zeros(captions, dtype=whole),
        list(encoded.values()),
    )
    dynamic = {
        "token_ids": {0: "C", 1: "T"},
        "lengths": {0: "C"},
        "image": {0: "C"},
        "encoded": [{0: "B"} for _ in encoded],
    }
    model = _export(
        _MatcherGraph(captioner, tuple(encoded)),
        example,
        dynamic,
        inputs=["token_ids", "lengths", "image", *encoded],
        outputs=["match", "similarity"],
        optimize=True,
    )
    return compress(model), spec


def _example(captioner: Captioner, images: int) -> dict[str, Tensor]:
    size = (images, 3, captioner.image.height, captioner.image.width)
    with torch.no_grad():
        # Contiguous, as a graph's inputs are: otherwise the exporter asks for their strides.
        found = captioner.encoded(torch.zeros(size))
    return {name: value.contiguous() for name, value in found.items()}


def _example_memory(captioner: Captioner, images: int) -> dict[str, Tensor]:
    found = _example(captioner, images)
    return {name: value for name, value in found.items() if name != IMAGE_EMBEDDING}


class _EncoderGraph(nn.Module):
    def __init__(self, captioner: Captioner) -> None:
        super().__init__()
        self.captioner = captioner

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.captioner.encoded(images.permute(0, 3, 1, 2)).values())


class _DecoderGraph(nn.Module):
    def __init__(self, captioner: Captioner, memory: Sequence[str]) -> None:
        super().__init__()
        self.captioner, self.memory = captioner, memory

    def forward(
        self,
        token_ids: Tensor,
        position: Tensor,
        write: Tensor,
        row_cell: Tensor,
        cell_row: Tensor,
        visible: Tensor,
        cache: list[Tensor],
        memory: list[Tensor],
        node_position: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        tree = TreeCache(
            cache,
            Memory.of(dict(zip(self.memory, memory, strict=True))),
            position,
            write,
            row_cell,
            cell_row,
            visible,
            node_position,
        )
        logits = self.captioner.decoder.logits(token_ids, position, tree)
        return (logits.log_softmax(-1), *tree.written)


class _MatcherGraph(nn.Module):
    def __init__(self, captioner: Captioner, encoded: Sequence[str]) -> None:
        super().__init__()
        self.captioner, self.encoded = captioner, encoded

    def forward(
        self, token_ids: Tensor, lengths: Tensor, image: Tensor, encoded: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        named = dict(zip(self.encoded, encoded, strict=True))
        return self.captioner.match(token_ids, lengths, image, named)


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
