"""ProbCover: the images whose surroundings, together, hold the most of all images.

Yehuda, Dekel, Hacohen and Weinshall, 2022, "Active Learning Through a Covering Lens",
https://arxiv.org/abs/2205.11320, algorithm 1: an image covers those within a distance delta; each
pick is the image that covers the most of what is not covered yet, by a labelled image or a pick.
Delta is as large as it may be with a share `purity` of all images (0.95) having none but their own
kind within it (their section 4.2).

Departures:

1. The kinds are the pool's clusters, as captions have no classes.
2. Delta is no smaller than what an image needs, in the median, to cover its share: as many images
   as there are, divided by the labelled and picked ones. Clusters of photographs touch each other,
   and where they do a pure surrounding is an empty one.
3. Of more than 10,000 images, candidates and what they cover are a sample of so many.
4. Once all is covered it is to be covered a second time.
"""

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trainer.acquisition._acquisition import Acquisition as Base
from trainer.acquisition._distances import Features, blocks, distances, nearest
from trainer.acquisition._pool import Pick, Pool
from trainer.config import Config as BaseConfig
from trainer.errors import ConfigError

_SAMPLE = 10_000  # n^2 bytes of who covers whom
_ANCHORS = 1000  # images that delta is found with


class Config(BaseConfig):
    """Keys of `[method] name = "probcover"`."""

    purity: float = Field(default=0.95, gt=0, lt=1)
    delta: float | None = Field(default=None, gt=0)
    """The distance, where you know better."""


class Acquisition(Base):
    """See the module. A pick's score is the share of images that it newly covers."""

    def choose(self, pool: Pool, count: int) -> list[Pick]:
        """See `Base`."""
        sample = np.arange(len(pool.features))
        if len(sample) > _SAMPLE:
            draw = np.random.default_rng(pool.seed)
            sample = np.sort(draw.choice(sample, _SAMPLE, replace=False))
        features, allowed = pool.features[sample], ~pool.labelled[sample]
        if allowed.sum() < count:
            raise ConfigError(
                f"probcover chooses among {_SAMPLE} images, {allowed.sum()} of them not labelled: "
                f"{count} picks are too many; take kcenter or typiclust"
            )
        delta = self.config.delta or self._delta(pool, features, sample, count)
        covers = _covers(features, delta)
        waiting = _uncovered(pool, features, delta)
        picks: list[Pick] = []
        gains = _gains(covers, waiting)
        while len(picks) < count:
            best = int(np.where(allowed, gains, -1).argmax())
            if not gains[best]:
                waiting = np.ones(len(sample), np.bool_)
                gains = _gains(covers, waiting)
                continue
            reason = f"{gains[best]} images within {delta:.3f} of it that nothing covers yet"
            score = gains[best] / len(sample)
            place = int(sample[best])
            picks.append(pool.pick(place, method="probcover", score=score, reason=reason))
            allowed[best] = False
            new = waiting & covers[best]
            gains -= _gains(covers, new)
            waiting &= ~new
        return picks

    def _delta(
        self, pool: Pool, features: Features, sample: NDArray[np.int64], count: int
    ) -> float:
        labels = pool.clusters.labels[sample]
        draw = np.random.default_rng(pool.seed)
        anchors = draw.permutation(len(sample))[:_ANCHORS]
        share = max(1, len(sample) // (int(pool.labelled.sum()) + count))
        pure = np.empty(len(anchors), np.float32)
        needed = np.empty(len(anchors), np.float32)
        for block in blocks(len(anchors), len(sample)):
            rows = anchors[block]
            apart = distances(features[rows], features)
            needed[block] = np.partition(apart, share - 1, axis=1)[:, share - 1]
            others = labels[rows, None] != labels
            nearest_other = np.where(others, apart, np.inf).min(1)
            pure[block] = np.where(others.any(1), nearest_other, apart.max(1))
        return float(max(np.quantile(pure, 1 - self.config.purity), np.median(needed), 1e-6))


def _covers(features: Features, delta: float) -> NDArray[np.bool_]:
    """Returns who covers whom, (n, n)."""
    found = np.empty((len(features), len(features)), np.bool_)
    for block in blocks(len(features), len(features)):
        np.less_equal(distances(features[block], features), delta, out=found[block])
    np.fill_diagonal(found, True)
    return found


def _uncovered(pool: Pool, features: Features, delta: float) -> NDArray[np.bool_]:
    if not pool.labelled.any():
        return np.ones(len(features), np.bool_)
    return nearest(features, pool.features[pool.labelled])[1] > delta


def _gains(covers: NDArray[np.bool_], waiting: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Returns how many of the waiting ones each image covers, (n,)."""
    found: NDArray[np.int64] = np.zeros(len(covers), np.int64)
    rows = np.flatnonzero(waiting)
    for block in blocks(len(rows), len(covers)):
        found += covers[rows[block]].sum(0, dtype=np.int64)
    return found
