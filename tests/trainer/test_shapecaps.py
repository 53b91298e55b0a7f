"""ShapeCaps: what a caption claims is in the picture."""

import random

import numpy as np

from trainer.data import read_examples
from trainer.stages.shapecaps import COLOURS, scene


def test_a_caption_is_true() -> None:
    draw = random.Random(5)
    for _ in range(40):
        image, captions = scene(draw, 64)
        pixels = np.asarray(image).astype(int)
        first, relation, second = _parts(captions[0])
        places = [_centre(pixels, COLOURS[name.split()[0]]) for name in (first, second)]
        axis = 1 if relation == "left of" else 0
        assert places[0][axis] < places[1][axis], captions[0]
        for caption in captions:
            assert first in caption and second in caption


def _parts(caption):
    relation = "left of" if "left of" in caption else "above"
    first, second = caption.split(f" {relation} ")
    return first.removeprefix("a "), relation, second.removeprefix("a ")


def _centre(pixels, colour):
    rows, columns = np.nonzero(np.abs(pixels - colour).sum(-1) < 6)
    assert len(rows) > 20
    return rows.mean(), columns.mean()


def test_the_files_read_back(shapes) -> None:
    train = read_examples(shapes / "captions_train.json")
    dev = read_examples(shapes / "captions_dev.json")
    assert (len(train), len(dev)) == (48, 16)
    assert all(len(example.captions) == 5 and example.image.is_file() for example in train + dev)
    assert not {e.image for e in train} & {e.image for e in dev}
