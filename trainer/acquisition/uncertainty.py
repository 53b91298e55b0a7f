"""Uncertainty: the images that the captioner describes in the most different ways.

Captions are drawn for every image; the score is 1 - their mean similarity in pairs. The entropy of
tokens would mislead: many captions of a picture are true, and a captioner that hesitates between
two words for one thing is not unsure of what it sees. Disagreement between sampled texts rather
than tokens is the idea of Kuhn, Gal and Farquhar, 2023, "Semantic Uncertainty",
https://arxiv.org/abs/2302.09664.

Departure: similarity is CIDEr-D (see `trainer.metrics.cider`) with the document frequencies of all
that was drawn, divided by what the two captions score with themselves: 1 for the same words, 0 for
none in common. No second model judges which captions mean the same.
"""

import math
from itertools import combinations

import numpy as np
from pydantic import Field

from trainer.acquisition._acquisition import Acquisition as Base
from trainer.acquisition._pool import Pick, Pool
from trainer.config import Config as BaseConfig
from trainer.metrics.cider import CiderD, DocumentFrequencies


class Config(BaseConfig):
    """Keys of `[method] name = "uncertainty"`."""

    captions: int = Field(default=5, ge=2)
    """Drawn for each image."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """See `trainer.decoding.sample`."""
    max_new_tokens: int = Field(default=20, ge=1)
    candidates: int = Field(default=2000, ge=1)
    """Images that the captioner is asked about: drawn by chance where more are unlabelled."""


class Acquisition(Base):
    """See the module. A pick's score is the disagreement, from 0 to 1."""

    asks = True

    def choose(self, pool: Pool, count: int) -> list[Pick]:
        """See `Base`."""
        config, speaker = self.config, pool.asked("uncertainty")
        places = pool.sample(max(config.candidates, count))
        said = speaker.samples(
            pool.rows[places].tolist(),
            config.captions,
            top_p=config.top_p,
            max_new_tokens=config.max_new_tokens,
        )
        frequencies = DocumentFrequencies.of(said)
        scores = np.array([disagreement(captions, frequencies) for captions in said])
        picks = []
        for best in np.argsort(-scores, kind="stable")[:count]:
            place, score = int(places[best]), float(scores[best])
            reason = f"the captioner says {_shown(said[best])}"
            picks.append(pool.pick(place, method="uncertainty", score=score, reason=reason))
        return picks


def disagreement(captions: list[str], frequencies: DocumentFrequencies) -> float:
    """Returns 1 - the mean similarity of two captions, from 0 (all the same) to 1."""
    scorer = CiderD([[caption] for caption in captions], frequencies=frequencies)
    own = [scorer.score(number, caption) for number, caption in enumerate(captions)]
    found = []
    for first, second in combinations(range(len(captions)), 2):
        scale = math.sqrt(own[first] * own[second])
        if scale == 0:  # nothing but words that are in every image's captions
            found.append(float(captions[first] == captions[second]))
            continue
        both = scorer.score(first, captions[second]), scorer.score(second, captions[first])
        found.append(min(1.0, sum(both) / 2 / scale))
    return 1 - sum(found) / len(found)


def _shown(captions: list[str]) -> str:
    """Returns, in quotes, the first caption and one that differs from it, if there is one."""
    other = next((one for one in captions if one != captions[0]), None)
    return f'always "{captions[0]}"' if other is None else f'both "{captions[0]}" and "{other}"'
