"""The encoder in integers: near the floats, the same in every batch, and really in integers."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_captioner import VIT

from trainer.calibration import Range, Ranges, observe
from trainer.errors import QuantisationError
from trainer.graphs import export_encoder
from trainer.quantise_encoder import quantise_encoder
from trainer.rounding import Moments, round_together, scales

# ReLU, squeeze and excitation with SiLU, average pooling, residuals.
CNN = {"name": "timm_cnn", "model": "test_byobnet"}
UNIFORM = {"mean": (127.0,) * 3, "std": (128.0,) * 3}
ENCODERS = {
    "cnn": {**CNN, **UNIFORM},
    "cnn, channels normalised apart": CNN,
    "vit": VIT,
}


def photographs(count: int, seed: int) -> np.ndarray:
    """Smooth images (count, 32, 48, 3): noise would tell nothing of ranges."""
    draw = np.random.default_rng(seed)
    coarse = draw.uniform(0, 255, (count, 5, 7, 3))
    fine = coarse.repeat(8, 1).repeat(8, 2)[:, :32, :48] + draw.normal(0, 12, (count, 32, 48, 3))
    return fine.clip(0, 255).astype(np.uint8)


def settle(captioner):
    """Gives BatchNorm the statistics of the images, as training does."""
    captioner.encoder.train()
    with torch.no_grad():
        for _ in range(15):
            captioner.encoder(torch.from_numpy(photographs(16, 0)).permute(0, 3, 1, 2))
    return captioner.eval()


@pytest.fixture(scope="module")
def graphs():
    """Float and integer graph by kind of encoder, made once."""
    return {}


@pytest.fixture(params=list(ENCODERS))
def pair(request, graphs, make_captioner) -> tuple[str, bytes, bytes]:
    kind = request.param
    if kind not in graphs:
        captioner = settle(make_captioner(encoder=ENCODERS[kind]))
        plain = export_encoder(captioner)[0]
        batches = (photographs(12, seed) for seed in (1, 2))
        graphs[kind] = (plain, quantise_encoder(plain, batches))
    return kind, *graphs[kind]


def run(graph: bytes, images: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2)))


def kernels(graph: bytes, folder: Path) -> Counter[str]:
    """What a session makes of the graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    model = onnx.load(folder / "optimised.onnx")
    return Counter(node.op_type for node in model.graph.node)


def test_outputs_are_near_those_of_the_floats(pair) -> None:
    _, plain, integers = pair
    images = photographs(8, 3)
    for a, b in zip(run(plain, images), run(integers, images), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert difference(a, b) < 0.08


def test_an_image_gives_the_same_in_every_batch(pair) -> None:
    _, _, integers = pair
    images = photographs(9, 4)
    alone = [run(integers, image[None]) for image in images]
    for order in (range(9), (8, 0, 3), (5, 5, 5, 1), (2, 7)):
        for place, memory in enumerate(zip(*run(integers, images[list(order)]), strict=True)):
            for a, b in zip(alone[order[place]], memory, strict=True):
                assert np.array_equal(a[0], b)


def test_products_are_made_of_integers(pair, tmp_path: Path) -> None:
    kind, _, integers = pair
    found = kernels(integers, tmp_path)
    assert not found["Conv"] and not found["Relu"] and not found["Gemm"] and not found["FusedConv"]
    assert found["QGemm"] == 2  # keys and values of the decoder's two layers
    assert found["MatMul"] + found["FusedMatMul"] == (2 if kind != "vit" else 6)  # of attention
    if kind == "vit":
        assert found["QLinearConv"] == 1 and found["MatMulIntegerToFloat"] == 13
    else:
        assert found["QLinearConv"] == 22 and found["MatMulIntegerToFloat"] == 5
        assert found["QLinearAdd"] == found["QLinearMul"] == found["QLinearAveragePool"] == 4


def test_pixels_are_the_first_integers_where_that_is_exact(pair) -> None:
    kind, _, integers = pair
    model = onnx.load_from_string(integers)
    maker = {node.output[0]: node for node in model.graph.node}
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    widen = maker[first.input[0]]
    assert widen.op_type == "DequantizeLinear"
    # The patches of a ViT are cut without padding, so that any normalisation goes into its weights.
    made_by = maker[widen.input[0]].op_type
    assert made_by == ("QuantizeLinear" if "apart" in kind else "Transpose")


def test_weights_are_stored_as_integers(pair) -> None:
    _, _, integers = pair
    model = onnx.load_from_string(integers)
    floats = [w for w in model.graph.initializer if w.data_type == TensorProto.FLOAT]
    whole = [w for w in model.graph.initializer if w.data_type == TensorProto.INT8]
    size = {w.name: int(np.prod(w.dims)) for w in [*floats, *whole]}
    assert sum(size[w.name] for w in whole if not w.name.endswith(".zero")) > 20_000
    assert max(size[w.name] for w in floats) <= 1280
    assert {o.domain for o in model.opset_import} == {""}


def test_nothing_to_calibrate_on_is_an_error(pair) -> None:
    _, plain, _ = pair
    for batches in ([], [np.zeros((0, 32, 48, 3), np.uint8)]):
        with pytest.raises(QuantisationError, match="at least one image is needed"):
            quantise_encoder(plain, batches)


def two_convolutions(low: float) -> bytes:
    """Pixels, a convolution, Clip(low, 6), a convolution without bias; channels of zeros."""
    draw = np.random.default_rng(0)
    weights = {
        "w1": draw.normal(0, 0.02, (8, 3, 3, 3)),
        "b1": draw.normal(size=8),
        "w2": draw.normal(size=(4, 2, 3, 3)),
        "low": np.array(low),
        "high": np.array(6),
    }
    weights["w1"][2] = weights["b1"][3] = weights["w1"][4] = weights["b1"][4] = 0
    graph = helper.make_graph(
        [
            helper.make_node("Transpose", ["images"], ["turned"], perm=[0, 3, 1, 2]),
            helper.make_node("Cast", ["turned"], ["x"], to=TensorProto.FLOAT),
            helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], strides=[2, 2]),
            helper.make_node("Clip", ["c1", "low", "high"], ["cut"]),
            helper.make_node("Conv", ["cut", "w2"], ["c2"], group=4, dilations=[2, 2]),
            helper.make_node("Softmax", ["c2"], ["y"], axis=1),
        ],
        "two",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 32, 48, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 11, 19])],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


