"""The ONNX session against the plain `InferenceSession.run` of the same graphs."""

import numpy as np
import onnxruntime as ort
import pytest
from tiny_bundle import HEAD_DIM, HEADS, MEMORY, PAST, SIDE, TEXT, V

from exports.bundle import Bundle
from serving.errors import BundleRejected
from serving.session import OnnxSession


@pytest.fixture(scope="module")
def bundle(tiny_bundles):
    return Bundle.open(tiny_bundles.one)


@pytest.fixture(scope="module")
def session(bundle):
    return OnnxSession(
        bundle.read("encoder.onnx"), bundle.read("decoder.onnx"), bundle.manifest, threads=1
    )


def pixels(count):
    return np.random.default_rng(7).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


class PlainDecoding:
    """The same steps without bindings: every cache and the whole memory go through numpy."""

    def __init__(self, bundle, images):
        encoder = ort.InferenceSession(bundle.read("encoder.onnx"))
        self.decoder = ort.InferenceSession(bundle.read("decoder.onnx"))
        self.memory = encoder.run(list(MEMORY), {"images": images})
        self.caches = None
        self.position = 0

    def step(self, token_ids, beam_index, top_k, images):
        if images is not None:
            self.memory = [memory[images] for memory in self.memory]
        if self.caches is None:
            empty = np.zeros((len(token_ids), HEADS, 0, HEAD_DIM), dtype=np.float32)
            self.caches = [empty] * len(PAST)
        log_probs, ids, *self.caches = self.decoder.run(
            None,
            {
                "token_ids": token_ids,
                "position": np.array(self.position),
                "beam_index": beam_index,
                "top_k": np.array([top_k]),
                **dict(zip(PAST, self.caches, strict=True)),
                **dict(zip(MEMORY, self.memory, strict=True)),
            },
        )
        self.position += 1
        return log_probs, ids


# token_ids, beam_index, top_k, images: 5 images of 1, then 3, then 2 rows; images leave twice.
STEPS = [
    ([1] * 5, range(5), 7, None),
    (range(4, 19), np.repeat(range(5), 3), 5, None),
    ([9, 8, 7, 6, 5, 4, 4, 5], [1, 0, 13, 14, 6, 8, 11, 9], 9, [0, 4, 2, 3]),
    ([11, 12, 13, 14], [0, 0, 7, 6], V + 5, [0, 3]),
    ([15, 16, 17, 18], [0, 1, 3, 3], 1, [0, 1]),
    ([19], [2], 3, [1]),
]


def test_equals_plain_runs_while_rows_widen_reorder_and_images_leave(bundle, session):
    plain = PlainDecoding(bundle, pixels(5))
    decoding = session.start(session.encode(pixels(5)))
    for token_ids, beam_index, top_k, images in STEPS:
        arguments = (
            np.array(token_ids),
            np.array(beam_index),
            top_k,
            None if images is None else np.array(images),
        )
        log_probs, ids = decoding.step(*arguments)
        expected_log_probs, expected_ids = plain.step(*arguments)
        assert ids.shape == (len(arguments[0]), min(top_k, V))
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(log_probs, expected_log_probs, rtol=1e-5, atol=1e-6)


def test_two_batches_in_turn_do_not_touch_each_other(session):
    def first_step(decoding):
        return decoding.step(np.full(2, TEXT.bos_id), np.arange(2), 3, None)

    def second_step(decoding):
        return decoding.step(np.array([5, 6]), np.arange(2), 3, None)

    alone = session.start(session.encode(pixels(2)))
    first_step(alone)
    expected = second_step(alone)
    one = session.start(session.encode(pixels(2)))
    other = session.start(session.encode(pixels(4)[2:]))
    first_step(one)
    first_step(other)
    second_step(other)
    found = second_step(one)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_the_observer_hears_of_every_run(session):
    class Observer:
        encodes, steps = 0, 0

        def observe_encode(self, seconds):
            assert 0 < seconds < 10
            self.encodes += 1

        def observe_step(self, seconds):
            assert 0 < seconds < 10
            self.steps += 1

    observer = Observer()
    decoding = session.start(session.encode(pixels(1), observer), observer)
    for _ in range(3):
        decoding.step(np.array([4]), np.array([0]), 2, None)
    assert (observer.encodes, observer.steps) == (1, 3)


def test_graphs_that_the_manifest_does_not_describe_are_refused(bundle):
    encoder, decoder = bundle.read("encoder.onnx"), bundle.read("decoder.onnx")
    with pytest.raises(BundleRejected, match="the encoder has the inputs"):
        OnnxSession(decoder, decoder, bundle.manifest, threads=1)
    with pytest.raises(BundleRejected, match="the decoder has the inputs"):
        OnnxSession(encoder, encoder, bundle.manifest, threads=1)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="CUDA is there"
)
def test_cuda_where_there_is_none_is_said_and_auto_does_without(bundle):
    graphs = bundle.read("encoder.onnx"), bundle.read("decoder.onnx"), bundle.manifest
    with pytest.raises(BundleRejected, match="no CUDA here"):
        OnnxSession(*graphs, threads=1, provider="cuda")
    assert OnnxSession(*graphs, threads=1, provider="auto").device == "cpu"
