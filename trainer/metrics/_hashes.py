"""The n-grams of many captions at once, each as a number, so that arrays can count and compare.

A word's number is a hash of its letters, the same in every process, and an n-gram's is a polynomial
of its words' (Rabin and Karp, 1987, https://doi.org/10.1147/rd.312.0249) modulo 2^64. That two of a
million n-grams share one happens in one corpus of forty million.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

ORDERS = (1, 2, 3, 4)
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a word is lost


@dataclass(frozen=True, slots=True)
class CountedNgrams:
    """The n-grams of m captions, n = 1..4, each once for a caption that has it.

    Attributes:
        numbers: (k,) uint64, sorted: of the k different n-grams.
        ngram: (N,), which of the k.
        caption: (N,), which of the m.
        place: (N,), n - 1.
        count: (N,), how often the caption has it.
        lengths: (m,), of the captions in words.
    """

    numbers: NDArray[np.uint64]
    ngram: NDArray[np.int64]
    caption: NDArray[np.int64]
    place: NDArray[np.int64]
    count: NDArray[np.int64]
    lengths: NDArray[np.int64]


def count_ngrams(captions: Sequence[Sequence[str]]) -> CountedNgrams:
    """Returns the n-grams of captions that are split into words."""
    lengths = np.fromiter(map(len, captions), np.int64, len(captions))
    words = np.fromiter(map(_number, chain.from_iterable(captions)), np.uint64, lengths.sum())
    owner = np.repeat(np.arange(len(captions)), lengths)
    found, owners = words, [owner]
    numbers = [found]
    for order in ORDERS[1:]:
        found = found[:-1] * _BASE + words[order - 1 :]
        whole = owner[order - 1 :] == owner[: len(found)]
        numbers.append(found[whole])
        owners.append(owner[: len(found)][whole])
    distinct, which = np.unique(np.concatenate(numbers), return_inverse=True)
    place = np.repeat(np.arange(len(ORDERS)), [len(part) for part in numbers])
    own, first, count = np.unique(
        np.concatenate(owners) * len(distinct) + which, return_index=True, return_counts=True
    )
    caption, ngram = np.divmod(own, max(1, len(distinct)))
    return CountedNgrams(distinct, ngram, caption, place[first], count, lengths)


def places_of(
    wanted: NDArray[Any], numbers: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Returns where each wanted number stands among sorted ones, and whether it does."""
    if not len(numbers):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    places = np.searchsorted(numbers, wanted).clip(max=len(numbers) - 1)
    return places, numbers[places] == wanted


@cache
def _number(word: str) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