@pytest.mark.parametrize("low", [0, -1])
def test_a_clip_goes_into_the_range_where_it_begins_at_0(low: float, tmp_path: Path) -> None:
    plain = two_convolutions(low)
    integers = quantise_encoder(plain, [photographs(20, 1)])
    found = kernels(integers, tmp_path)
    assert found["QLinearConv"] == 2
    assert found["Clip"] == (low != 0)
    images = photographs(4, 2)
    ((a,), (b,)) = run(plain, images), run(integers, images)
    assert np.abs(a - b).mean() < 0.02


def test_weights_take_no_more_levels_than_asked() -> None:
    for levels in (127, 63):
        integers = quantise_encoder(two_convolutions(0), [photographs(4, 1)], levels=levels)
        weights = onnx.load_from_string(integers).graph.initializer
        largest = max(
            int(np.abs(numpy_helper.to_array(w).astype(int)).max())
            for w in weights
            if w.data_type == TensorProto.INT8
        )
        assert largest == levels


def square(scale: float) -> onnx.ModelProto:
    """The graph y = scale * x * x, with the tensor `scaled` on the way."""
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "scale"], ["scaled"]),
            helper.make_node("Mul", ["scaled", "x"], ["y"]),
        ],
        "square",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        [numpy_helper.from_array(np.float32(scale).reshape(()), "scale")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def collect_ranges(model, tensors, feeds, *, outside=0.0):
    ranges = Ranges(outside)
    for values in observe(model, tensors, feeds):
        ranges.add(values)
    return ranges.found()


def test_ranges_are_the_extremes_or_quantiles_of_the_calls() -> None:
    feeds = [{"x": np.arange(-3, 98, dtype=np.float32)}, {"x": np.array([-5.0, 1], np.float32)}]
    found = collect_ranges(square(2), ["scaled", "y", "x"], feeds)
    assert found == {"scaled": (-10, 194), "y": (0, 2 * 97**2), "x": (-5, 97)}
    assert found["scaled"].largest == 194
    cut = collect_ranges(square(2), ["x"], feeds[:1], outside=0.03)
    assert cut == {"x": Range(0, 94)}
    both = collect_ranges(square(2), ["x"], feeds, outside=0.03)
    assert both == {"x": Range(-2.5, 47.5)}


@pytest.mark.parametrize("outside", [0.0, 0.1])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_ranges_that_are_not_finite_are_an_error(value: float, outside: float) -> None:
    feeds = [{"x": np.ones(20, np.float32)}, {"x": np.full(20, value, np.float32)}]
    with pytest.raises(QuantisationError, match=r"scaled takes values from .* cannot be quantised"):
        collect_ranges(square(2), ["scaled"], feeds, outside=outside)


def test_weights_rounded_together_lose_less_than_each_by_itself() -> None:
    draw = np.random.default_rng(0)
    mixing = draw.normal(size=(12, 12))
    inputs = (draw.normal(size=(4000, 2, 12)) @ mixing + 3).astype(np.float32)
    weights = draw.normal(size=(2, 5, 12)).astype(np.float32)
    scale = scales(weights, 127) * 8  # coarse, so that rounding tells
    moments = Moments()
    moments.add(inputs[:1000])
    moments.add(inputs[1000:])
    columns = inputs.transpose(1, 0, 2)
    assert moments.mean() == pytest.approx(columns.mean(1), abs=1e-3)
    second = moments.second(centred=False)
    assert second == pytest.approx(columns.swapaxes(1, 2) @ columns / 4000, rel=1e-3, abs=1e-2)

    def loss(rounded: np.ndarray) -> float:
        error = columns @ (weights - rounded * scale).swapaxes(1, 2)
        return float(np.mean(error**2))

    together, apart = (round_together(weights, scale, s, 127) for s in (second, None))
    assert np.array_equal(apart, np.rint(weights / scale).astype(np.int8))
    assert loss(together) < 0.5 * loss(apart)


def test_rows_and_inputs_of_zeros_are_no_trouble() -> None:
    weights = np.zeros((1, 2, 3), np.float32)
    weights[0, 1] = 1
    rounded = round_together(weights, scales(weights, 63), np.zeros((1, 3, 3)), 63)
    assert rounded.tolist() == [[[0, 0, 0], [63, 63, 63]]]
