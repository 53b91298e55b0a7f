"""Features are kept by the bytes of a file and the weights of an encoder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_captioner import VIT

from exports.images import ImageSpec
from trainer import feature_store, variants
from trainer.data import Example, read_examples
from trainer.errors import CheckpointError, DataError
from trainer.feature_store import FeatureStore
from trainer.features import pooled_features
from trainer.photos import load_all, scan_images

IMAGE = ImageSpec(height=32, width=32)


def make_encoder(seed: int = 0):
    torch.manual_seed(seed)
    module, config = variants.parse("encoders", VIT)
    return module.Encoder(config, (32, 32)).eval()


@pytest.fixture(autouse=True)
def encoded(monkeypatch) -> list[int]:
    """How many images were encoded, each time that some were; files hold 10."""
    counts = []

    def counted(encoder, images):
        counts.append(len(images))
        return pooled_features(encoder, images)

    monkeypatch.setattr(feature_store, "pooled_features", counted)
    monkeypatch.setattr(feature_store, "IMAGES_OF_A_FILE", 10)
    return counts


def store(folder: Path, *, seed: int = 0, table=VIT, image: ImageSpec = IMAGE) -> FeatureStore:
    return FeatureStore(folder, make_encoder(seed), table, image)


def test_they_are_unit_vectors_in_the_order_of_the_images(shapes, tmp_path: Path, encoded) -> None:
    examples = read_examples(shapes / "images")[:25]
    found = store(tmp_path).encode(examples)
    assert found.examples == examples and encoded == [10, 10, 5]
    plain = pooled_features(make_encoder(), load_all(examples, IMAGE)).numpy()
    expected = plain / np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(found.features, expected, atol=1e-6)
    scan = scan_images(examples)
    assert found.fingerprints == [scan.fingerprints[one.image] for one in examples]
    again = store(tmp_path).encode(examples[::-1])
    assert encoded == [10, 10, 5]
    assert np.array_equal(again.features, found.features[::-1])
    assert again.fingerprints == found.fingerprints[::-1]


def test_only_what_is_new_is_encoded_wherever_it_lies(shapes, tmp_path: Path, encoded) -> None:
    examples = read_examples(shapes / "images")[:12]
    first = store(tmp_path).encode(examples[:7])
    moved = tmp_path / "elsewhere.png"
    moved.write_bytes(examples[3].image.read_bytes())
    found = store(tmp_path).encode([Example(moved, (), None), *examples])
    assert encoded == [7, 5]
    assert np.array_equal(found.features[0], first.features[3])
    assert np.array_equal(found.features[1:8], first.features)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"table": {**VIT, "drop_path": 0.1}},
        {"image": IMAGE.model_copy(update={"resize": "center_crop"})},
    ],
)
def test_another_encoder_has_features_of_its_own(change, shapes, tmp_path: Path, encoded) -> None:
    examples = read_examples(shapes / "images")[:4]
    store(tmp_path).encode(examples)
    store(tmp_path, **change).encode(examples)
    assert encoded == [4, 4]
    # The same weights, wherever they came from.
    store(tmp_path, table={**VIT, "weights": "runs/a"}).encode(examples)
    assert encoded == [4, 4]


def test_an_encoding_that_was_killed_goes_on(shapes, tmp_path: Path, encoded, monkeypatch) -> None:
    examples = read_examples(shapes / "images")[:30]
    whole = store(tmp_path / "whole").encode(examples)
    true = feature_store.pooled_features

    def killed(encoder, images):
        if len(encoded) == 5:
            raise KeyboardInterrupt
        return true(encoder, images)

    monkeypatch.setattr(feature_store, "pooled_features", killed)
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "killed").encode(examples)
    monkeypatch.setattr(feature_store, "pooled_features", true)
    found = store(tmp_path / "killed").encode(examples)
    assert encoded == [10, 10, 10, 10, 10, 10]
    assert np.array_equal(found.features, whole.features)


def test_what_does_not_decode_is_named_and_left_out(shapes, tmp_path: Path, capsys) -> None:
    good = read_examples(shapes / "images")[:2]
    bad, gone = tmp_path / "bad.jpg", tmp_path / "gone.jpg"
    bad.write_text("no")
    others = [Example(bad, (), None), Example(gone, (), None)]
    for _ in range(2):  # also where features of the good ones are there
        found = store(tmp_path).encode([others[0], *good, others[1]])
        assert found.examples == good
        said = capsys.readouterr().out
        assert f"{bad}: not an image that Pillow can open" in said
        assert f"{gone}: no such file" in said
    with pytest.raises(DataError, match="no image can be decoded"):
        store(tmp_path).encode(others)


def test_an_image_that_changed_is_encoded_anew(tmp_path: Path, encoded) -> None:
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0)
    features = []
    for _ in range(2):
        Image.fromarray(noise.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
        features.append(store(tmp_path).encode([Example(path, (), None)]).features)
    assert encoded == [1, 1]
    assert not np.allclose(*features)


def test_features_that_are_no_numbers_are_refused(shapes, tmp_path: Path, monkeypatch) -> None:
    nothing = torch.full((2, 4), torch.nan)
    monkeypatch.setattr(feature_store, "pooled_features", lambda encoder, images: nothing)
    with pytest.raises(DataError, match="features are not finite numbers"):
        store(tmp_path).encode(read_examples(shapes / "images")[:2])
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_damaged_file_says_what_to_do(shapes, tmp_path: Path) -> None:
    examples = read_examples(shapes / "images")[:4]
    store(tmp_path).encode(examples)
    (path,) = tmp_path.rglob("*.safetensors")
    body = bytearray(path.read_bytes())
    body[-3] ^= 1
    path.write_bytes(body)
    with pytest.raises(CheckpointError, match=r"00000.safetensors: .*damaged.*remove this file"):
        store(tmp_path).encode(examples)
