"""Distances, k-means and typicality against slow transcriptions."""

import numpy as np
import pytest
from pools import some_features

from trainer.acquisition import _clusters, _distances
from trainer.acquisition._clusters import cluster, plus_plus, typicality
from trainer.acquisition._distances import distances, nearest


def blobs(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points around the corners of a large simplex, and the corner of each, shuffled."""
    draw = np.random.default_rng(seed)
    corners = np.repeat(np.arange(len(sizes)), sizes)
    points = 20 * np.eye(len(sizes))[corners] + draw.normal(size=(len(corners), len(sizes)))
    order = draw.permutation(len(corners))
    return points[order].astype(np.float32), corners[order]


def test_distances_are_euclidean(monkeypatch) -> None:
    monkeypatch.setattr(_distances, "_CELLS", 20)  # several blocks
    first, second = some_features(9), 3 * some_features(7, seed=1)
    slow = np.linalg.norm(first[:, None] - second[None], axis=2)
    np.testing.assert_allclose(distances(first, second), slow, atol=1e-5)
    places, found = nearest(first, second)
    assert places.tolist() == slow.argmin(1).tolist()
    np.testing.assert_allclose(found, slow.min(1), atol=1e-5)


@pytest.mark.parametrize("sample", [_clusters._SAMPLE, 60])
def test_blobs_are_found_the_largest_first(sample: int, monkeypatch) -> None:
    monkeypatch.setattr(_clusters, "_SAMPLE", sample)  # 60: of 210 points
    points, corners = blobs([40, 100, 70])
    found = cluster(points, 3, seed=0)
    assert found.sizes.tolist() == [100, 70, 40]
    assert [np.unique(corners[found.members(number)]).tolist() for number in range(3)] == [
        [1],
        [2],
        [0],
    ]


def test_no_cluster_is_empty() -> None:
    points = np.repeat(some_features(3), [5, 1, 2], axis=0)
    found = cluster(points, 8, seed=0)
    assert found.sizes.tolist() == [5, 2, 1]
    assert found.labels.tolist() == [0] * 5 + [2] + [1] * 2


def test_every_mean_is_that_of_its_own() -> None:
    """Lloyd's fixed point: nobody is nearer to the mean of another cluster."""
    points = some_features(200)
    found = cluster(points, 6, seed=1)
    means = np.stack([points[found.members(number)].mean(0) for number in range(6)])
    own = np.linalg.norm(points - means[found.labels], axis=1)
    assert (own <= nearest(points, means)[1] + 1e-4).mean() > 0.97


def test_plus_plus_prefers_what_is_far() -> None:
    """Of two points at distance 1 and 3, the second is drawn 9 times of 10."""
    points = np.array([[0.0, 0.0]] * 50 + [[1.0, 0.0], [3.0, 0.0]], np.float32)
    second = []
    for seed in range(400):
        found = plus_plus(points, 2, np.random.default_rng(seed))
        if found[0] < 50:
            second.append(int(found[1]))
    share = second.count(51) / len(second)
    assert share == pytest.approx(0.9, abs=4 * (0.09 / len(second)) ** 0.5)


@pytest.mark.parametrize("neighbours", [1, 4, 50])
def test_typicality_is_the_inverse_mean_distance_to_the_nearest_others(neighbours: int) -> None:
    features = some_features(30)
    members = np.arange(5, 25)
    rows = members[[0, 7, 19]]
    slow = []
    for row in rows:
        apart = sorted(
            float(np.linalg.norm(features[row] - features[one])) for one in members if one != row
        )
        slow.append(1 / np.mean(apart[: min(neighbours, 10)]))
    found = typicality(features, rows, members, neighbours)
    np.testing.assert_allclose(found, slow, rtol=1e-3)
