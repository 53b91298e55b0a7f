"""The share of distinct captions: 1.0 when no two images get the same words.

A captioner that says "a man in a red shirt" of everyone can score well on the other metrics. Each
image's value is 1 / (number of images with its caption); their mean is distinct captions / images.
References do not matter. A resample keeps each caption's count in the whole corpus, since drawing
an image twice is no repetition by the captioner.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from trainer.metrics._scores import Scores, mean_scores
from trainer.metrics._words import split_corpus


def score(references: Sequence[Sequence[str]], candidates: Sequence[str]) -> Scores:
    """Returns the share of distinct captions, above 0 and at most 1.

    Args:
        references: The reference captions of each of n images; only checked.
        candidates: One caption for each image.

    Raises:
        DataError: The two do not pair up, or an image has no reference.
    """
    _, split_candidates = split_corpus(references, candidates)
    keys = [tuple(tokens) for tokens in split_candidates]
    repeats = Counter(keys)
    return mean_scores("distinct", np.array([1 / repeats[key] for key in keys]))
