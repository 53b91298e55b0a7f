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
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.metrics._scores import Scores, mean_scores
from trainer.metrics._words import Ngram, ngrams, split_corpus, split_references, words

ORDERS = (1, 2, 3, 4)
SIGMA = 6.0


class CorpusTooSmallWarning(UserWarning):
    """CIDEr-D is undefined on this corpus: no n-gram tells one image from another."""


@dataclass(frozen=True, slots=True)
class DocumentFrequencies:
    """In how many images' references each n-gram occurs; fixed once made.

    Attributes:
        counts: Images with the n-gram, for n = 1..4.
        images: Images counted.
    """

    counts: Mapping[Ngram, int]
    images: int

    @classmethod
    def of(cls, references: Sequence[Sequence[str]]) -> "DocumentFrequencies":
        """Returns the frequencies of a corpus of reference captions."""
        return cls.of_words(split_references(references))

    @classmethod
    def of_words(cls, references: Iterable[Iterable[Sequence[str]]]) -> "DocumentFrequencies":
        """Returns the frequencies of a corpus whose captions are split into words."""
        counts: Counter[Ngram] = Counter()
        images = 0
        for group in references:
            images += 1
            seen: set[Ngram] = set()
            for tokens in group:
                for order in ORDERS:
                    seen.update(zip(*(tokens[start:] for start in range(order)), strict=False))
            counts.update(seen)
        return cls(counts=counts, images=images)

    @property
    def informative(self) -> bool:
        """Whether some n-gram is in some images and not in others."""
        return any(count < self.images for count in self.counts.values())


@dataclass(frozen=True, slots=True)
class _Target:
    """One image's references as vectors: `weights` maps an n-gram to (reference, weight) pairs."""

    weights: dict[Ngram, list[tuple[int, float]]]
    norms: list[list[float]]  # (references, 4)
    lengths: list[int]


class CiderD:
    """Scores captions against the references of fixed images, prepared once.

    Made for rewards: a caption costs some tens of microseconds, however often it is asked.
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
        self.frequencies = frequencies or DocumentFrequencies.of_words(split)
        self._log_images = math.log(self.frequencies.images)
        self._targets = [self._target(group) for group in split]

    def score(self, image: int, caption: str) -> float:
        """Returns the CIDEr-D of a caption for the image of this number, 0 to 10."""
        return self.score_words(image, words(caption))

    def score_words(self, image: int, tokens: Sequence[str]) -> float:
        """Returns the CIDEr-D of a caption that is split into words already."""
        target = self._targets[image]
        found = [[0.0] * len(ORDERS) for _ in target.lengths]
        norms = []
        for place, order in enumerate(ORDERS):
            square = 0.0
            for ngram, weight in self._vector(tokens, order):
                square += weight * weight
                for reference, other in target.weights.get(ngram, ()):
                    found[reference][place] += min(weight, other) * other
            norms.append(math.sqrt(square))
        length = _length(tokens)
        total = 0.0
        for products, others, other_length in zip(found, target.norms, target.lengths, strict=True):
            cosines = sum(
                product / (norm * other)
                for product, norm, other in zip(products, norms, others, strict=True)
                if product > 0
            )
            total += cosines * math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
        return 10 * total / (len(ORDERS) * len(target.lengths))

    def _target(self, references: list[list[str]]) -> _Target:
        weights: dict[Ngram, list[tuple[int, float]]] = {}
        norms = []
        for reference, tokens in enumerate(references):
            squares = []
            for order in ORDERS:
                square = 0.0
                for ngram, weight in self._vector(tokens, order):
                    weights.setdefault(ngram, []).append((reference, weight))
                    square += weight * weight
                squares.append(math.sqrt(square))
            norms.append(squares)
        return _Target(weights, norms, [_length(tokens) for tokens in references])

    def _vector(self, tokens: Sequence[str], order: int) -> list[tuple[Ngram, float]]:
        """Returns the tf-idf weight of each n-gram of this order."""
        counts, log_images = self.frequencies.counts, self._log_images
        return [
            (ngram, count * (log_images - math.log(counts.get(ngram, 1))))
            for ngram, count in ngrams(tokens, order).items()
        ]


def _length(tokens: Sequence[str]) -> int:
    return max(0, len(tokens) - 1)


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
    _, split_candidates = split_corpus(references, candidates)
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
    values: NDArray[np.float64] = np.array(
        [scorer.score_words(image, tokens) for image, tokens in enumerate(split_candidates)]
    )
    return mean_scores("CIDEr-D", values)
