"""TypiClust against a slow transcription, on mixtures of Gaussians, and in a simulated loop."""

import math

import numpy as np
import pytest
from pools import acquisition, make_pool, unit

from trainer.acquisition import typiclust
from trainer.acquisition._pool import Pool


def mixture(sizes: list[int], *, width: int = 2, apart: float = 12, seed: int = 0):
    """Points of Gaussians with deviation 1, their means, and which each is of."""
    draw = np.random.default_rng(seed)
    means = apart * draw.permuted(np.eye(max(width, len(sizes)))[: len(sizes), :width], axis=1)
    if width == 2:
        turns = 2 * np.pi * np.arange(len(sizes)) / len(sizes)
        means = apart * np.stack([np.cos(turns), np.sin(turns)], 1)
    of = np.repeat(np.arange(len(sizes)), sizes)
    points = means[of] + draw.normal(size=(len(of), width))
    order = draw.permutation(len(of))
    return points[order].astype(np.float32), means, of[order]


def slow(pool: Pool, count: int, neighbours: int = 20, smallest: int = 6) -> list[int]:
    """Algorithm 1 of the paper, line by line, with the pool's clusters."""
    labels, features = pool.clusters.labels, pool.features
    known, picked = set(np.flatnonzero(pool.labelled).tolist()), []
    clusters = [np.flatnonzero(labels == number).tolist() for number in set(labels.tolist())]
    clusters = [members for members in clusters if len(members) >= smallest]
    clusters.sort(key=lambda members: (len(known & set(members)), -len(members)))
    for members in clusters[:count]:
        best, most = -1, -math.inf
        for one in members:
            if one in known:
                continue
            others = sorted(
                np.linalg.norm(features[one] - features[o]) for o in members if o != one
            )
            found = 1 / np.mean(others[: min(neighbours, len(members) // 2)])
            if found > most:
                best, most = one, found
        picked.append(int(pool.rows[best]))
    return picked


def test_it_is_the_paper_s_algorithm() -> None:
    for seed in range(5):
        points, _, _ = mixture([60, 45, 30, 20, 12, 3], width=6, apart=6, seed=seed)
        pool = make_pool(points, labelled=[seed, seed + 40], budget=3, seed=seed)
        picks = acquisition("typiclust").pick(pool, 3)
        assert [pick.row for pick in picks] == slow(pool, 3)
        scores = [pick.score for pick in picks]
        assert scores == pytest.approx([pick.typicality for pick in picks])


def test_it_finds_the_means_of_gaussians() -> None:
    """Within 0.2 deviations of each; neighbours enough that chance in who is near averages out."""
    points, means, of = mixture([1500, 1500, 1500])
    picks = acquisition("typiclust", neighbours=750).pick(make_pool(points, budget=3), 3)
    rows = [pick.row for pick in picks]
    assert sorted(of[rows].tolist()) == [0, 1, 2]
    assert np.linalg.norm(points[rows] - means[of[rows]], axis=1).max() < 0.2


def test_clusters_without_labels_come_first() -> None:
    points, _, of = mixture([50, 40, 30])
    largest = int(np.flatnonzero(of == 0)[0])
    pool = make_pool(points, labelled=[largest], budget=2)
    picks = acquisition("typiclust").pick(pool, 3)
    assert [int(of[pick.row]) for pick in picks] == [1, 2, 0]
    assert picks[0].reason == "typical of 40 images that are alike, none of them labelled"
    assert picks[2].reason == "typical of 50 images that are alike, 1 of them labelled"


def test_small_clusters_serve_when_all_else_is_used_up() -> None:
    points, _, of = mixture([8, 7, 3])
    picks = acquisition("typiclust").pick(make_pool(points, budget=3), 18)
    assert sorted(pick.row for pick in picks) == list(range(18))
    assert sorted(of[[pick.row for pick in picks[15:]]].tolist()) == [2, 2, 2]


def test_of_a_large_cluster_those_near_its_mean_are_candidates(monkeypatch) -> None:
    points, _, _ = mixture([300])
    pool = make_pool(points, budget=1)
    whole = acquisition("typiclust").pick(pool, 300)
    monkeypatch.setattr(typiclust, "_CANDIDATES", 40)
    picks = acquisition("typiclust").pick(pool, 300)
    assert sorted(pick.row for pick in picks) == sorted(pick.row for pick in whole)
    near = np.linalg.norm(points - points.mean(0), axis=1).argsort()[:40]
    assert sorted(pick.row for pick in picks[:40]) == sorted(near.tolist())
    scores = [pick.score for pick in picks[:40]]
    assert scores == sorted(scores, reverse=True)


def test_it_beats_chance_where_few_things_are_common() -> None:
    """A loop on 40 kinds of images, the commonest 40 times as frequent as the rarest.

    After 10, 20, 30 and 40 labels an image is taken for what its nearest labelled image is. The
    mean accuracy is higher than with images by chance in so many of 20 draws of the data that a
    fair coin would not do it once in a thousand times (sign test).
    """
    wins = 0
    for seed in range(20):
        draw = np.random.default_rng(seed)
        sizes = np.maximum(4, 160 / np.arange(1, 41)).astype(int)
        kinds = np.repeat(np.arange(40), sizes)
        centres = draw.normal(size=(40, 16))
        features = unit(centres[kinds] + 0.6 * draw.normal(size=(len(kinds), 16)))
        areas = []
        for name in ("typiclust", "random"):
            labelled: list[int] = []
            accuracies = []
            for _ in range(4):
                pool = make_pool(features, labelled=labelled, budget=10, seed=seed)
                labelled += [pick.row for pick in acquisition(name).pick(pool, 10)]
                nearest = (features @ features[labelled].T).argmax(1)
                accuracies.append((kinds[labelled][nearest] == kinds).mean())
            areas.append(float(np.mean(accuracies)))
        wins += areas[0] > areas[1]
    assert sum(math.comb(20, k) for k in range(wins, 21)) / 2**20 < 0.001, wins
