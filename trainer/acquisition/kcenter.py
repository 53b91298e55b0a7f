"""K-center greedy: the image that is farthest from all that is labelled or picked, each time.

Sener and Savarese, 2018, "Active Learning for Convolutional Neural Networks: A Core-Set Approach",
https://arxiv.org/abs/1708.00489, algorithm 1; the greedy rule is that of Gonzalez, 1985,
https://doi.org/10.1016/0304-3975(85)90224-5. No image is then farther from the nearest labelled or
picked one than twice what the best choice of as many could reach. It covers the rare too, so it
takes outliers early: a first handful is better picked by `typiclust`.

Where nothing is labelled the first pick is the image nearest to the mean of all.
"""

import numpy as np

from trainer.acquisition._acquisition import Acquisition as Base
from trainer.acquisition._distances import Features, distance_to, distances, nearest
from trainer.acquisition._pool import Pick, Pool
from trainer.config import Config as BaseConfig


class Config(BaseConfig):
    """Keys of `[method] name = "kcenter"`: none."""


class Acquisition(Base):
    """See the module. A pick's score is its distance to the nearest labelled or picked image."""

    def choose(self, pool: Pool, count: int) -> list[Pick]:
        """See `Base`."""
        picks = []
        if pool.labelled.any():
            apart = nearest(pool.features, pool.features[pool.labelled])[1]
        else:
            first, score = _middle(pool.features)
            reason = "nearest to the mean of all images; nothing is labelled yet"
            picks.append(pool.pick(first, method="kcenter", score=score, reason=reason))
            apart = distance_to(pool.features, first)
            apart[first] = -np.inf
        apart[pool.labelled] = -np.inf
        while len(picks) < count:
            place = int(apart.argmax())
            score = float(apart[place])
            reason = f"the farthest from everything labelled or picked: {score:.3f}"
            picks.append(pool.pick(place, method="kcenter", score=score, reason=reason))
            np.minimum(apart, distance_to(pool.features, place), out=apart)
            apart[place] = -np.inf
        return picks


def _middle(features: Features) -> tuple[int, float]:
    """Returns the place nearest to the mean, and how far it is."""
    apart = distances(features, features.mean(0, keepdims=True))[:, 0]
    place = int(apart.argmin())
    return place, float(apart[place])
