"""K-center against brute force."""

from itertools import combinations

import numpy as np
import pytest
from pools import acquisition, make_pool, some_features

from trainer.acquisition._distances import distances


def radius(apart: np.ndarray, centres: tuple[int, ...]) -> float:
    return float(apart[:, list(centres)].min(1).max())


@pytest.mark.parametrize("labelled", [(), (4,)])
def test_the_radius_is_at_most_twice_the_best(labelled: tuple[int, ...]) -> None:
    """n = 12, k = 3: all 220 choices are tried, for 40 sets of points."""
    equal = 0
    for seed in range(40):
        features = some_features(12, width=3, seed=seed)
        apart = distances(features, features)
        picks = acquisition("kcenter").pick(make_pool(features, labelled=labelled), 3)
        found = radius(apart, (*labelled, *(pick.row for pick in picks)))
        best = min(radius(apart, (*labelled, *some)) for some in combinations(range(12), 3))
        assert best - 1e-5 <= found <= 2 * best + 1e-5
        equal += found < best + 1e-5
    assert equal < 40  # else the bound was no test


def test_it_takes_the_farthest_each_time() -> None:
    line = np.array([[0.0], [1.0], [2.5], [6.0], [10.0]], np.float32)
    picks = acquisition("kcenter").pick(make_pool(line), 4)
    # The mean is 3.9; then 10 away from 2.5 comes 7.5, and so on.
    assert [pick.row for pick in picks] == [2, 4, 3, 0]
    assert [pick.score for pick in picks] == pytest.approx([1.4, 7.5, 3.5, 2.5], abs=1e-3)
    picks = acquisition("kcenter").pick(make_pool(line, labelled=[0]), 2)
    assert [(pick.row, round(pick.score, 3)) for pick in picks] == [(4, 10.0), (3, 4.0)]
    assert picks[0].reason == "the farthest from everything labelled or picked: 10.000"
