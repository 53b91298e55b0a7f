"""K-means of many images in seconds, and how typical an image is of those around it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.acquisition._distances import Features, blocks, distance_to, distances, nearest

MOST_CLUSTERS = 500
NEIGHBOURS = 20
_SAMPLE = 16_384  # images that centres are found with
_ROUNDS = 20
_LAST_ROUNDS = 2  # over all images, where there are more


@dataclass(frozen=True, slots=True)
class Clusters:
    """A partition of the images; cluster 0 is the largest.

    Attributes:
        labels: (n,), the cluster of each.
        sizes: (k,), images in each, at least 1.
    """

    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def members(self, cluster: int) -> NDArray[np.int64]:
        """Returns the places of a cluster's images, in their order."""
        return np.flatnonzero(self.labels == cluster)


def cluster(features: Features, count: int, seed: int) -> Clusters:
    """Returns at most `count` clusters of features (n, D) by Lloyd's k-means.

    Centres begin by k-means++ (Arthur and Vassilvitskii, 2007,
    https://theory.stanford.edu/~sergei/papers/kMeansPP-soda.pdf). Of more than 16,384 images they
    are found with a sample of so many, and moved twice more over all. There are fewer clusters
    where images are the same or a centre loses all of its own.
    """
    draw = np.random.default_rng(seed)
    sample = features
    if len(features) > _SAMPLE:
        sample = features[draw.choice(len(features), _SAMPLE, replace=False)]
    centres = sample[plus_plus(sample[: max(4096, 4 * count)], count, draw)]
    labels = nearest(sample, centres)[0]
    for _ in range(_ROUNDS):
        centres = _means(sample, labels, centres)
        before, labels = labels, nearest(sample, centres)[0]
        if np.array_equal(before, labels):
            break
    if sample is not features:
        for _ in range(_LAST_ROUNDS):
            labels = nearest(features, centres)[0]
            centres = _means(features, labels, centres)
        labels = nearest(features, centres)[0]
    return _by_size(labels)


def plus_plus(features: Features, count: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """Returns up to `count` places of (n, D): each drawn by its squared distance to those before.

    Fewer where all others are at a place that is drawn already.
    """
    found = [int(draw.integers(len(features)))]
    apart = distance_to(features, found[0])
    while len(found) < count:
        weights = apart.astype(np.float64) ** 2
        weights[found] = 0  # rounding leaves something of a distance to oneself
        if not weights.any():
            break
        found.append(int(draw.choice(len(features), p=weights / weights.sum())))
        np.minimum(apart, distance_to(features, found[-1]), out=apart)
    return np.array(found)


def typicality(
    features: Features,
    rows: NDArray[np.int64],
    members: NDArray[np.int64],
    neighbours: int = NEIGHBOURS,
) -> NDArray[np.float32]:
    """Returns how typical rows are of a cluster, (r,): 1 / mean distance to the nearest others.

    Hacohen et al., 2022, https://arxiv.org/abs/2202.02794, equation 1. As in its authors' code, at
    most half of the members count as neighbours; an image that is alone has 0.

    Args:
        features: (n, D).
        rows: places (r,), all of them among the members.
        members: places (m,) of the cluster.
        neighbours: how many others.
    """
    if len(members) < 2:
        return np.zeros(len(rows), np.float32)
    count = max(1, min(neighbours, len(members) // 2))
    own, found = features[members], np.empty(len(rows), np.float32)
    for block in blocks(len(rows), len(members)):
        apart = distances(features[rows[block]], own)
        apart[rows[block, None] == members] = 0  # oneself, whatever rounding made of it
        nearest_ones = np.partition(apart, count, axis=1)[:, : count + 1]
        found[block] = 1 / (nearest_ones.sum(1) / count + 1e-5)
    return found


def _means(features: Features, labels: NDArray[np.int64], centres: Features) -> Features:
    """Returns the mean of each cluster; one that is empty stays where it was."""
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels, minlength=len(centres)))
    found, start = centres.copy(), 0
    for number, end in enumerate(ends):
        if end > start:
            found[number] = features[order[start:end]].mean(0)
        start = end
    return found


def _by_size(labels: NDArray[np.int64]) -> Clusters:
    """Returns the clusters that have images, the largest first."""
    sizes = np.bincount(labels)
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    renamed = np.empty(len(sizes), np.int64)
    renamed[order] = np.arange(len(order))
    return Clusters(renamed[labels], sizes[order])
