"""ProbCover against a slow greedy cover, and its delta."""

import numpy as np
import pytest
from pools import acquisition, make_pool, some_features
from test_typiclust import mixture

from trainer.acquisition import probcover
from trainer.errors import ConfigError


@pytest.mark.parametrize("labelled", [(), (0, 7)])
def test_it_covers_greedily(labelled: tuple[int, ...]) -> None:
    for seed in range(5):
        features = some_features(90, width=3, seed=seed)
        apart = np.linalg.norm(features[:, None] - features[None], axis=2)
        waiting = {i for i in range(90) if all(apart[i, known] > 0.8 for known in labelled)}
        expected: list[int] = []
        while len(expected) < 8 and waiting:
            gains = [
                -1 if i in (*labelled, *expected) else sum(apart[i, j] <= 0.8 for j in waiting)
                for i in range(90)
            ]
            expected.append(int(np.argmax(gains)))
            waiting -= {j for j in waiting if apart[expected[-1], j] <= 0.8}
        pool = make_pool(features, labelled=labelled)
        picks = acquisition("probcover", delta=0.8).pick(pool, 8)
        assert [pick.row for pick in picks][: len(expected)] == expected
        assert len(expected) > 4


def test_what_is_covered_is_covered_again() -> None:
    points, _, of = mixture([10, 6], apart=9)
    picks = acquisition("probcover", delta=8.0).pick(make_pool(points, budget=4), 4)
    assert of[[pick.row for pick in picks]].tolist() == [0, 1, 0, 1]
    assert picks[0].score == pytest.approx(10 / 16)
    assert picks[2].reason == "10 images within 8.000 of it that nothing covers yet"


def test_delta_is_as_large_as_purity_allows() -> None:
    """Two lines of points 1 apart, 4 between their ends: one of 10 on each side sees the other."""
    line = np.concatenate([np.arange(10.0), 13 + np.arange(10.0)])[:, None].astype(np.float32)
    pool = make_pool(line, budget=2)
    assert sorted(pool.clusters.sizes.tolist()) == [10, 10]
    # Distances to the nearest of the other kind: 4, 4, 5, 5, ... 13, 13; a tenth may be nearer.
    own = acquisition("probcover", purity=0.9)
    found = own._delta(pool, line, np.arange(20), 10)
    assert found == pytest.approx(np.quantile(np.repeat(np.arange(4, 14), 2), 0.1), abs=1e-3)
    # With 10 picks a share is 2 images, which reach less far; with 2 picks it is 10 of them.
    assert own._delta(pool, line, np.arange(20), 2) == pytest.approx(6.5, abs=1.01)


def test_many_images_are_sampled(monkeypatch) -> None:
    monkeypatch.setattr(probcover, "_SAMPLE", 30)
    points, _, of = mixture([60, 60], apart=9)
    pool = make_pool(points, budget=2)
    picks = acquisition("probcover", delta=6.0).pick(pool, 2)
    assert sorted(of[[pick.row for pick in picks]].tolist()) == [0, 1]
    with pytest.raises(ConfigError, match="31 picks are too many; take kcenter or typiclust"):
        acquisition("probcover").pick(pool, 31)
