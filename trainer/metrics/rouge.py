"""ROUGE-L, Lin 2004, https://aclanthology.org/W04-1013, as the COCO scorer computes it.

F = (1 + b^2) P R / (R + b^2 P), b = 1.2, with P = LCS / words of the candidate and R = LCS / words
of the reference, LCS the longest common subsequence. With several references P and R are each
the best over them, not of one and the same reference: the scorer's departure from the paper.
"""

from collections.abc import Sequence

import numpy as np

from trainer.metrics._scores import Scores, mean_scores
from trainer.metrics._words import split_corpus

BETA = 1.2


def score(references: Sequence[Sequence[str]], candidates: Sequence[str]) -> Scores:
    """Returns ROUGE-L, on a scale of 0 to 1.

    Args:
        references: The reference captions of each of n images.
        candidates: One caption for each image.

    Raises:
        DataError: The two do not pair up, or an image has no reference.
    """
    split_references, split_candidates = split_corpus(references, candidates)
    values = [
        _f_measure(group, tokens)
        for group, tokens in zip(split_references, split_candidates, strict=True)
    ]
    return mean_scores("ROUGE-L", np.array(values, dtype=np.float64))


def _f_measure(references: list[list[str]], candidate: list[str]) -> float:
    common = [(_longest_common(tokens, candidate), len(tokens)) for tokens in references]
    best = max(length for length, _ in common)
    if best == 0:
        return 0.0
    precision = best / len(candidate)
    recall = max(length / total for length, total in common if total)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(first: list[str], second: list[str]) -> int:
    """Returns the length of the longest common subsequence, a row of the table a machine word.

    Hyyrö 2004: bit i of `row` is 0 where the table's row rises at column i.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()
