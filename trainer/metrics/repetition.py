"""The share of captions that repeat themselves: "a red red bus", "a dog in the snow in the snow".

A word that follows itself, or three words in a row that come again. Of the captions that people
wrote for Flickr8k 0.6 % do ("a black and white dog jumps through a black and white hoop"); a model
that is paid for n-grams may find that they pay twice. References do not matter.
"""

from collections.abc import Sequence

import numpy as np

from exports.wording import repeats
from trainer.metrics._scores import Scores, mean_scores
from trainer.metrics._words import split_corpus


def score(references: Sequence[Sequence[str]], candidates: Sequence[str]) -> Scores:
    """Returns the share of captions that repeat themselves, 0 to 1.

    Args:
        references: The reference captions of each of n images; only checked.
        candidates: One caption for each image.

    Raises:
        DataError: The two do not pair up, or an image has no reference.
    """
    _, split_candidates = split_corpus(references, candidates)
    found = [repeats(tokens) for tokens in split_candidates]
    return mean_scores("repetition", np.array(found, dtype=np.float64))
