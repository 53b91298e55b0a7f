"""Features of images, and what can be said of their quality with and without labels.

Shapes: n images or m known ones, D features of each. All figures are computed on the CPU.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from trainer.errors import ConfigError

_BATCH = 64  # images encoded at a time
_ROWS = 1024  # images compared with all at a time
_PENALTY = 1e-2  # of the linear probe's weights; see `linear_accuracy`


@torch.no_grad()
def pooled_features(encoder: Any, images: NDArray[np.uint8]) -> Tensor:
    """Returns the pooled features (n, D), float32 on the CPU.

    Args:
        encoder: as in `trainer.encoders`, in evaluation mode, on any device.
        images: uint8 (n, H, W, 3).
    """
    device = next(encoder.parameters()).device
    blocks = []
    for start in range(0, len(images), _BATCH):
        batch = torch.from_numpy(images[start : start + _BATCH]).permute(0, 3, 1, 2)
        blocks.append(encoder(batch.to(device))[1].float().cpu())
    return torch.cat(blocks)


def nearest_others(features: Tensor, count: int) -> Tensor:
    """Returns for each of features (n, D) which others are most similar, (n, count), the best last.

    Similarity is the cosine, from the mean on; an image is never its own neighbour.

    Raises:
        ConfigError: there are not so many others.
    """
    if count >= len(features):
        raise ConfigError(
            f"{count} neighbours of each image asked for, but there are {len(features)} images; "
            "ask for fewer"
        )
    unit, found = _unit(features - features.mean(0)), []
    for start in range(0, len(unit), _ROWS):
        cosines = unit[start : start + _ROWS] @ unit.T
        rows = torch.arange(len(cosines))
        cosines[rows, start + rows] = -math.inf
        found.append(cosines.topk(count, dim=1).indices.flip(1))
    return torch.cat(found)


def rankme(features: Tensor) -> float:
    """Returns the effective rank of features (n, D), from 1 to min(n, D).

    Garrido et al., 2022, "RankMe", https://arxiv.org/abs/2210.02885, equation 1: the exponential of
    the entropy of the normalised singular values. It compares encoders of one method and width.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + 1e-7
    return float((-(shares * shares.log()).sum()).exp())


def alignment(first: Tensor, second: Tensor) -> float:
    """Returns how far apart two views' unit features (n, D) are: 0 at best, 2 if unrelated.

    Wang and Isola, 2020, https://arxiv.org/abs/2005.10242: the mean squared distance (alpha = 2).
    """
    gaps = _unit(first) - _unit(second)
    return float(gaps.square().sum(1).mean())


def uniformity(features: Tensor) -> float:
    """Returns how evenly unit features (n, D) fill the sphere: 0 for one point, about -4 at best.

    Wang and Isola, 2020, https://arxiv.org/abs/2005.10242: the logarithm of the mean over pairs of
    two different images of exp(-t * squared distance), t = 2.
    """
    unit = _unit(features)
    closeness = (4 * (unit @ unit.T - 1)).exp()  # the squared distance is 2 - 2 * cosine
    pairs = len(unit) * (len(unit) - 1)
    return float(((closeness.sum() - closeness.trace()) / pairs).log())


def spread(features: Tensor) -> float:
    """Returns how much unit features (n, D) differ between images: 1 if isotropic, 0 if not at all.

    Chen and He, 2020, "SimSiam", https://arxiv.org/abs/2011.10566, figure 2: the standard deviation
    of each dimension, averaged, times sqrt(D).
    """
    unit = _unit(features)
    return float(unit.std(0, correction=0).mean() * math.sqrt(unit.shape[1]))


def knn_accuracy(
    features: Tensor,
    labels: Tensor,
    known: Tensor,
    known_labels: Tensor,
    *,
    neighbours: int,
    temperature: float,
) -> float:
    """Returns the share of images whose label the weighted vote of their neighbours finds.

    Wu et al., 2018, https://arxiv.org/abs/1805.01978, section 3.4: each of the most similar known
    images votes for its label with the weight exp(cosine / temperature).

    Args:
        features: (n, D); `labels`: (n,), class numbers.
        labels: see `features`.
        known: (m, D), of the images that vote; `known_labels`: (m,).
        known_labels: see `known`.
        neighbours: how many of them vote, or all if there are fewer.
        temperature: the lower, the more the nearest ones count.
    """
    cosines = _unit(features) @ _unit(known).T  # (n, m)
    nearest, places = cosines.topk(min(neighbours, len(known)), dim=1)
    votes = torch.zeros(len(features), int(known_labels.max()) + 1, dtype=nearest.dtype)
    weights = ((nearest - nearest[:, :1]) / temperature).exp()  # relative: none overflows
    votes.scatter_add_(1, known_labels[places], weights)
    return _share(votes.argmax(1), labels)


def linear_accuracy(features: Tensor, labels: Tensor, known: Tensor, known_labels: Tensor) -> float:
    """Returns the share of images whose label a linear classifier of the known ones finds.

    Multinomial logistic regression on features that are standardised by the known images, with a
    penalty on the squared weights (1 / (m * C) in scikit-learn's terms). One strength serves:
    between 1e-3 and 0.1 accuracies of random and trained encoders move by some hundredths, and
    choosing anew after every epoch would add its own noise. Shapes are those of `knn_accuracy`.
    """
    mean, deviation = known.double().mean(0), known.double().std(0, correction=0)
    # A dimension that varies by rounding alone carries nothing, and must not be blown up.
    scale = torch.where(deviation > 1e-6 * known.abs().amax(0), deviation, 1.0)
    inputs, known_inputs = ((x.double() - mean) / scale for x in (features, known))
    weights = _logistic_regression(known_inputs, known_labels)
    return _share((inputs @ weights[:-1] + weights[-1]).argmax(1), labels)


def _logistic_regression(inputs: Tensor, labels: Tensor) -> Tensor:
    """Returns weights (D + 1, C), the last row being biases, by L-BFGS from zero."""
    classes = int(labels.max()) + 1
    weights = torch.zeros(inputs.shape[1] + 1, classes, dtype=inputs.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        logits = inputs @ weights[:-1] + weights[-1]
        value = F.cross_entropy(logits, labels) + _PENALTY / 2 * weights[:-1].square().sum()
        value.backward()
        return value.item()

    with torch.enable_grad():
        optimizer.step(loss)
    return weights.detach()


def _share(found: Tensor, labels: Tensor) -> float:
    return float((found == labels).double().mean())


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.double(), dim=1)
