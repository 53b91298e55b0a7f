"""What export writes of the training images, and the server reads: one number for both."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exports.bundle import Bundle, write_bundle
from exports.reference import REFERENCE_FILE
from serving.captioner import Captioner
from serving.params import Params
from trainer.photos import load_pixels
from trainer.run import Data, Run
from trainer.stages._bundle import Graphs
from trainer.stages._reference import training_reference


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
    exported: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    run, path = exported
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    assert REFERENCE_FILE not in manifest.files  # four images tell nothing
    graphs = Graphs(
        bundle.read("encoder.onnx"), manifest.encoder, bundle.read("decoder.onnx"), manifest.decoder
    )
    image = Run(run).recipe.image
    reference = training_reference(graphs, Data(train=folder), image)
    assert reference is not None
    files = {**bundle.files(), REFERENCE_FILE: reference.to_json()}
    write_bundle(tmp_path / "with", manifest, files)
    captioner = Captioner.load(tmp_path / "with", threads=1)
    noise = np.random.default_rng(1).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    pixels = [*(load_pixels(one, image) for one in sorted(folder.glob("*.png"))), noise]
    found = captioner.caption_batch(pixels, [Params.of(manifest.defaults)] * len(pixels))
    seen = [captions[0].seen for captions in found]
    assert np.mean([one.distance**2 for one in seen[:-1]]) == pytest.approx(1, abs=0.05)
    assert sum(one.is_strange for one in seen[:-1]) <= 2
    assert seen[-1].is_strange


def test_training_images_that_are_gone_cost_the_reference_alone(
    exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle.open(exported[1])
    manifest = bundle.manifest
    graphs = Graphs(b"", manifest.encoder, b"", manifest.decoder)
    assert training_reference(graphs, Data(train=tmp_path / "gone"), manifest.image) is None
    assert "will not tell how far" in capsys.readouterr().out
