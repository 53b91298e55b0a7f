"""CIDEr-D, Vedantam, Zitnick and Parikh 2015, https://arxiv.org/abs/1411.5726.

A caption is four vectors, one for each n = 1..4, of its n-grams' counts times their idf
log(images / images with the n-gram in a reference). The score of candidate c and reference r is

    10/4 * sum_n e^(-(l_c - l_r)^2 / (2 sigma^2)) * min(c_n, r_n) . r_n / (|c_n| |r_n|),  sigma = 6,

averaged over an image's references, then over images. Equal to the COCO scorer, which departs
from the paper:

1. The length l is the number of bigrams, so captions of no word and of one word are equally long.
2. An n-gram that no reference has counts as if one image had it.

Scores depend on the corpus through the idf: pass the same `DocumentFrequencies` to compare across
corpora, or to reward captions during training. In a corpus of one image every idf is log 1 = 0 and
the formula gives 0 whatever the caption says; that is reported as nan with a warning instead.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from exports.wording import words
from trainer.metrics._hashes import ORDERS, CountedNgrams, count_ngrams, places_of
from trainer.metrics._scores import Scores, mean_scores
from trainer.metrics._words import check_pairs, split_references

SIGMA = 6.0
_TINY = 1e-300


class CorpusTooSmallWarning(UserWarning):
    """CIDEr-D is undefined on this corpus: no n-gram tells one image from another."""


@dataclass(frozen=True, slots=True)
class DocumentFrequencies:
    """In how many images' references each n-gram occurs; fixed once made.

    Attributes:
        numbers: (k,) uint64, sorted: the n-grams, n = 1..4, as `_hashes` numbers them.
        counts: (k,), images with the n-gram.
        images: Images counted.
    """

    numbers: NDArray[np.uint64]
    counts: NDArray[np.int64]
    images: int

    @classmethod
    def of(cls, references: Sequence[Sequence[str]]) -> "DocumentFrequencies":
        """Returns the frequencies of a corpus of reference captions.

        Raises:
            DataError: An image has no reference.
        """
        split = split_references(references)
        return cls._counted(count_ngrams(_flat(split)), _owners(split), len(split))

    @classmethod
    def _counted(
        cls, ngrams: CountedNgrams, owners: NDArray[np.int64], images: int
    ) -> "DocumentFrequencies":
        width = max(1, len(ngrams.numbers))
        having = np.unique(owners[ngrams.caption] * width + ngrams.ngram)
        counts = np.bincount(having % width, minlength=len(ngrams.numbers))
        return cls(ngrams.numbers, counts.astype(np.int64), images)

    @property
    def informative(self) -> bool:
        """Whether some n-gram is in some images and not in others."""
        return bool((self.counts < self.images).any())

    def idf(self, numbers: NDArray[np.uint64]) -> NDArray[np.float64]:
        """Returns log(images / images with the n-gram) of n-grams."""
        places, known = places_of(numbers, self.numbers)
        counts = np.ones(len(numbers))
        counts[known] = self.counts[places[known]]
        found: NDArray[np.float64] = math.log(self.images) - np.log(counts)
        return found


class CiderD:
    """Scores captions against the references of fixed images, prepared once.

    Made for rewards: many captions at once cost some tens of microseconds each.
    """

    def __init__(
        self,
        references: Sequence[Sequence[str]],
        *,
        frequencies: DocumentFrequencies | None = None,
    ) -> None:
        """Prepares the references of n images.

        Args:
            references: The reference captions of each image.
            frequencies: A fixed table; by default that of `references`.

        Raises:
            DataError: An image has no reference.
        """
        split = split_references(references)
        ngrams, owners = count_ngrams(_flat(split)), _owners(split)
        self.frequencies = frequencies or DocumentFrequencies._counted(ngrams, owners, len(split))
        self._numbers = ngrams.numbers
        self._references = np.bincount(owners, minlength=len(split))
        self._lengths = _bigrams(ngrams.lengths)
        weights = ngrams.count * self.frequencies.idf(ngrams.numbers)[ngrams.ngram]
        self._norms = _norms(ngrams, weights)
        # Which references of an image have an n-gram, and with what weight: rows of one table,
        # found by image and n-gram.
        keys = owners[ngrams.caption] * len(self._numbers) + ngrams.ngram
        order = np.argsort(keys, kind="stable")
        self._keys, self._starts = np.unique(keys[order], return_index=True)
        self._ends = np.append(self._starts[1:], len(keys))
        self._captions, self._weights = ngrams.caption[order], weights[order]

    def score(self, image: int, caption: str) -> float:
        """Returns the CIDEr-D of a caption for the image of this number, 0 to 10."""
        return float(self.scores([image], [caption])[0])

    def scores(self, images: Sequence[int], captions: Sequence[str]) -> NDArray[np.float64]:
        """Returns the CIDEr-D (m,) of m captions, each for the image of the number beside it."""
        image = np.asarray(images, np.int64)
        ngrams = count_ngrams([words(caption) for caption in captions])
        weights = ngrams.count * self.frequencies.idf(ngrams.numbers)[ngrams.ngram]
        norms = _norms(ngrams, weights)
        places, known = places_of(ngrams.numbers, self._numbers)
        keys = image[ngrams.caption] * len(self._numbers) + places[ngrams.ngram]
        rows, shared = places_of(keys, self._keys)
        mine, theirs = self._meetings(shared & known[ngrams.ngram], rows)
        caption, place = ngrams.caption[mine], ngrams.place[mine]
        reference, other = self._captions[theirs], self._weights[theirs]
        product = np.minimum(weights[mine], other) * other
        # No vector that shares something of weight is shorter than that; the rest is 0 of 0.
        scale = np.maximum(norms[caption, place] * self._norms[reference, place], _TINY)
        apart = _bigrams(ngrams.lengths)[caption] - self._lengths[reference]
        near = np.exp(-(apart**2) / (2 * SIGMA**2))
        totals = np.bincount(caption, product / scale * near, minlength=len(captions))
        found: NDArray[np.float64] = 10 * totals / (len(ORDERS) * self._references[image])
        return found

    def _meetings(
        self, shared: NDArray[np.bool_], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns pairs of places: of an n-gram of a caption, and of the same in a reference."""
        mine = np.flatnonzero(shared)
        starts, ends = self._starts[rows[mine]], self._ends[rows[mine]]
        counts = ends - starts
        before = np.cumsum(counts) - counts
        steps = np.arange(counts.sum()) - np.repeat(before, counts)
        return np.repeat(mine, counts), np.repeat(starts, counts) + steps


