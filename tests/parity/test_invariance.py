"""A caption does not depend on who else is captioned: not its text, nor its score's last bit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exports.bundle import Bundle
from serving.captioner import Captioner
from serving.decode_image import ImageLimits, decode_image
from serving.params import Params
from serving.session import Graphs, OnnxSession

PHOTOS = sorted(Path("tests/photos").glob("*.jpg"))
SHIPPED = Path("exports/models/cutline-base")


class Crowd:
    """A captioner, some photographs, some ways to search, and what each pair gives alone."""

    def __init__(self, captioner: Captioner) -> None:
        self.captioner = captioner
        whole = [decode_image(p.read_bytes(), captioner.image_spec, ImageLimits()) for p in PHOTOS]
        # The photographs, their mirror images and their negatives.
        self.pixels = [*whole, *(one[:, ::-1] for one in whole), *(255 - one for one in whole)]
        usual = Params.of(captioner.manifest.defaults)
        self.ways = [
            usual,
            replace(usual, num_beams=1),
            replace(usual, num_beams=2, num_captions=2, max_new_tokens=6),
            replace(usual, num_beams=3, num_captions=3, length_penalty=0.0),
            replace(usual, num_beams=5, num_captions=5, min_new_tokens=8, no_repeat_ngram_size=2),
            replace(usual, num_beams=9, num_captions=2, prefix="a"),
        ]
        self.alone: dict[tuple[int, int], object] = {}

    def alone_of(self, pair: tuple[int, int]) -> object:
        if pair not in self.alone:
            image, way = pair
            [self.alone[pair]] = self.captioner.caption_batch(
                [self.pixels[image]], [self.ways[way]]
            )
        return self.alone[pair]

    def check(self, rng: np.random.Generator) -> None:
        """Captions a few images that are encoded together and join whenever it happens."""
        count = int(rng.integers(2, 7))
        pairs = list(
            zip(
                rng.integers(len(self.pixels), size=count).tolist(),
                rng.integers(len(self.ways), size=count).tolist(),
                strict=True,
            )
        )
        expected = [self.alone_of(pair) for pair in pairs]
        encoded = self.captioner.encode([self.pixels[image] for image, _ in pairs])
        waiting, running, found = list(range(count)), {}, {}
        while len(found) < count:
            while waiting and (not running or rng.random() < 0.4):
                place = waiting.pop()
                way = self.ways[pairs[place][1]]
                running[self.captioner.join(encoded[place], way)] = place
            for slot, result in self.captioner.step():
                found[running.pop(slot)] = result
        assert [found[place] for place in range(count)] == expected


@pytest.fixture(scope="module")
def crowds(exported: tuple[Path, Path], exported_fp16: Path) -> dict[str, Crowd]:
    """The shipped model, which computes in integers, and a small one in floats and in halves."""
    shipped = max(SHIPPED.glob("[0-9]*"), key=lambda path: path.name)
    folders = {"int8": shipped, "fp32": exported[1], "fp16": exported_fp16}
    return {kind: Crowd(_captioner(folder)) for kind, folder in folders.items()}


def _captioner(path: Path) -> Captioner:
    bundle = Bundle.open(path)
    session = OnnxSession(Graphs.read(bundle), bundle.manifest, threads=2)
    # Room to keep every photograph encoded would hide what encoding together may change.
    return Captioner(bundle.manifest, bundle.tokenizer(), session, cache_bytes=0)


@pytest.mark.parametrize("kind", ["int8", "fp32", "fp16"])
@pytest.mark.parametrize("seed", range(15))
def test_captions_are_the_same_in_any_company(
    crowds: dict[str, Crowd], kind: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(10):
        crowds[kind].check(rng)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "fp32", "fp16"])
def test_captions_are_the_same_in_any_of_ten_thousand(crowds: dict[str, Crowd], kind: str) -> None:
    rng = np.random.default_rng(99)
    for _ in range(5000):
        crowds[kind].check(rng)
