"""1 for a caption that breaks off, else 0 (`trainer.metrics.bad_endings`); weigh it below 0.

One that was cut because it grew too long breaks off, whatever its last word.
"""

import numpy as np

from exports.wording import breaks_off, words
from trainer.rewards._reward import Floats, Sampled
from trainer.rewards._reward import Reward as BaseReward


class Reward(BaseReward):
    """See the module."""

    def scores(self, sampled: Sampled) -> Floats:
        """See `_reward.Reward`."""
        pairs = zip(sampled.texts, sampled.ended, strict=True)
        return np.array([float(not ended or breaks_off(words(text))) for text, ended in pairs])
