"""BADGE: images that would change the captioner much, and each in a direction of its own.

Ash et al., 2020, "Deep Batch Active Learning by Diverse, Uncertain Gradient Lower Bounds",
https://arxiv.org/abs/1906.03671, algorithm 1: the gradient of the output head's loss, taking the
model's own answer for the truth, is long where the model is unsure; k-means++ over these gradients
draws images that are unsure and unlike each other.

Departures:

1. The answer is a caption: the best that beam search finds, and the loss its mean over tokens.
2. Gradients, of as many dimensions as the head has weights, are projected at random.
3. The first pick is the longest gradient, as in the authors' code, not one by chance.
"""

import numpy as np
from pydantic import Field

from trainer.acquisition._acquisition import Acquisition as Base
from trainer.acquisition._distances import distance_to
from trainer.acquisition._pool import Pick, Pool
from trainer.config import Config as BaseConfig


class Config(BaseConfig):
    """Keys of `[method] name = "badge"`."""

    width: int = Field(default=512, ge=1)
    """Dimensions that are left of a gradient."""
    candidates: int = Field(default=1000, ge=1)
    """Images that the captioner is asked about: drawn by chance where more are unlabelled."""


class Acquisition(Base):
    """See the module. A pick's score is its gradient's distance to those picked before."""

    asks = True

    def choose(self, pool: Pool, count: int) -> list[Pick]:
        """See `Base`."""
        speaker = pool.asked("badge")
        places = pool.sample(max(self.config.candidates, count))
        gradients = speaker.gradients(pool.rows[places].tolist(), self.config.width)
        lengths = np.linalg.norm(gradients, axis=1)
        draw = np.random.default_rng(pool.seed)
        picks: list[Pick] = []
        apart = lengths.copy()
        allowed = np.ones(len(places), np.bool_)
        while len(picks) < count:
            weights = np.where(allowed, apart.astype(np.float64) ** 2, 0)
            if not picks:
                best = int(lengths.argmax())
            elif weights.any():
                best = int(draw.choice(len(places), p=weights / weights.sum()))
            else:  # all that is left is the same as a pick
                best = int(np.flatnonzero(allowed)[0])
            reason = f"would change the captioner (gradient {lengths[best]:.3f}) as no pick before"
            score = float(apart[best])
            picks.append(pool.pick(int(places[best]), method="badge", score=score, reason=reason))
            allowed[best] = False
            own = distance_to(gradients, best)
            apart = own if len(picks) == 1 else np.minimum(apart, own)
        return picks
