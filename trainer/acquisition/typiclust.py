"""TypiClust: the most typical image of every large cluster in which nothing is labelled.

Hacohen, Dekel and Weinshall, 2022, "Active Learning on a Budget: Opposite Strategies Suit High and
Low Budgets", https://arxiv.org/abs/2202.02794, algorithm 1: k-means into min(labelled + picks, 500)
clusters; those with the fewest labelled images come first, the larger before the smaller; from each
the image with the largest typicality is picked. For the first labels, when typical images teach
more than unusual ones.

Departures:

1. Of a cluster of more than 2,048 images, the 2,048 nearest to its mean are candidates; their
   neighbours are searched among all.
2. Clusters of 5 images or fewer are dropped as in the paper, but serve when the others are used up.
"""

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from trainer.acquisition._acquisition import Acquisition as Base
from trainer.acquisition._clusters import NEIGHBOURS, typicality
from trainer.acquisition._distances import distances
from trainer.acquisition._pool import Pick, Pool
from trainer.config import Config as BaseConfig

_CANDIDATES = 2048


class Config(BaseConfig):
    """Keys of `[method] name = "typiclust"`."""

    neighbours: int = Field(default=NEIGHBOURS, ge=1)
    """Others of its cluster that an image is typical of; at most half of them count."""
    smallest: int = Field(default=6, ge=1)
    """Images of a cluster that is not dropped."""


class Acquisition(Base):
    """See the module. A pick's score is its typicality."""

    def choose(self, pool: Pool, count: int) -> list[Pick]:
        """See `Base`."""
        picks: list[Pick] = []
        for tier in self._tiers(pool):
            queues = [(_reason(pool, number), self._ranked(pool, number)) for number in tier]
            while queues:  # each round takes one of every cluster
                left = []
                for reason, ranked in queues:
                    if len(picks) == count:
                        return picks
                    found = next(ranked, None)
                    if found is not None:
                        place, score = found
                        pick = pool.pick(place, method="typiclust", score=score, reason=reason)
                        picks.append(pick)
                        left.append((reason, ranked))
                queues = left
        return picks

    def _tiers(self, pool: Pool) -> list[list[int]]:
        """Returns the large and the small clusters, the least labelled first."""
        sizes = pool.clusters.sizes
        known = np.bincount(pool.clusters.labels[pool.labelled], minlength=len(sizes))
        order = np.lexsort((-sizes, known)).tolist()
        large = [number for number in order if sizes[number] >= self.config.smallest]
        return [large, [number for number in order if sizes[number] < self.config.smallest]]

    def _ranked(self, pool: Pool, number: int) -> Iterator[tuple[int, float]]:
        """Yields the open places of a cluster with their typicality, the most typical first."""
        members = pool.clusters.members(number)
        rows = members[~pool.labelled[members]]
        if len(rows) > _CANDIDATES:
            mean = pool.features[members].mean(0, keepdims=True)
            rows = rows[distances(pool.features[rows], mean)[:, 0].argsort(kind="stable")]
        for start in range(0, len(rows), _CANDIDATES):
            part = rows[start : start + _CANDIDATES]
            found = typicality(pool.features, part, members, self.config.neighbours)
            for best in np.argsort(-found, kind="stable"):
                yield int(part[best]), float(found[best])


def _reason(pool: Pool, number: int) -> str:
    members = pool.clusters.members(number)
    known = int(pool.labelled[members].sum())
    among = f"{known} of them labelled" if known else "none of them labelled"
    return f"typical of {len(members)} images that are alike, {among}"
