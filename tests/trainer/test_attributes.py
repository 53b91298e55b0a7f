"""Captions with a word changed: nearly the same, and never still true."""

import random

import pytest

from trainer.attributes import swapped
from trainer.stages.shapecaps import scene


@pytest.mark.parametrize(
    ("caption", "changed"),
    [
        ("two Left turns", {"two right turns"}),
        ("it is above the redwood", {"it is below the redwood"}),
        ("a gray wall", None),
    ],
)
def test_one_word_is_changed_for_another_of_its_kind(caption: str, changed) -> None:
    found = {swapped(caption, random.Random(seed)) for seed in range(60)}
    if changed is None:
        assert "a grey wall" not in found and "a black wall" in found
    else:
        assert found == changed


def test_no_such_word_no_change_and_only_known_words() -> None:
    assert swapped("a cat-like hush", random.Random(0), words={"hush"}) is None
    assert swapped("people on a hill", random.Random(0)) is None
    found = {swapped("a red car", random.Random(s), words={"blue", "car"}) for s in range(20)}
    assert found == {"a blue car"}


def test_a_changed_drawing_s_caption_is_wrong() -> None:
    draw = random.Random(0)
    for _ in range(200):
        _, captions = scene(draw, 16)
        for caption in captions:
            other = swapped(caption, draw)
            assert other is not None and other not in captions
            assert len(set(zip(caption.split(), other.split(), strict=True))) > 1
            assert sum(a != b for a, b in zip(caption.split(), other.split(), strict=True)) == 1
