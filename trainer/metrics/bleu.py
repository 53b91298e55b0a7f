"""BLEU-1 to BLEU-4, Papineni et al. 2002, https://aclanthology.org/P02-1040.

BLEU-n = min(1, e^(1 - r/c)) * (p_1 * ... * p_n)^(1/n), with p_k the share of the candidates'
k-grams found in the references (each counted at most as often as in the reference that has it
most), c the candidates' words and r the words of the references closest in length, a tie going
to the shorter. Sums run over the corpus. Equal to the COCO scorer, with its departures:

1. Counts get 1e-15 above and 1e-9 below the fraction, so no division is by zero.
2. An image's own figure is the same formula on its own counts, not smoothed otherwise.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from exports.wording import Ngram, ngrams
from trainer.metrics._scores import Scores
from trainer.metrics._words import split_corpus

ORDERS = (1, 2, 3, 4)
_TINY, _SMALL = 1e-15, 1e-9


def score(references: Sequence[Sequence[str]], candidates: Sequence[str]) -> Scores:
    """Returns BLEU-1 to BLEU-4, on a scale of 0 to 1.

    Args:
        references: The reference captions of each of n images.
        candidates: One caption for each image.

    Raises:
        DataError: The two do not pair up, or an image has no reference.
    """
    split_references, split_candidates = split_corpus(references, candidates)
    rows = [
        _counts(group, tokens)
        for group, tokens in zip(split_references, split_candidates, strict=True)
    ]
    statistics = np.array(rows, dtype=np.float64)  # (n, 10)
    return Scores(
        names=tuple(f"BLEU-{order}" for order in ORDERS),
        per_image=_figures(statistics, 1),
        statistics=statistics,
        combine=_figures,
    )


def _counts(references: list[list[str]], candidate: list[str]) -> list[int]:
    """Returns candidate length, reference length, 4 counts of k-grams, 4 of matched ones."""
    length = len(candidate)
    closest = min((abs(len(tokens) - length), len(tokens)) for tokens in references)[1]
    guessed = [max(0, length - order + 1) for order in ORDERS]
    matched = []
    for order in ORDERS:
        most: Counter[Ngram] = Counter()
        for tokens in references:
            most |= ngrams(tokens, order)  # the larger of the two counts
        matched.append((ngrams(candidate, order) & most).total())
    return [length, closest, *guessed, *matched]


def _figures(sums: NDArray[np.float64], _images: int) -> NDArray[np.float64]:
    """Returns BLEU-1 to BLEU-4 (..., 4) of summed counts (..., 10)."""
    guessed, matched = sums[..., 2:6], sums[..., 6:10]
    precisions = (matched + _TINY) / (guessed + _SMALL)
    means = np.cumprod(precisions, axis=-1) ** (1 / np.array(ORDERS))
    ratio = (sums[..., :1] + _TINY) / (sums[..., 1:2] + _SMALL)
    figures: NDArray[np.float64] = means * np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return figures
