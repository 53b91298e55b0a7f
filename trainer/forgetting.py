"""How much of what a model knew is left after fine-tuning: does it still see images as before?

Nothing but images is needed: the model as it was is the measure of itself as it is. Shapes: n
images, D features.
"""

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from trainer.features import nearest_others
from trainer.intervals import Interval, bootstrap
from trainer.metrics._scores import mean_scores


class Views(NamedTuple):
    """What a model makes of n images: `features` of its encoder, `embeddings` beside captions."""

    features: Tensor
    embeddings: Tensor


def agreement(before: Views, after: Views, *, neighbours: int) -> dict[str, Interval]:
    """Returns how far two models see the same images alike: 1 where they do, whatever is asked.

    - neighbours: the mean share of an image's nearest others that still are, by its embedding;
      of strangers `neighbours` / (n - 1) would be the same.
    - feature neighbours: likewise by the encoder's features, which is what a captioner is given.
    - cosine: of an image's embeddings before and after.
    - CKA: of all features at once (see `linear_cka`); nan bounds, for it is no mean over images.

    Args:
        before: Of the n images.
        after: Of the same images, by the other model.
        neighbours: How many are compared, below n.

    Raises:
        ConfigError: there are not so many images.
    """
    cosines = F.cosine_similarity(before.embeddings.double(), after.embeddings.double(), dim=1)
    rows = {
        "neighbours": neighbours_kept(before.embeddings, after.embeddings, neighbours),
        "feature neighbours": neighbours_kept(before.features, after.features, neighbours),
        "cosine": cosines,
    }
    found: dict[str, Interval] = {}
    for name, values in rows.items():
        found |= bootstrap(mean_scores(name, values.numpy().astype(np.float64)))
    cka = linear_cka(before.features, after.features)
    return {**found, "CKA": Interval(cka, math.nan, math.nan)}


def neighbours_kept(before: Tensor, after: Tensor, count: int) -> Tensor:
    """Returns (n,), the share of each image's `count` nearest others (n, D) that stay so.

    Raises:
        ConfigError: there are not so many others.
    """
    first, second = nearest_others(before, count), nearest_others(after, count)
    return (first[:, :, None] == second[:, None]).any(2).double().mean(1)


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Returns linear centred kernel alignment of features (n, D) and (n, D'), from 0 to 1.

    Kornblith et al., 2019, "Similarity of Neural Network Representations Revisited",
    https://arxiv.org/abs/1905.00414, equation 4 with linear kernels:
    |Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms of centred features. Turns and scales count for
    nothing. It is high wherever images are few beside the features (n < D).
    """
    x, y = (one.double() - one.double().mean(0) for one in (first, second))
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))
