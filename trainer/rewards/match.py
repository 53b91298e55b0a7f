"""How likely a caption is to describe its image, by a matcher's classifier (ITM), 0 to 1.

Li et al., 2022, "BLIP", https://arxiv.org/abs/2201.12086, section 3.2. It rewards what is true of
the picture, whether or not a person happened to write it. It does not know good style from bad:
take it beside `cider_d`.
"""

import numpy as np

from trainer.rewards._matching import Matching, by_image
from trainer.rewards._reward import Floats, Sampled, Sources
from trainer.rewards._reward import Reward as BaseReward


class Reward(BaseReward):
    """See the module."""

    def __init__(self, sources: Sources) -> None:
        super().__init__(sources)
        self._matching = Matching(sources, "match")

    def scores(self, sampled: Sampled) -> Floats:
        """See `_reward.Reward`."""
        pixels = self._matching.pixels(sampled.images)
        return np.concatenate(self._matching.reader.probabilities(pixels, by_image(sampled)))
