"""Which method is due after how many labels."""

from collections import Counter
from typing import Any

import pytest
from pools import FakeSpeaker, acquisition, make_pool, some_features

from trainer.errors import ConfigError


def methods(labelled: int, count: int, speaker: Any = None, **keys: Any) -> list[tuple[str, int]]:
    pool = make_pool(some_features(150), labelled=range(labelled), speaker=speaker)
    picks = acquisition("schedule", **keys).pick(pool, count)
    assert len({pick.row for pick in picks}) == count
    return list(Counter(pick.method for pick in picks).items())


def test_a_hundred_labels() -> None:
    found = methods(0, 100, FakeSpeaker())
    assert found == [("typiclust", 60), ("kcenter", 20), ("badge", 20)]


def test_it_goes_on_where_the_labels_are() -> None:
    assert methods(55, 10) == [("typiclust", 5), ("kcenter", 5)]
    assert methods(70, 15, FakeSpeaker()) == [("kcenter", 10), ("badge", 5)]
    assert methods(80, 3, FakeSpeaker()) == [("badge", 3)]


def test_without_a_captioner_k_center_goes_on() -> None:
    assert methods(0, 100) == [("typiclust", 60), ("kcenter", 40)]


def test_thresholds_are_keys() -> None:
    keys = {"typical_until": 2, "spread_until": 2, "last": {"name": "uncertainty", "captions": 2}}
    assert methods(0, 6, FakeSpeaker(), **keys) == [("typiclust", 2), ("uncertainty", 4)]
    assert methods(0, 3, FakeSpeaker(), typical_until=0) == [("kcenter", 3)]
    with pytest.raises(ConfigError, match="spread_until = 5 is less than typical_until = 9"):
        acquisition("schedule", typical_until=9, spread_until=5)
    with pytest.raises(ConfigError, match="bagde"):
        acquisition("schedule", last={"name": "bagde"})


def test_a_phase_counts_the_picks_before_it_as_labelled() -> None:
    """K-center's first pick is the farthest from the typical ones."""
    pool = make_pool(some_features(150))
    typical = acquisition("typiclust").pick(pool, 60)
    then = acquisition("kcenter").pick(pool.plus([pick.row for pick in typical]), 5)
    assert acquisition("schedule").pick(pool, 65) == [*typical, *then]
