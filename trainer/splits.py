"""Held-out splits: deterministic, stable as a collection grows, near-duplicates never parted."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data import Example
from trainer.errors import DataError
from trainer.photos import Fingerprint, scan_images

# Of 128 bits. Measured on Flickr8k: copies at half size, of JPEG quality 30, brightened or with 3 %
# cropped away differ in at most 16 bits nine times of ten; among 6,000 photographs no two
# different ones are within 20.
NEAR_DUPLICATE = 16
_TILE = (512, 4096)  # of the distance matrix at a time: 8 megabytes, which a cache holds


def split_examples(
    examples: Sequence[Example],
    fraction: float,
    seed: int,
    *,
    fingerprints: Mapping[Path, Fingerprint] | None = None,
) -> tuple[list[Example], list[Example]]:
    """Returns (training, held-out) examples, each in their order.

    A hash of the seed and the image's bytes decides, so names, folders and order do not
    matter, and an image keeps its side when others arrive. Near-duplicates go where the one
    with the smallest digest goes. The held-out share is `fraction` on average, not exactly.

    Args:
        examples: Images that decode (see `photos.scan_images`).
        fraction: Share held out, above 0 and below 1.
        seed: Another seed gives another split.
        fingerprints: From the scan; when absent the images are scanned here.

    Raises:
        DataError: The fraction is out of range, an image has no fingerprint, or a side
            would be empty.
    """
    if not 0 < fraction < 1:
        raise DataError(f"a held-out fraction of {fraction} is not between 0 and 1")
    held_out: set[Path] = set()
    for draw, group in _drawn_groups(examples, seed, fingerprints):
        if draw < fraction * 2**64:
            held_out.update(group)
    training = [example for example in examples if example.image not in held_out]
    rest = [example for example in examples if example.image in held_out]
    if not training or not rest:
        side = "training" if not training else "held-out"
        raise DataError(
            f"a fraction of {fraction} with seed {seed} leaves the {side} side of "
            f"{len(examples)} examples empty; take another fraction or seed"
        )
    return training, rest


def folds(
    examples: Sequence[Example],
    count: int,
    seed: int,
    *,
    fingerprints: Mapping[Path, Fingerprint] | None = None,
) -> list[list[Example]]:
    """Returns the examples in `count` parts, each in their order, with images as even as can be.

    A hash of the seed and the images' bytes decides, so names, folders and order do not matter.
    Near-duplicates are in one part. Images that a person has captioned are dealt out first, so that
    parts have as many of them as of all.

    Args:
        examples: Images that decode (see `photos.scan_images`).
        count: How many parts, at least 2.
        seed: Another seed gives other parts.
        fingerprints: From the scan; when absent the images are scanned here.

    Raises:
        DataError: There are fewer different images than parts, or an image has no fingerprint.
    """
    by_hand = {e.image for e in examples if e.captions and e.source == "human"}
    groups = sorted(
        _drawn_groups(examples, seed, fingerprints),
        key=lambda drawn: (by_hand.isdisjoint(drawn[1]), -len(drawn[1]), drawn[0]),
    )
    if not 2 <= count <= len(groups):
        raise DataError(
            f"{len(groups)} different images (near-duplicates counted once) cannot be parted into "
            f"{count} folds; take 2 to as many as there are images"
        )
    parts: list[list[Path]] = [[] for _ in range(count)]
    for _, group in groups:
        min(parts, key=len).extend(group)  # Graham's rule: the largest first, to the emptiest part
    numbers = {path: number for number, part in enumerate(parts) for path in part}
    return [[e for e in examples if numbers[e.image] == number] for number in range(count)]


def _drawn_groups(
    examples: Sequence[Example], seed: int, fingerprints: Mapping[Path, Fingerprint] | None
) -> list[tuple[int, list[Path]]]:
    """Returns the near-duplicates among examples in groups, each with a number of 64 bits."""
    if fingerprints is None:
        fingerprints = scan_images(examples).fingerprints
    missing = next((item.image for item in examples if item.image not in fingerprints), None)
    if missing is not None:
        raise DataError(f"{missing}: cannot be decoded, so it belongs to no split; scan first")
    looks = {example.image: fingerprints[example.image].look for example in examples}
    found = []
    for group in duplicate_groups(looks):
        digest = min(fingerprints[path].sha256 for path in group)
        draw = hashlib.sha256(f"{seed}:{digest}".encode()).digest()
        found.append((int.from_bytes(draw[:8], "big"), group))
    return found


def duplicate_groups(
    looks: Mapping[Path, bytes], *, distance: int = NEAR_DUPLICATE
) -> list[list[Path]]:
    """Returns the images in groups of near-duplicates; most groups hold one image.

    Two images are in one group when a chain of images joins them, each at most `distance`
    bits from the next. Groups and their members keep the order of `looks`.
    """
    paths = list(looks)
    if not paths:
        return []
    packed = np.frombuffer(b"".join(looks.values()), np.uint8).reshape(len(paths), -1)
    signs = np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1  # (n, bits)
    parents = list(range(len(paths)))
    for first, second in _near_pairs(signs, distance):
        parents[_root(parents, first)] = _root(parents, second)
    groups: dict[int, list[Path]] = {}
    for number, path in enumerate(paths):
        groups.setdefault(_root(parents, number), []).append(path)
    return list(groups.values())


def _near_pairs(signs: NDArray[np.float32], distance: int) -> Iterator[tuple[int, int]]:
    """Yields pairs (row, later row) within the Hamming distance."""
    least = signs.shape[1] - 2 * distance  # bits that agree, less those that differ
    height, width = _TILE
    tile = np.empty(_TILE, np.float32)
    for top in range(0, len(signs), height):
        block = signs[top : top + height]
        for left in range(top, len(signs), width):
            others = signs[left : left + width]
            found = np.matmul(block, others.T, out=tile[: len(block), : len(others)])
            if found.max() < least:
                continue
            for row, column in np.argwhere(found >= least).tolist():
                if left + column > top + row:
                    yield top + row, left + column


def _root(parents: list[int], node: int) -> int:
    while parents[node] != node:
        parents[node] = parents[parents[node]]  # halves the path on the way
        node = parents[node]
    return node
