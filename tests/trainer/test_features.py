"""Figures of features: golden and analytic values, slow transcriptions, and chance."""

import math
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainer.features import (
    alignment,
    knn_accuracy,
    linear_accuracy,
    pooled_features,
    rankme,
    spread,
    uniformity,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(n: int, classes: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns features that lie around their class's own axis, and the classes."""
    labels = torch.arange(n) % classes
    return 6 * F.one_hot(labels, width).float() + normal(n, width, seed=seed), labels


def test_rankme_of_orthonormal_columns_is_their_number() -> None:
    columns, _ = torch.linalg.qr(normal(64, 8))
    assert rankme(columns) == pytest.approx(8.0, abs=1e-4)


def test_rankme_of_one_direction_is_1() -> None:
    assert rankme(normal(64, 1) @ normal(1, 8, seed=1)) == pytest.approx(1.0, abs=1e-4)
    assert rankme(torch.ones(64, 8)) == pytest.approx(1.0, abs=1e-4)


def test_rankme_is_the_exponential_of_the_entropy() -> None:
    shares = [0.5, 0.25, 0.125, 0.125]  # singular values of a diagonal; entropy 1.75 bits
    assert rankme(torch.diag(torch.tensor(shares))) == pytest.approx(2**1.75, rel=1e-5)


def test_features_that_are_all_zero_have_figures() -> None:
    zeros = torch.zeros(16, 4)
    assert rankme(zeros) == pytest.approx(1.0, abs=1e-4)
    assert spread(zeros) == 0.0 and uniformity(zeros) <= 0.0


def test_alignment_of_known_angles() -> None:
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert alignment(east, 5 * east) == pytest.approx(0.0)
    assert alignment(east, north) == pytest.approx(2.0)
    assert alignment(east, -east) == pytest.approx(4.0)
    both = torch.cat([east, east]), torch.cat([north, -east])
    assert alignment(*both) == pytest.approx(3.0)


def test_uniformity_of_known_points() -> None:
    axes = torch.eye(6)  # every pair is at squared distance 2
    assert uniformity(axes) == pytest.approx(-4.0)
    assert uniformity(torch.ones(6, 3)) == pytest.approx(0.0, abs=1e-9)
    poles = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(poles) == pytest.approx(-8.0)


def test_uniformity_equals_the_paper_pair_by_pair() -> None:
    features = normal(12, 5)
    unit = (features / features.norm(dim=1, keepdim=True)).double()
    kernels = [
        math.exp(-2 * float((unit[i] - unit[j]).square().sum()))
        for i in range(12)
        for j in range(i + 1, 12)
    ]
    assert uniformity(features) == pytest.approx(math.log(sum(kernels) / len(kernels)), abs=1e-6)


def test_spread_is_1_for_isotropic_features_and_0_for_one_point() -> None:
    assert spread(normal(2000, 64)) == pytest.approx(1.0, abs=0.02)
    assert spread(torch.ones(50, 64)) == pytest.approx(0.0, abs=1e-9)
    # Half of the unit circle's points on either end of one axis: deviations 1 and 0.
    ends = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert spread(ends) == pytest.approx(math.sqrt(2) / 2)


def test_knn_equals_the_vote_written_out() -> None:
    features, known = normal(40, 6), normal(90, 6, seed=1)
    draw = random.Random(0)
    labels, known_labels = ([draw.randrange(3) for _ in range(n)] for n in (40, 90))
    hits = 0
    for feature, label in zip(features, labels, strict=True):
        cosines = [float(F.cosine_similarity(feature, other, dim=0)) for other in known]
        votes = [0.0] * 3
        for place in sorted(range(90), key=lambda i: -cosines[i])[:7]:
            votes[known_labels[place]] += math.exp(cosines[place] / 0.2)
        hits += votes.index(max(votes)) == label
    found = knn_accuracy(
        features,
        torch.tensor(labels),
        known,
        torch.tensor(known_labels),
        neighbours=7,
        temperature=0.2,
    )
    assert found == pytest.approx(hits / 40)


@pytest.mark.parametrize("temperature", [0.001, 0.07, 10.0])
def test_knn_separates_clusters(temperature: float) -> None:
    known, test = clusters(100, 4, 16, seed=0), clusters(60, 4, 16, seed=1)
    assert knn_accuracy(*test, *known, neighbours=20, temperature=temperature) == 1.0


def test_fewer_known_images_than_neighbours_all_vote() -> None:
    known, test = clusters(8, 4, 16, seed=0), clusters(60, 4, 16, seed=1)
    assert knn_accuracy(*test, *known, neighbours=20, temperature=0.07) == 1.0


def test_the_linear_probe_separates_clusters_of_any_scale() -> None:
    known, test = clusters(100, 4, 16, seed=0), clusters(60, 4, 16, seed=1)
    scales = torch.logspace(-6, 6, 16)
    assert linear_accuracy(*test, *known) == 1.0
    assert linear_accuracy(test[0] * scales, test[1], known[0] * scales, known[1]) >= 0.98


def test_the_linear_probe_finds_what_neighbours_do_not() -> None:
    """One dimension of 64 decides; the others are noise of the same size."""
    features = normal(1200, 64)
    labels = (features[:, 5] > 0).long()
    sets = (features[:600], labels[:600], features[600:], labels[600:])
    linear = linear_accuracy(*sets)
    assert linear > 0.9
    assert knn_accuracy(*sets, neighbours=20, temperature=0.07) < linear - 0.1


def test_the_linear_probe_equals_gradient_descent() -> None:
    """Two classes, the same penalised loss written out: every image is classified alike."""
    features = normal(300, 5)
    labels = (features[:, 0] + features[:, 1] + normal(300, seed=1) > 0.5).long()
    known = features[:100]
    mean, deviation = known.mean(0), known.std(0, correction=0)
    inputs = ((features - mean) / deviation).double()
    # The softmax of +w/2 and -w/2 is the sigmoid of w; both halves are penalised.
    weights, bias = torch.zeros(5, dtype=torch.double), 0.0
    targets = labels[:100].double()
    for _ in range(2000):
        errors = torch.sigmoid(inputs[:100] @ weights + bias) - targets
        weights = weights - 0.5 * (inputs[:100].T @ errors / 100 + 1e-2 * weights / 2)
        bias -= 0.5 * float(errors.mean())
    found = (inputs[100:] @ weights + bias > 0).long()
    expected = float((found == labels[100:]).double().mean())
    assert 0.6 < expected < 0.9
    assert linear_accuracy(features[100:], labels[100:], known, labels[:100]) == expected
    # Against the other answers: were one image classified differently, the two would not be exact.
    assert linear_accuracy(features[100:], found, known, labels[:100]) == 1.0


def test_random_labels_are_found_by_chance() -> None:
    features, labels = normal(800, 16), torch.arange(800) % 4
    sets = (features[:400], labels[:400], features[400:], labels[400:])
    chance, deviation = 0.25, math.sqrt(0.25 * 0.75 / 400)
    for found in (
        knn_accuracy(*sets, neighbours=20, temperature=0.07),
        linear_accuracy(*sets),
    ):
        assert abs(found - chance) < 4 * deviation


def test_a_label_that_is_not_known_is_never_found() -> None:
    known, (features, labels) = clusters(100, 4, 16, seed=0), clusters(60, 4, 16, seed=1)
    half = torch.where(torch.arange(60) < 30, labels, -1)
    assert knn_accuracy(features, half, *known, neighbours=20, temperature=0.07) == 0.5
    assert linear_accuracy(features, half, *known) == 0.5


def test_a_constant_feature_teaches_nothing() -> None:
    ones, labels = torch.ones(40, 3), torch.arange(40) % 2
    assert linear_accuracy(ones, labels, ones, labels) == 0.5


class Means(nn.Module):
    """Pools an image to its mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = images.float().flatten(2).transpose(1, 2) * self.scale
        return tokens, tokens.mean(1)


def test_features_come_in_order_whatever_the_batches() -> None:
    images = torch.randint(0, 256, (150, 4, 6, 3), dtype=torch.uint8).numpy()
    features = pooled_features(Means(), images)
    assert features.shape == (150, 3) and not features.requires_grad
    assert features.numpy() == pytest.approx(images.mean((1, 2)), abs=1e-3)
