"""Graphs in half precision: what is in half, what is not, and that nothing overflows on the way."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_captioner import TEXT

from exports.manifest import Generation, next_name
from trainer.decoding import best_hypotheses
from trainer.errors import QuantisationError
from trainer.graphs import export_decoder, export_encoder
from trainer.half import to_half
from trainer.onnx_steps import OnnxSteps

IN_FLOATS = {"Softmax", "LogSoftmax", "TopK", "ReduceMean", "ReduceL2", "Pow"}


@pytest.fixture(scope="module")
def captioner(make_captioner):
    return make_captioner()


@pytest.fixture(scope="module")
def graphs(captioner):
    return (*export_encoder(captioner), *export_decoder(captioner))


@pytest.fixture(scope="module")
def halves(graphs):
    encoder, _, decoder, spec = graphs
    arenas = (*spec.memory, *spec.cache, *map(next_name, spec.cache))
    return to_half(encoder, spec.memory), to_half(decoder, arenas)


def types_of(graph: onnx.ModelProto) -> dict[str, str]:
    """The type of every tensor, as a session finds it."""
    shown = onnx.ModelProto.FromString(graph.SerializeToString())
    del shown.graph.output[:]
    names = [name for node in graph.graph.node for name in node.output if name]
    shown.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        shown.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    tensors = [*session.get_inputs(), *session.get_outputs()]
    weights = {w.name: w.data_type for w in graph.graph.initializer}
    kinds = {TensorProto.FLOAT: "tensor(float)", TensorProto.FLOAT16: "tensor(float16)"}
    return {t.name: t.type for t in tensors} | {n: kinds.get(k, "") for n, k in weights.items()}


def test_arenas_products_and_weights_are_in_half_and_choices_are_not(graphs, halves) -> None:
    spec = graphs[3]
    for body in halves:
        model = onnx.load_from_string(body)
        types = types_of(model)
        for node in model.graph.node:
            read = {types[name] for name in node.input if "float" in types.get(name, "")}
            if node.op_type in IN_FLOATS:
                assert read == {"tensor(float)"}, node.name
            elif node.op_type in ("Gemm", "MatMul", "Conv", "MultiHeadAttention", "ScatterND"):
                assert read == {"tensor(float16)"}, node.name
        large = [w for w in model.graph.initializer if np.prod(w.dims) >= 256]
        assert large and all(w.data_type == TensorProto.FLOAT16 for w in large)
        shown = {t.name: types[t.name] for t in (*model.graph.input, *model.graph.output)}
        for name in {*spec.memory, *spec.cache} & set(shown):
            assert shown[name] == "tensor(float16)"
        assert {shown[name] for name in ("visible", "log_probs") if name in shown} <= {
            "tensor(float)"
        }
    assert len(halves[1]) < 0.75 * sum(  # a captioner whose weights nobody rounded: 4 bytes each
        4 * np.prod(w.dims) for w in onnx.load_from_string(graphs[2]).graph.initializer
    )


def test_captions_are_those_of_float32_and_numbers_near(graphs, halves, captioner) -> None:
    _, encoder_spec, _, decoder_spec = graphs
    shape = (24, captioner.image.height, captioner.image.width, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    narrow = decoder_spec.model_copy(update={"dtype": "float16"})
    plain, half = (
        best_hypotheses(steps, images, Generation(max_new_tokens=8))
        for steps in (
            OnnxSteps(graphs[0], graphs[2], encoder_spec, decoder_spec, TEXT),
            OnnxSteps(*halves, encoder_spec, narrow, TEXT),
        )
    )
    pairs = [(a, b) for a, b in zip(plain, half, strict=True) if a.token_ids == b.token_ids]
    assert len(pairs) >= 23
    assert 0 < max(abs(a.score - b.score) for a, b in pairs) < 0.02


def model_of(nodes, weights, width=4) -> bytes:
    tensors = [numpy_helper.from_array(np.array(v, np.float32), k) for k, v in weights.items()]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", width]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def run(body: bytes, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(body, options, providers=["CPUExecutionProvider"])
    [y] = session.run(None, {"x": x})
    return y


def test_squares_that_half_precision_does_not_hold_are_taken_in_float32() -> None:
    node = helper.make_node
    body = model_of(
        [
            node("Pow", ["x", "two"], ["square"]),
            node("ReduceMean", ["square"], ["mean"]),
            node("Add", ["mean", "little"], ["sum"]),
            node("Sqrt", ["sum"], ["root"]),
            node("Reciprocal", ["root"], ["scale"]),
            node("Mul", ["x", "scale"], ["normed"]),
            node("MatMul", ["normed", "weight"], ["y"]),
        ],
        {"two": 2, "little": 1e-6, "weight": np.eye(4)},
    )
    half = to_half(body, ("x", "y"))
    x = np.array([[900, -900, 450, 0]], np.float32)
    found = run(half, x.astype(np.float16))
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, run(body, x), rtol=2e-3)
    assert run(to_half(body, ()), x).dtype == np.float32
    model = onnx.load_from_string(half)  # a CPU may keep float32 between nodes that ask for halves
    types = types_of(model)
    made = {node.op_type: types[node.output[0]] for node in model.graph.node}
    in_floats = ("Pow", "ReduceMean", "Add", "Sqrt", "Reciprocal")
    assert [made[kind] for kind in in_floats] == ["tensor(float)"] * 5
    assert (made["Mul"], made["MatMul"]) == ("tensor(float16)", "tensor(float16)")


def test_weights_beyond_half_precision_are_refused_but_not_masks() -> None:
    largest = np.finfo(np.float32).max
    add = [helper.make_node("Add", ["x", "weight"], ["y"])]
    masked = to_half(model_of(add, {"weight": [0, 1, -largest, -np.inf]}), ("x", "y"))
    found = run(masked, np.zeros((1, 4), np.float16))
    assert found.tolist() == [[0, 1, -65504, -np.inf]]
    with pytest.raises(QuantisationError, match=r"weight does not fit half precision"):
        to_half(model_of(add, {"weight": [0, 1, 2, 1e5]}), ("x", "y"))
