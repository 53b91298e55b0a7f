"""What picks are made from: images, some of them labelled, and what a captioner says of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.acquisition._clusters import MOST_CLUSTERS, Clusters, cluster, typicality
from trainer.acquisition._distances import Features
from trainer.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Pick:
    """An image to label, and why.

    Attributes:
        row: Of the image, as the pool was given it.
        method: Which picked it.
        cluster: Its cluster among the pool's; 0 is the largest.
        typicality: How typical it is of its cluster.
        score: What the method went by; comparable within a method.
        reason: In words.
    """

    row: int
    method: str
    cluster: int
    typicality: float
    score: float
    reason: str


class Speaker(Protocol):
    """What a captioner says of images, asked only by methods that need it."""

    def samples(
        self, rows: Sequence[int], count: int, *, top_p: float, max_new_tokens: int
    ) -> list[list[str]]:
        """Returns `count` captions drawn for each image."""

    def gradients(self, rows: Sequence[int], width: int) -> NDArray[np.float32]:
        """Returns what each image would change in the output head, (r, width).

        The gradient of the loss of the captioner's own best caption, projected at random.
        """


@dataclass(frozen=True, slots=True)
class Pool:
    """Images, no two of them near-duplicates: one stands for each group of those.

    Make one by `Pool.of`. A place counts the pool's images; a row those that it was made of.

    Attributes:
        features: (n, D), unit vectors.
        labelled: (n,), whether an image, or a near-duplicate of it, is labelled.
        rows: (n,), the row of each.
        clusters: Of all images.
        seed: Of whatever a method draws.
        speaker: A captioner, if there is one.
    """

    features: Features
    labelled: NDArray[np.bool_]
    rows: NDArray[np.int64]
    clusters: Clusters
    seed: int
    speaker: Speaker | None

    @classmethod
    def of(
        cls,
        features: Features,
        labelled: NDArray[np.bool_],
        groups: NDArray[np.int64],
        *,
        budget: int,
        seed: int = 0,
        speaker: Speaker | None = None,
    ) -> "Pool":
        """Returns the pool of some images.

        Args:
            features: (rows, D), unit vectors.
            labelled: (rows,).
            groups: (rows,), the same number for near-duplicates of each other.
            budget: how many images are to be picked in all; with the labelled ones, and up to 500,
                the number of clusters.
            seed: of clusters and draws.
            speaker: a captioner.

        Raises:
            DataError: there are no images.
        """
        if not len(features):
            raise DataError("there are no images to pick from")
        numbers, first, group = np.unique(groups, return_index=True, return_inverse=True)
        known = np.zeros(len(numbers), np.bool_)
        known[group[labelled]] = True
        order = np.argsort(first)
        rows = first[order]
        kept = features if len(rows) == len(features) else features[rows]
        wanted = min(int(known.sum()) + budget, MOST_CLUSTERS, len(rows))
        clusters = cluster(kept, wanted, seed)
        return cls(kept, known[order], rows.astype(np.int64), clusters, seed, speaker)

    @property
    def open(self) -> NDArray[np.int64]:
        """The places that may be picked."""
        return np.flatnonzero(~self.labelled)

    def plus(self, places: Sequence[int]) -> "Pool":
        """Returns the pool with more images labelled."""
        labelled = self.labelled.copy()
        labelled[list(places)] = True
        return replace(self, labelled=labelled)

    def sample(self, limit: int) -> NDArray[np.int64]:
        """Returns the places that may be picked, or `limit` of them by chance where there are more.

        The same ones each time.
        """
        if len(self.open) <= limit:
            return self.open
        return np.sort(np.random.default_rng(self.seed).choice(self.open, limit, replace=False))

    def asked(self, method: str) -> Speaker:
        """Returns the captioner.

        Raises:
            ConfigError: there is none.
        """
        if self.speaker is None:
            raise no_captioner(method)
        return self.speaker

    def pick(self, place: int, *, method: str, score: float, reason: str) -> Pick:
        """Returns the image at a place as a pick."""
        own = int(self.clusters.labels[place])
        found = typicality(self.features, np.array([place]), self.clusters.members(own))
        return Pick(int(self.rows[place]), method, own, float(found[0]), score, reason)


def no_captioner(method: str) -> ConfigError:
    """Returns what is to be said where a method asks a captioner that is not there."""
    return ConfigError(
        f"{method} asks a captioner, and there is none: set model to a run of `python -m trainer "
        "finetune`, or take kcenter, typiclust or probcover"
    )
