"""What an operator is told about the captions that go out, and the images that come in."""

import math

import numpy as np
import pytest
from live import captions_of, running
from tiny_bundle import MEMORY, picture, write_tiny_bundle

from exports.bundle import Bundle, write_bundle
from exports.reference import REFERENCE_FILE, Reference
from exports.registry import Registry
from exports.wording import words
from serving.captioner import Captioner
from serving.errors import BundleRejected
from serving.params import Caption, Params
from serving.quality import confidence, faults, observe


def caption(text, log_prob=-1.0, tokens=4, **more):
    return Caption(text, log_prob, log_prob, tokens, (1,), **more)


class Told:
    def __init__(self):
        self.captions, self.distances = [], []

    def observe_caption(self, confidence, words, faults):
        self.captions.append((round(confidence, 4), words, faults))

    def observe_distance(self, distance, *, is_strange):
        self.distances.append((distance, is_strange))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a dog runs", []),
        ("a red red bus", ["repetition"]),
        ("A dog in the snow, in the snow.", ["repetition"]),
        ("a dog in the snow in the snow in the", ["repetition", "bad_ending"]),
        ("two dogs and", ["bad_ending"]),
        (" . ", ["empty"]),
    ],
)
def test_faults_of_a_caption(text, found):
    assert faults(words(text)) == found


def test_confidence_is_a_probability_whatever_the_length_penalty():
    assert confidence(caption("a", math.log(0.5) * 4, 4)) == pytest.approx(0.5)
    assert confidence(caption("", -0.0, 0)) == 1


def test_only_the_best_caption_of_each_image_counts():
    told = Told()
    observe(told, [[caption("a dog"), caption("a a")], [caption("a cat runs", -4.0)]])
    assert told.captions == [(0.7788, 2, []), (0.3679, 3, [])]
    assert told.distances == []


@pytest.fixture(scope="module")
def knowing(tmp_path_factory):
    """A bundle that knows what its training images looked like."""
    return write_tiny_bundle(
        tmp_path_factory.mktemp("knowing") / "bundle", version="1", reference=MEMORY[1]
    )


def test_distances_are_of_each_image_whoever_it_is_batched_with(knowing):
    captioner = Captioner.load(knowing, threads=1, cache_bytes=10**6)
    reference = Reference.from_json(Bundle.open(knowing).read(REFERENCE_FILE))
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2, (32, 32, 3)).astype(np.uint8) * 255
    flat = np.full((32, 32, 3), 254, np.uint8)
    pixels = [rng.integers(90, 160, (32, 32, 3), dtype=np.uint8), noise, flat]
    params = [Params.of(captioner.manifest.defaults)]
    together = [one[0].seen for one in captioner.caption_batch(pixels, params * 3)]
    alone = [captioner.caption_batch([one], params)[0][0].seen for one in pixels[::-1]][::-1]
    assert [one.distance for one in together] == pytest.approx([one.distance for one in alone])
    values = captioner._session.encode(np.stack(pixels)).values[1].numpy()
    assert [one.distance for one in together] == pytest.approx(reference.distances(values).tolist())
    assert len({round(one.distance, 3) for one in together}) == 3
    assert [one.is_strange for one in together] == [
        one.distance > reference.usual for one in together
    ]
    assert together[2].is_strange  # nothing but white
    assert captioner._distances == {}


def test_traffic_is_seen_on_the_page(tmp_path, knowing, tiny_bundles):
    registry = Registry(tmp_path)
    registry.publish(tiny_bundles.one, version="1")
    registry.publish(knowing, version="2")
    registry.promote("tiny", "1")
    with running(tmp_path) as live:
        captions = captions_of(live.caption(picture(1)))
        before = live.metrics()
        assert before["cutline_caption_words_sum",] == len(words(captions[0][0]["text"]))
        assert not any("distance" in name for name, *_ in before)  # it cannot tell
        registry.promote("tiny", "2")
        while live.client.get("/readyz").json()["version"] == "1":
            pass
        for seed in range(4):
            captions_of(live.caption(picture(seed)))
        after = live.metrics()
    assert after["cutline_image_distance_count",] == 4
    assert 0.2 < after["cutline_image_distance_sum",] / 4 < 3
    assert after["cutline_caption_words_count",] == 5  # counters go on over a swap
    assert after["cutline_model_info", "2", "tiny"] == 1
    assert ("cutline_model_info", "1", "tiny") not in after


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output": "memory_x.0"}, "reads memory_x.0, which nothing gives"),
        ({"mean": (0.0,), "deviation": (1.0,)}, "has 1 numbers, but memory_v.0 gives 16"),
        (None, "reference.json: the whole file"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(knowing, tmp_path, change, words):
    bundle = Bundle.open(knowing)
    body = b"?"
    if change:
        known = Reference.from_json(bundle.read(REFERENCE_FILE))
        body = known.model_copy(update=change).to_json()
    files = {**bundle.files(), REFERENCE_FILE: body}
    write_bundle(tmp_path / "bad", bundle.manifest.model_copy(update={"files": {}}), files)
    with pytest.raises(BundleRejected, match=words):
        Captioner.load(tmp_path / "bad", threads=1)
