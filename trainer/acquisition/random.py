"""Images by chance: what every other method has to beat."""  # noqa: A005  the field's word

import numpy as np

from trainer.acquisition._acquisition import Acquisition as Base
from trainer.acquisition._pool import Pick, Pool
from trainer.config import Config as BaseConfig


class Config(BaseConfig):
    """Keys of `[method] name = "random"`: none."""


class Acquisition(Base):
    """See the module. A pick's score is 0."""

    def choose(self, pool: Pool, count: int) -> list[Pick]:
        """See `Base`."""
        drawn = np.random.default_rng(pool.seed).permutation(pool.open)[:count].tolist()
        reason = "drawn by chance"
        return [pool.pick(one, method="random", score=0.0, reason=reason) for one in drawn]
