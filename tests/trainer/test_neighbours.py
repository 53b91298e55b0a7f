"""Captions copied from neighbours: the nearest is found, and its most typical caption taken."""

import numpy as np
import pytest

from trainer.neighbours import CaptionedNeighbours

CAPTIONS = [
    ("a zebra by a fence", "a dog runs on grass", "a dog runs on green grass"),
    ("a red car",),
    ("a boat on a lake", "a boat on the lake", "some sunny holiday"),
]


def unit(*rows: tuple[float, float]) -> np.ndarray:
    found = np.array(rows, np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_the_nearest_image_s_most_typical_caption_is_copied() -> None:
    neighbours = CaptionedNeighbours(CAPTIONS)
    known = unit((1, 0), (0, 1), (-1, 0))
    copied = neighbours.copied(unit((0.1, 1), (1, 0.2), (-3, 1), (0, 5)), known)
    assert copied[0] == copied[3] == "a red car"
    assert copied[1] in CAPTIONS[0][1:]
    assert copied[2] in CAPTIONS[2][:2]


def test_the_order_of_the_known_images_does_not_matter() -> None:
    draw = np.random.default_rng(0)
    known, features = (unit(*draw.normal(size=(n, 2)).tolist()) for n in (len(CAPTIONS), 20))
    first = CaptionedNeighbours(CAPTIONS).copied(features, known)
    assert first == CaptionedNeighbours(CAPTIONS[::-1]).copied(features, known[::-1])
    assert len(set(first)) == len(CAPTIONS)


@pytest.mark.parametrize("repeats", [1, 2])
def test_asking_again_gives_the_same(repeats: int) -> None:
    neighbours = CaptionedNeighbours(CAPTIONS)
    known = unit((1, 0), (0, 1), (-1, 0))
    once = neighbours.copied(known, known)
    assert all(neighbours.copied(known, known) == once for _ in range(repeats))
    assert [caption in group for caption, group in zip(once, CAPTIONS, strict=True)] == [True] * 3
