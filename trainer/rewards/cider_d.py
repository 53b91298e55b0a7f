"""CIDEr-D against the image's captions, 0 to 10 (see `trainer.metrics.cider`).

The end of a caption counts as a word of it, in samples and references, or captions that break off
("a man in a") would lose nothing.
"""

from trainer.metrics.cider import CiderD
from trainer.rewards._reward import Floats, Sampled, Sources, marked
from trainer.rewards._reward import Reward as BaseReward


class Reward(BaseReward):
    """See the module."""

    def __init__(self, sources: Sources) -> None:
        super().__init__(sources)
        references = [marked(captions) for captions in sources.references]
        self._scorer = CiderD(references, frequencies=sources.frequencies)

    def scores(self, sampled: Sampled) -> Floats:
        """See `_reward.Reward`."""
        return self._scorer.scores(sampled.references, sampled.marked)
