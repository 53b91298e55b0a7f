"""The share of captions that break off: "a man in a", "two dogs and".

They end in an article, a conjunction, a preposition or a verb that something must follow. Words
that may also close a sentence ("a girl with a hat on", "a man walks by") are not counted: one
caption in a thousand is that people wrote for Flickr8k. The words are English; captions in another
language are not judged. References do not matter.
"""

from collections.abc import Sequence

import numpy as np

from exports.wording import breaks_off
from trainer.metrics._scores import Scores, mean_scores
from trainer.metrics._words import split_corpus


def score(references: Sequence[Sequence[str]], candidates: Sequence[str]) -> Scores:
    """Returns the share of captions that break off, 0 to 1.

    Args:
        references: The reference captions of each of n images; only checked.
        candidates: One caption for each image.

    Raises:
        DataError: The two do not pair up, or an image has no reference.
    """
    _, split_candidates = split_corpus(references, candidates)
    found = [breaks_off(tokens) for tokens in split_candidates]
    return mean_scores("bad endings", np.array(found, dtype=np.float64))
