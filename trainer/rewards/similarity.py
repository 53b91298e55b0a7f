"""The cosine of caption and image in a matcher's shared space (ITC), -1 to 1.

Cho et al., 2022, "Fine-grained Image Captioning with CLIP Reward", https://arxiv.org/abs/2205.13115,
with the matcher of a run in CLIP's place.
"""

import numpy as np

from trainer.rewards._matching import Matching
from trainer.rewards._reward import Floats, Sampled, Sources
from trainer.rewards._reward import Reward as BaseReward


class Reward(BaseReward):
    """See the module."""

    def __init__(self, sources: Sources) -> None:
        super().__init__(sources)
        self._matching = Matching(sources, "similarity")

    def scores(self, sampled: Sampled) -> Floats:
        """See `_reward.Reward`."""
        reader = self._matching.reader
        images = reader.embed_images(self._matching.pixels(sampled.images))
        own = images.repeat_interleave(len(sampled.texts) // len(images), dim=0)
        cosines = (own * reader.embed_captions(sampled.texts)).sum(1)
        return cosines.double().cpu().numpy().astype(np.float64)
