import numpy as np
import pytest

from exports.errors import BundleError
from exports.reference import Reference, features_of


def images(count, *, seed=0, shift=0.0):
    """Returns an encoder's output (B, heads, N, D) whose numbers differ in scale by far."""
    rng = np.random.default_rng(seed)
    scale = np.array([1e-2, 1.0, 50.0, 3.0]).reshape(2, 1, 2)
    own = rng.normal(size=(count, 2, 1, 2)) + shift
    return ((own + 0.1 * rng.normal(size=(count, 2, 5, 2))) * scale).astype(np.float32)


@pytest.fixture
def reference():
    return Reference.fit("k", features_of(images(400)))


def test_a_distance_by_hand():
    reference = Reference(output="k", images=4, mean=(1.0, 2.0), deviation=(0.5, 2.0), usual=1.0)
    values = np.array([[[2.0, 2.0], [2.0, 6.0]]])  # (1, tokens, numbers), on average 2 and 4
    assert reference.distances(values) == pytest.approx(np.sqrt((2**2 + 1**2) / 2))


def test_training_images_are_at_one_and_others_farther(reference):
    assert np.mean(reference.distances(images(400)) ** 2) == pytest.approx(1, abs=1e-4)
    like, unlike = images(500, seed=1), images(500, seed=2, shift=3.0)
    assert np.mean(reference.distances(like) > reference.usual) < 0.04
    assert np.mean(reference.distances(unlike) > reference.usual) > 0.9
    assert reference.images == 400


def test_heads_and_plain_tokens_both_give_one_vector():
    values = images(3)
    assert features_of(values).shape == (3, 4)
    assert features_of(values[:, 0]).shape == (3, 2)
    assert features_of(values.astype(np.float16)).dtype == np.float32


def test_it_reads_what_it_wrote(reference):
    assert Reference.from_json(reference.to_json()) == reference


def test_a_number_that_never_varied_does_not_make_all_others_strange():
    features = np.zeros((8, 2), np.float32)
    features[:, 1] = np.arange(8)
    reference = Reference.fit("k", features)
    assert np.isfinite(reference.distances(features[:, None]))[0]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "the whole file"),
        (b'{"output": "k"}', "images"),
        (
            b'{"output":"k","images":4,"mean":[1],"deviation":[1,2],"usual":1}',
            "1 means, but 2 deviations",
        ),
        (b'{"output":"k","images":4,"mean":[1],"deviation":[0],"usual":1}', "not above 0"),
        (b'{"output":"k","images":4,"mean":[1],"deviation":[1],"usual":1,"x":1}', "x"),
    ],
)
def test_what_cannot_be_a_reference_is_refused(body, words):
    with pytest.raises(BundleError, match=f"reference.json.*{words}"):
        Reference.from_json(body)


def test_another_encoder_is_refused(reference):
    with pytest.raises(BundleError, match="has 4 numbers, but k gives 2"):
        reference.distances(images(1)[:, 0])
