"""The benchmarks are scripts: their modules are found as a script finds them."""

import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests" / "serving")]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that captions at once."""
    from tiny_bundle import write_tiny_bundle

    folder: Path = write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four pictures."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(4):
        gradient = Image.linear_gradient("L").rotate(90 * number)
        gradient.convert("RGB").resize((80, 60)).save(folder / f"{number}.png")
    return folder
