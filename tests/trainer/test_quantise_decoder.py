"""The decode step in integers: close to the floats, really integers, and each row by itself."""

import numpy as np
import onnx
import pytest
from tiny_captioner import TEXT

from exports.manifest import Generation
from trainer.calibration import WEIGHT_LEVELS
from trainer.decoding import best_hypotheses
from trainer.errors import QuantisationError
from trainer.graphs import export_decoder, export_encoder
from trainer.onnx_steps import OnnxSteps
from trainer.quantise_decoder import quantise_decoder

GENERATION = Generation(max_new_tokens=8)


@pytest.fixture(scope="module")
def captioner(make_captioner):
    return make_captioner()


@pytest.fixture(scope="module")
def graphs(captioner):
    return (*export_encoder(captioner), *export_decoder(captioner))


@pytest.fixture(scope="module")
def images(captioner):
    shape = (24, captioner.image.height, captioner.image.width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def steps_of(graphs, decoder=None):
    encoder, encoder_spec, plain, decoder_spec = graphs
    return OnnxSteps(encoder, decoder or plain, encoder_spec, decoder_spec, TEXT)


@pytest.fixture(scope="module")
def integers(graphs, images):
    return quantise_decoder(graphs[2], steps_of(graphs), images[:8], GENERATION)


def test_every_dense_layer_is_integers_and_nothing_else_changes(graphs, integers) -> None:
    plain, found = (onnx.load_from_string(body).graph for body in (graphs[2], integers))
    kinds = [[node.op_type for node in graph.node] for graph in (plain, found)]
    dense = kinds[0].count("Gemm") + kinds[0].count("MatMul")
    assert kinds[1].count("MatMulIntegerToFloat") == dense > 4
    assert not {"Gemm", "MatMul"} & set(kinds[1])
    for kind in ("MultiHeadAttention", "LayerNormalization", "ScatterND", "TopK"):
        assert kinds[1].count(kind) == kinds[0].count(kind)
    assert [one.name for one in found.input] == [one.name for one in plain.input]
    weights = [onnx.numpy_helper.to_array(one) for one in found.initializer]
    matrices = [one for one in weights if one.dtype == np.int8 and one.ndim == 2]
    assert len(matrices) >= dense
    products = [one for one in found.initializer if one.name.endswith(".weight")]
    largest = [abs(onnx.numpy_helper.to_array(one)).max() for one in products if one.data_type == 3]
    assert max(largest) == WEIGHT_LEVELS  # two products of it and 255 fit 16 bits


def test_captions_and_numbers_stay_near(graphs, integers, images) -> None:
    plain, found = (
        best_hypotheses(steps_of(graphs, decoder), images, GENERATION)
        for decoder in (None, integers)
    )
    same = np.mean([a.token_ids == b.token_ids for a, b in zip(plain, found, strict=True)])
    assert same > 0.6
    scores = [
        (a.score, b.score) for a, b in zip(plain, found, strict=True) if a.token_ids == b.token_ids
    ]
    assert 0 < max(abs(a - b) for a, b in scores) < 0.1


def test_numbers_that_are_not_finite_are_refused(graphs, images) -> None:
    model = onnx.load_from_string(graphs[2])
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    [weight] = [one for one in model.graph.initializer if one.name == norm.input[1]]
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0] = np.inf
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    spoilt = model.SerializeToString()
    with pytest.raises(QuantisationError, match="overflows cannot be quantised"):
        quantise_decoder(spoilt, steps_of(graphs, spoilt), images[:2], GENERATION)