def _flat(references: Iterable[Iterable[list[str]]]) -> list[list[str]]:
    return list(chain.from_iterable(references))


def _owners(references: Sequence[Sequence[object]]) -> NDArray[np.int64]:
    """Returns of every caption the image that it describes."""
    return np.repeat(np.arange(len(references)), [len(group) for group in references])


def _bigrams(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.maximum(0, lengths - 1)


def _norms(ngrams: CountedNgrams, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the length of each caption's vector of each order, (m, 4)."""
    squares = np.bincount(
        ngrams.caption * len(ORDERS) + ngrams.place,
        weights**2,
        minlength=len(ngrams.lengths) * len(ORDERS),
    )
    return np.sqrt(squares).reshape(-1, len(ORDERS))


def score(
    references: Sequence[Sequence[str]],
    candidates: Sequence[str],
    *,
    frequencies: DocumentFrequencies | None = None,
) -> Scores:
    """Returns CIDEr-D, on a scale of 0 to 10; nan, with a warning, where it is undefined.

    Args:
        references: The reference captions of each of n images.
        candidates: One caption for each image.
        frequencies: A fixed table; by default that of `references`.

    Raises:
        DataError: The two do not pair up, or an image has no reference.
    """
    check_pairs(references, candidates)
    scorer = CiderD(references, frequencies=frequencies)
    if not scorer.frequencies.informative:
        warnings.warn(
            f"CIDEr-D is undefined on a corpus of {scorer.frequencies.images} image(s): it weighs "
            "words by how few images they belong to, and here all belong to all. Score more "
            "images, or pass the document frequencies of a larger corpus.",
            CorpusTooSmallWarning,
            stacklevel=2,
        )
        return mean_scores("CIDEr-D", np.full(len(candidates), np.nan))
    return mean_scores("CIDEr-D", scorer.scores(range(len(candidates)), candidates))
