"""1 for a caption that repeats itself, else 0 (`trainer.metrics.repetition`); weigh it below 0."""

import numpy as np

from exports.wording import repeats, words
from trainer.rewards._reward import Floats, Sampled
from trainer.rewards._reward import Reward as BaseReward


class Reward(BaseReward):
    """See the module."""

    def scores(self, sampled: Sampled) -> Floats:
        """See `_reward.Reward`."""
        return np.array([float(repeats(words(text))) for text in sampled.texts])
