"""The ONNX session against the plain `InferenceSession.run` of the same graphs."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from tiny_bundle import CACHE, HEAD_DIM, HEADS, MEMORY, SIDE

from exports.bundle import Bundle
from exports.manifest import next_name
from serving import session as module
from serving.beam import Beams
from serving.errors import BundleRejected
from serving.group import BeamParams
from serving.session import Graphs, OnnxSession
from serving.step_model import Rows


@pytest.fixture(scope="module")
def bundle(tiny_bundles):
    return Bundle.open(tiny_bundles.one)


@pytest.fixture(scope="module")
def session(bundle):
    return OnnxSession(Graphs.read(bundle), bundle.manifest, threads=1)


def pixels(count):
    return np.random.default_rng(7).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


class Watched:
    """A decoding whose every step is done again by a plain run, all through numpy, and compared."""

    def __init__(self, bundle, session, slots):
        self.decoding = session.decoding(slots)
        self.bos_id, self.eos_id = self.decoding.bos_id, self.decoding.eos_id
        self.vocab_size, self.max_length = self.decoding.vocab_size, self.decoding.max_length
        self.encoder = ort.InferenceSession(bundle.read("encoder.onnx"))
        self.decoder = ort.InferenceSession(bundle.read("decoder.onnx"))
        self.session, self.shapes = session, set()
        self.memory = [None] * slots  # per slot, arrays (H, M, Dh)
        self.caches = np.zeros((len(CACHE), slots, HEADS, 0, HEAD_DIM), np.float32)

    def place(self, images, slots):
        self.decoding.place(self.session.encode(images), range(len(images)), slots)
        arrays = self.encoder.run(list(MEMORY), {"images": images})
        for place, slot in enumerate(slots):
            self.memory[slot] = [array[place] for array in arrays]

    def step(self, rows, top_k):
        log_probs, ids = self.decoding.step(rows, top_k)
        slots, width, nodes = rows.visible.shape
        room = nodes - self.caches.shape[3]
        self.caches = np.pad(self.caches, [(0, room if axis == 3 else 0) for axis in range(5)])
        cells = np.zeros((slots, width), np.int64)
        cells[rows.slot, rows.column] = np.arange(len(rows.slot))
        where = np.broadcast_arrays(rows.slot[:, None], np.arange(HEADS), rows.node[:, None])
        blank = [np.zeros_like(array) for array in next(m for m in self.memory if m)]
        memory = [m or blank for m in self.memory[:slots]]
        expected_log_probs, expected_ids, *caches = self.decoder.run(
            ["log_probs", "ids", *map(next_name, CACHE)],
            {
                "token_ids": rows.token_ids,
                "position": rows.position,
                "write": np.stack(where, axis=2),
                "row_cell": np.stack([rows.slot, rows.column], axis=1),
                "cell_row": cells,
                "visible": rows.visible[:, None],
                "top_k": np.array([top_k]),
                **dict(zip(CACHE, self.caches[:, :slots], strict=True)),
                **{
                    name: np.stack(m)
                    for name, m in zip(MEMORY, zip(*memory, strict=True), strict=True)
                },
            },
        )
        self.caches[:, :slots] = caches
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(log_probs, expected_log_probs, rtol=1e-5, atol=1e-6)
        self.shapes.add((len(rows.slot), slots, width, nodes))
        return log_probs, ids

    def clear(self, slot):
        self.decoding.clear(slot)


@pytest.mark.parametrize("by_copy", [False, True])  # as on a CPU, and as on a device
def test_equals_plain_runs_while_images_join_widen_and_leave(bundle, session, by_copy):
    rng = np.random.default_rng(0)
    model = Watched(bundle, session, slots=4)
    model.decoding._feeds_by_copy = by_copy
    beams, left = Beams(model, slots=4), 24
    while left or beams.images:
        while left and beams.images < 4 and (not beams.images or rng.random() < 0.5):
            width = int(rng.choice([1, 2, 3, 6]))
            params = BeamParams(width, 1, int(rng.integers(1, 18)), 0, 1.0, int(rng.choice([0, 2])))
            model.place(pixels(24)[left - 1 : left], [beams.join(params)])
            left -= 1
        beams.advance()
    assert len(model.shapes) > 20  # and the arenas have grown
    assert {nodes for *_, nodes in model.shapes} >= {16, 32, 48}


def lone_rows(token, position):
    """Returns one row of a greedy search."""
    visible = np.full((1, 2, 16), -np.inf, np.float32)
    visible[0, 0, : position + 1] = 0
    one = [np.array([value]) for value in (token, position, 0, 0, position)]
    return Rows(*one, visible=visible, node_position=np.arange(16)[None])


def test_two_decodings_do_not_touch_each_other_and_a_cleared_slot_is_as_new(session):
    def decode(decoding, steps):
        found = [decoding.step(lone_rows(token, n), 3)[0].copy() for n, token in enumerate(steps)]
        return np.concatenate(found)

    memory, other = session.encode(pixels(1)), session.encode(pixels(2))
    one, two = session.decoding(1), session.decoding(2)
    one.place(memory, [0], [0])
    two.place(other, [1], [0])
    expected = decode(one, [1, 5, 6])
    decode(two, [1, 9, 9])
    np.testing.assert_array_equal(decode(one, [1, 5, 6]), expected)
    poisoned = one._cache[CACHE[0]]
    poisoned.update_inplace(np.full(poisoned.shape(), np.nan, np.float32))
    assert np.isnan(one.step(lone_rows(1, 3), 3)[0]).all()
    one.clear(0)
    one.place(memory, [0], [0])
    np.testing.assert_array_equal(decode(one, [1, 5, 6]), expected)


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
    decoding = session.decoding(1)
    decoding.place(session.encode(pixels(1), observer), [0], [0])
    decoding.observer = observer
    for position in range(3):
        decoding.step(lone_rows(4, position), 2)
    assert (observer.encodes, observer.steps) == (1, 3)


def test_graphs_that_the_manifest_does_not_describe_are_refused(bundle):
    graphs = Graphs.read(bundle)
    for wrong, told in (
        (graphs._replace(encoder=graphs.decoder), "the encoder has the inputs"),
        (graphs._replace(decoder=graphs.encoder), "the decoder has the inputs"),
        (graphs._replace(join=graphs.encoder), "the join has the inputs"),
    ):
        with pytest.raises(BundleRejected, match=told):
            OnnxSession(wrong, bundle.manifest, threads=1)


def test_graphs_of_another_precision_than_the_manifest_s_are_refused(bundle):
    half = bundle.manifest.decoder.model_copy(update={"dtype": "float16"})
    manifest = bundle.manifest.model_copy(update={"decoder": half})
    told = r"the encoder has memory_k.0 as tensor\(float\), not in float16"
    with pytest.raises(BundleRejected, match=told):
        OnnxSession(Graphs.read(bundle), manifest, threads=1)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="CUDA is there"
)
def test_cuda_where_there_is_none_is_said_and_auto_does_without(bundle):
    graphs = Graphs.read(bundle), bundle.manifest
    with pytest.raises(BundleRejected, match="no CUDA here"):
        OnnxSession(*graphs, threads=1, provider="cuda")
    assert OnnxSession(*graphs, threads=1, provider="auto").device == "cpu"


@pytest.mark.parametrize("gpus", [0, 1])
def test_auto_takes_cuda_only_where_there_is_a_gpu(gpus, monkeypatch):
    """The image for GPUs also serves on a machine without one."""
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: both)
    monkeypatch.setattr(module, "_gpus", lambda: gpus)
    assert module._device("auto") == ("cuda" if gpus else "cpu")
    assert module._device("cuda") == "cuda"  # asked for: it starts, or says why not


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_no_driver_is_no_gpu():
    assert module._gpus() == 0
