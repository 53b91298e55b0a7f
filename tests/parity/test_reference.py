"""What export writes of the training images, and the server reads: one number for both."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))  # where the tiny bundle is

from tiny_bundle import write_tiny_bundle

from exports.bundle import Bundle, write_bundle
from exports.reference import REFERENCE_FILE
from serving.captioner import Captioner
from serving.params import Params
from trainer.photos import load_pixels
from trainer.run import Data
from trainer.stages._bundle import Graphs
from trainer.stages._reference import training_reference


@pytest.fixture
def tiny(tmp_path: Path) -> Bundle:
    """A bundle that cannot tell, of the server's tests."""
    return Bundle.open(write_tiny_bundle(tmp_path / "tiny"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of one kind: dim, smooth, greenish."""
    rng = np.random.default_rng(0)
    place = tmp_path / "pictures"
    place.mkdir()
    for number in range(24):
        coarse = rng.integers(40, 90, (3, 3, 3), dtype=np.uint8) + np.uint8([0, 60, 0])
        Image.fromarray(coarse).resize((96, 64)).save(place / f"{number}.png")
    return place


def test_the_server_tells_strange_images_from_those_of_the_training(
    tiny: Bundle, folder: Path, tmp_path: Path
) -> None:
    manifest = tiny.manifest
    graphs = Graphs(tiny.read("encoder.onnx"), manifest.encoder, b"", manifest.decoder)
    image = manifest.image
    reference = training_reference(graphs, Data(train=folder), image)
    assert reference is not None
    files = {**tiny.files(), REFERENCE_FILE: reference.to_json()}
    write_bundle(tmp_path / "with", manifest.model_copy(update={"files": {}}), files)
    captioner = Captioner.load(tmp_path / "with", threads=1)
    noise = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = [*(load_pixels(one, image) for one in sorted(folder.glob("*.png"))), noise]
    found = captioner.caption_batch(pixels, [Params.of(manifest.defaults)] * len(pixels))
    seen = [captions[0].seen for captions in found]
    assert np.mean([one.distance**2 for one in seen[:-1]]) == pytest.approx(1, abs=0.05)
    assert sum(one.is_strange for one in seen[:-1]) <= 2
    assert seen[-1].is_strange


def test_training_images_that_are_gone_cost_the_reference_alone(
    tiny: Bundle, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graphs = Graphs(b"", tiny.manifest.encoder, b"", tiny.manifest.decoder)
    image = tiny.manifest.image
    assert training_reference(graphs, Data(train=tmp_path / "gone"), image) is None
    assert "will not tell how far" in capsys.readouterr().out
    for place in sorted(folder.iterdir())[15:]:
        place.unlink()
    assert training_reference(graphs, Data(train=folder), image) is None
    assert "15 training images are too few" in capsys.readouterr().out
