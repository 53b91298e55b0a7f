"""The mean number of words of a caption. References do not matter."""

from collections.abc import Sequence

import numpy as np

from trainer.metrics._scores import Scores, mean_scores
from trainer.metrics._words import split_corpus


def score(references: Sequence[Sequence[str]], candidates: Sequence[str]) -> Scores:
    """Returns the mean length in words.

    Args:
        references: The reference captions of each of n images; only checked.
        candidates: One caption for each image.

    Raises:
        DataError: The two do not pair up, or an image has no reference.
    """
    _, split_candidates = split_corpus(references, candidates)
    return mean_scores("length", np.array([len(tokens) for tokens in split_candidates], np.float64))
