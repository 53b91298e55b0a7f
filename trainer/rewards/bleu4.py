"""BLEU-4 of a single caption against the image's captions, 0 to 1.

Ranzato et al., 2016, "Sequence Level Training with Recurrent Neural Networks",
https://arxiv.org/abs/1511.06732, reward BLEU. It is a figure of corpora: a caption without a common
4-gram gets 0 whatever else it says. So it is smoothed, after Lin and Och, 2004, "ORANGE",
https://aclanthology.org/C04-1072: one is added to the matched and to all k-grams, for k = 2..4.

BLEU = min(1, e^(1 - r/c)) * (m_1 / g_1 * prod_k (m_k + 1) / (g_k + 1))^(1/4)

with m_k of the caption's g_k k-grams found in references, c its words, and r those of the reference
nearest in length. The end of a caption counts as a word, as in `cider_d`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import reduce

import numpy as np

from exports.wording import Ngram, ngrams, words
from trainer.metrics.bleu import ORDERS
from trainer.rewards._reward import Floats, Sampled, Sources, marked
from trainer.rewards._reward import Reward as BaseReward


class Reward(BaseReward):
    """See the module."""

    def __init__(self, sources: Sources) -> None:
        super().__init__(sources)
        self._references = [_Reference(marked(captions)) for captions in sources.references]

    def scores(self, sampled: Sampled) -> Floats:
        """See `_reward.Reward`."""
        pairs = zip(sampled.references, sampled.marked, strict=True)
        return np.array([self._references[example].bleu(words(text)) for example, text in pairs])


class _Reference:
    def __init__(self, captions: Sequence[str]) -> None:
        split = [words(caption) for caption in captions]
        self._lengths = [len(tokens) for tokens in split]
        self._most: list[Counter[Ngram]] = [
            reduce(Counter.__or__, (ngrams(tokens, order) for tokens in split)) for order in ORDERS
        ]

    def bleu(self, tokens: Sequence[str]) -> float:
        if not tokens:
            return 0.0
        product = 1.0
        for order, most in zip(ORDERS, self._most, strict=True):
            matched = sum(min(n, most[ngram]) for ngram, n in ngrams(tokens, order).items())
            added = 0 if order == 1 else 1
            product *= (matched + added) / (max(0, len(tokens) - order + 1) + added)
        nearest = min(self._lengths, key=lambda length: (abs(length - len(tokens)), length))
        return min(1.0, math.exp(1 - nearest / len(tokens))) * product ** (1 / len(ORDERS))
