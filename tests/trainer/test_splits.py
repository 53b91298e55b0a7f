"""Splits are decided by what an image shows: names, order and later arrivals change nothing."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data import Example
from trainer.errors import DataError
from trainer.photos import Fingerprint, scan_images
from trainer.splits import duplicate_groups, folds, split_examples


def _made_up(count: int, seed: int = 0) -> tuple[list[Example], dict[Path, Fingerprint]]:
    """Returns examples of images that look nothing like each other, without making files."""
    generator = random.Random(seed)
    paths = [Path(f"{number:04d}.jpg") for number in range(count)]
    prints = {
        path: Fingerprint(generator.randbytes(32).hex(), generator.randbytes(16)) for path in paths
    }
    return [Example(path, (), None) for path in paths], prints


def test_copies_of_a_picture_stay_on_one_side(tmp_path: Path) -> None:
    examples = []
    for number in range(12):
        blocks = np.random.default_rng(number).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        photo = Image.fromarray(blocks).resize((160, 120), Image.Resampling.BICUBIC)
        photo.save(tmp_path / f"{number}.png")
        photo.resize((80, 60)).save(tmp_path / f"{number}_small.jpg", quality=40)
        examples += [
            Example(tmp_path / f"{number}.png", (), None),
            Example(tmp_path / f"{number}_small.jpg", (), None),
        ]
    prints = scan_images(examples, progress=False).fingerprints
    groups = duplicate_groups({path: item.look for path, item in prints.items()})
    assert [{path.stem.removesuffix("_small") for path in group} for group in groups] == [
        {str(number)} for number in range(12)
    ]
    for seed in range(5):
        training, held_out = split_examples(examples, 0.5, seed, fingerprints=prints)
        sides = [
            {item.image.stem.removesuffix("_small") for item in side}
            for side in (training, held_out)
        ]
        assert not sides[0] & sides[1]
        assert len(training) + len(held_out) == 24


def test_a_split_does_not_depend_on_order_or_later_images() -> None:
    examples, prints = _made_up(400)
    _, held_out = split_examples(examples, 0.25, 3, fingerprints=prints)
    _, again = split_examples(examples[::-1], 0.25, 3, fingerprints=prints)
    assert again[::-1] == held_out
    _, of_half = split_examples(examples[:200], 0.25, 3, fingerprints=prints)
    assert of_half == [item for item in held_out if item in examples[:200]]
    assert 70 <= len(held_out) <= 130
    assert split_examples(examples, 0.25, 4, fingerprints=prints)[1] != held_out


def test_groups_are_chains_of_near_looks() -> None:
    zero = bytes(16)
    near = bytes([0xFF, *bytes(15)])  # 8 bits from zero
    far = bytes([0xFF, 0xFF, *bytes(14)])  # 8 from near, 16 from zero
    looks = {Path("a"): zero, Path("b"): far, Path("c"): bytes([0x0F] * 16), Path("d"): near}
    assert duplicate_groups(looks, distance=8) == [
        [Path("a"), Path("b"), Path("d")],
        [Path("c")],
    ]
    assert len(duplicate_groups(looks, distance=7)) == 4


def test_grouping_spans_blocks_of_the_distance_matrix() -> None:
    _, prints = _made_up(1500)
    looks = {path: item.look for path, item in prints.items()}
    looks[Path("copy.jpg")] = looks[Path("0003.jpg")]
    groups = [group for group in duplicate_groups(looks) if len(group) > 1]
    assert groups == [[Path("0003.jpg"), Path("copy.jpg")]]


@pytest.mark.parametrize(
    ("fraction", "message"),
    [(0.0, "not between 0 and 1"), (1.0, "not between"), (1e-9, "leaves the held-out side")],
)
def test_an_impossible_fraction_is_refused(fraction: float, message: str) -> None:
    examples, prints = _made_up(10)
    with pytest.raises(DataError, match=message):
        split_examples(examples, fraction, 0, fingerprints=prints)


def test_an_undecodable_image_belongs_to_no_split(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no")
    with pytest.raises(DataError, match=r"a\.jpg: cannot be decoded"):
        split_examples([Example(tmp_path / "a.jpg", (), None)], 0.5, 0)


def test_folds_hold_every_image_out_once_in_equal_parts() -> None:
    examples, prints = _made_up(53)
    found = folds(examples, 5, 0, fingerprints=prints)
    assert sorted(len(held_out) for _, held_out in found) == [10, 10, 11, 11, 11]
    assert sorted(str(e.image) for _, held_out in found for e in held_out) == [
        str(example.image) for example in examples
    ]
    for training, held_out in found:
        assert [e for e in examples if e not in held_out] == training


def test_folds_depend_on_the_seed_and_not_on_order() -> None:
    examples, prints = _made_up(40)
    found = folds(examples, 4, 0, fingerprints=prints)
    again = folds(examples[::-1], 4, 0, fingerprints=prints)
    assert [held_out[::-1] for _, held_out in again] == [held_out for _, held_out in found]
    assert folds(examples, 4, 1, fingerprints=prints) != found


def test_near_duplicates_share_a_fold() -> None:
    examples, prints = _made_up(30)
    for first, second in ((0, 7), (7, 20), (3, 4)):  # 0, 7 and 20 are a chain
        look = bytearray(prints[examples[first].image].look)
        look[second % 16] ^= 0xFF
        sha256 = prints[examples[second].image].sha256
        prints[examples[second].image] = Fingerprint(sha256, bytes(look))
    found = folds(examples, 10, 0, fingerprints=prints)
    place = {e: number for number, (_, held_out) in enumerate(found) for e in held_out}
    assert place[examples[0]] == place[examples[7]] == place[examples[20]]
    assert place[examples[3]] == place[examples[4]]
    assert {len(held_out) for _, held_out in found} == {3}


@pytest.mark.parametrize("count", [1, 9])
def test_an_impossible_number_of_folds_is_refused(count: int) -> None:
    examples, prints = _made_up(8)
    with pytest.raises(DataError, match=f"{count} folds of 8 examples of 8 different images"):
        folds(examples, count, 0, fingerprints=prints)
