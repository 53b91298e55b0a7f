"""What captions say of mirror images, and that flipped images are never trained with the others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_captioner import TEXT

from trainer.data import Example, read_examples
from trainer.dataset import CaptionDataset, InterleavedDataset, ViewDataset, framed, padded
from trainer.objectives import scst
from trainer.sides import Mirror
from trainer.stages import shapecaps
from trainer.transforms import Augment, Transform

ENGLISH = [("left", "right")]


@pytest.mark.parametrize(
    ("caption", "mirrored"),
    [
        ("a dog to the left of a cat", "a dog to the right of a cat"),
        ("Left of it, RIGHT of us", "Right of it, LEFT of us"),
        ("the leftmost man is left-handed", "the rightmost man is right-handed"),
        ("from left to right", "from right to left"),
        ("he walks rightwards on his left", "he walks leftwards on his right"),
        ("a bright leftover on the copyright page", "a bright leftover on the copyright page"),
        ("a cup is left of a plate", "a cup is right of a plate"),
        ("she stands on the right in front", "she stands on the left in front"),
    ],
)
def test_sides_change_and_nothing_else(caption: str, mirrored: str) -> None:
    mirror = Mirror(ENGLISH)
    assert mirror([caption]) == (mirrored,)
    assert mirror([mirrored]) == (caption,)
    assert mirror(["a dog", caption]) == ("a dog", mirrored)


@pytest.mark.parametrize(
    "caption",
    [
        "water left behind by a sprinkler",
        "a man who has left the room",
        "a woman walks right behind him",
        'the words " Look Right " on a street',
    ],
)
def test_a_word_that_is_no_side_keeps_the_image_as_it_is(caption: str) -> None:
    assert Mirror(ENGLISH)([caption, "a cup on the left"]) is None


def test_without_pairs_no_caption_is_changed() -> None:
    mirror = Mirror([])
    assert mirror(["a dog", "a bright leftover"]) == ("a dog", "a bright leftover")
    assert mirror([]) == ()
    assert mirror(["a dog", "A cup LEFT of a plate"]) is mirror(["right"]) is None


def test_other_languages_have_pairs_of_their_own() -> None:
    german = Mirror([("links", "rechts"), ("linken", "rechten")])
    assert german(["Links ein Hund, im rechten Bild"]) == ("Rechts ein Hund, im linken Bild",)
    assert german(["has left the room"]) == ("has left the room",)  # English is not spoken here
    assert Mirror([("左", "右")])(["狗在猫的左边"]) == ("狗在猫的右边",)


class Words:
    """A tokenizer with a number for each word."""

    def __init__(self, examples: list[Example]) -> None:
        words = sorted({word for e in examples for text in e.captions for word in text.split()})
        self._numbers = {word: 3 + number for number, word in enumerate(["left", "right", *words])}

    def encode(self, text: str) -> list[int]:
        return [self._numbers[word] for word in text.split()]

    def decode(self, token_ids: list[int]) -> str:
        words = {number: word for word, number in self._numbers.items()}
        return " ".join(words[number] for number in token_ids if number > 2)


def drawn(augment: dict[str, Any], captions: list[tuple[str, ...]]) -> tuple[Any, Words]:
    """Returns a data set of images whose columns grow brighter from the left, and its words."""
    ramp = np.arange(0, 240, 20, dtype=np.uint8)
    pixels = np.broadcast_to(ramp[None, None, :, None], (len(captions), 12, 12, 3))
    examples = [Example(Path(f"{n}.png"), own, None) for n, own in enumerate(captions)]
    words: Any = Words(examples)
    transform = Transform(Augment.model_validate(augment), (12, 12))
    dataset = CaptionDataset(
        examples, pixels.copy(), words, TEXT, captions=2, transform=transform, seed=0
    )
    return dataset, words


CAPTIONS = [
    ("a dog left of a cat", "a dog"),
    ("a bird", "some bird"),
    ("a cup has left", "a cup on the left"),
]


def test_a_flipped_image_has_the_captions_of_its_mirror_image() -> None:
    dataset, words = drawn({"flip": {"swaps": ENGLISH}}, CAPTIONS)
    flips = [0, 0, 0]
    for epoch in range(40):
        for index in range(3):
            item = dataset[epoch, index]
            mirrored = bool(item["image"][0, 0, 0] > item["image"][0, 0, -1])
            assert mirrored == item["mirrored"]
            flips[index] += mirrored
            texts = {words.decode(ids) for ids in item["token_ids"]}
            if index == 0:
                side = "right" if mirrored else "left"
                assert texts == {f"a dog {side} of a cat", "a dog"}
            else:
                assert texts == set(CAPTIONS[index])
    assert all(10 < count < 30 for count in flips[:2]) and flips[2] == 0
    batch = dataset.collate([dataset[0, index] for index in range(3)])
    assert batch["mirrored"].tolist() == [dataset[0, index]["mirrored"] for index in range(3)]
    assert dataset.references(mirrored=False) == CAPTIONS
    assert dataset.references(mirrored=True) == [("a dog right of a cat", "a dog"), *CAPTIONS[1:]]


def test_without_pairs_images_with_sides_are_not_flipped() -> None:
    dataset, _ = drawn({"flip": {"probability": 1}}, CAPTIONS)
    assert [dataset[0, index]["mirrored"] for index in range(3)] == [False, True, False]


def test_pairs_change_nothing_where_no_caption_has_a_side() -> None:
    changes = {"crop": {"area": 0.5}, "jitter": {"brightness": 0.5}}
    plain, _ = drawn({"flip": {}, **changes}, [("a bird", "some bird")] * 4)
    swapped, _ = drawn({"flip": {"swaps": ENGLISH}, **changes}, [("a bird", "some bird")] * 4)
    for key in ((0, 0), (0, 3), (5, 1)):
        assert torch.equal(plain[key]["image"], swapped[key]["image"])
        assert plain[key]["token_ids"] == swapped[key]["token_ids"]


def test_examples_before_a_caption_are_flipped_with_theirs() -> None:
    dataset, words = drawn({"flip": {"swaps": ENGLISH}}, CAPTIONS[:1] * 2)
    interleaved = InterleavedDataset(dataset, torch.tensor([[1], [0]]), shot_tokens=8)
    seen = set()
    for epoch in range(20):
        item = interleaved[epoch, 0]
        mirrored = bool(item["shot_images"][0, 0, 0, 0] > item["shot_images"][0, 0, 0, -1])
        said = {words.decode(ids) for ids in item["shot_token_ids"]}
        assert said == {f"a dog {'right' if mirrored else 'left'} of a cat", "a dog"}
        seen.add(mirrored)
    assert seen == {True, False}


def test_rewards_of_a_mirror_image_are_those_of_its_captions(make_captioner, monkeypatch) -> None:
    dataset, words = drawn({"flip": {"swaps": ENGLISH}}, CAPTIONS)
    ids = torch.tensor([framed(words.encode("a dog right of a cat"), TEXT)] * 2)
    lengths = torch.full((2,), ids.shape[1])
    monkeypatch.setattr(scst, "sample", lambda *_, **__: (ids, lengths))
    objective = scst.Objective(scst.Config(samples=2), make_captioner(), dataset)
    rewards = {}
    for epoch in range(12):
        item = dataset[epoch, 0]
        batch = dataset.collate([item]) | {"images": torch.zeros(1, 3, 32, 48)}
        rewards[item["mirrored"]] = objective(batch)["reward"].item()
    assert rewards[True] > rewards[False] + 1


def test_a_method_that_reads_captions_flips_them_too() -> None:
    dataset, words = drawn({"flip": {"swaps": ENGLISH}}, CAPTIONS)
    transform = Transform(Augment.model_validate({"flip": {"swaps": ENGLISH}}), (12, 12))
    views = ViewDataset(dataset.images, [transform], seed=0, token_ids=dataset.token_ids)
    said = set()
    for epoch in range(60):
        item = views[epoch, 0]
        mirrored = bool(item["views"][0][0, 0, 0] > item["views"][0][0, 0, -1])
        said.add((mirrored, words.decode(item["token_ids"])))
    left, right = "a dog left of a cat", "a dog right of a cat"
    assert said == {(False, left), (False, "a dog"), (True, right), (True, "a dog")}
    token_ids, _ = padded(dataset.token_ids.of_view(0, True), 0)
    assert words.decode(token_ids[0].tolist()) == right


def test_a_mirrored_drawing_says_what_another_drawing_could(tmp_path: Path) -> None:
    """ShapeCaps says sides in two ways; a mirrored caption is one that its grammar has."""
    shapecaps.run(shapecaps.Config(images=40, side=32, dev=1), tmp_path)
    captions = [e.captions for e in read_examples(tmp_path / "captions_train.json")]
    mirror = Mirror(ENGLISH)
    mirrored = [mirror(own) for own in captions]
    assert all(other is not None for other in mirrored)
    assert [mirror(other) for other in mirrored if other] == captions
    assert sum(other != own for own, other in zip(captions, mirrored, strict=True)) > 5
