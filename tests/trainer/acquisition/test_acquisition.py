"""What every method of picking owes: a new file in trainer/acquisition/ is tested by this."""

import math

import numpy as np
import pytest
from pools import FakeSpeaker, acquisition, make_pool, some_features

from trainer import variants
from trainer.errors import ConfigError, DataError

METHODS = variants.names("acquisition")
LABELLED = [3, 10, 11]
GROUPS = [min(row, row // 20 * 20 + 14) if row % 20 > 14 else row for row in range(60)]


@pytest.fixture(params=METHODS)
def name(request) -> str:
    return request.param


def pool(*, seed: int = 0, **keys):
    """60 images; of every 20 the last 6 are near-duplicates, and two of those are labelled."""
    labelled = [*LABELLED, 39]
    features = some_features(60)
    return make_pool(
        features, labelled=labelled, groups=GROUPS, seed=seed, speaker=FakeSpeaker(), **keys
    )


def test_nothing_labelled_and_no_near_duplicates(name: str) -> None:
    picks = acquisition(name).pick(pool(), 41)  # all there are: 45 groups, 4 of them labelled
    groups = [GROUPS[pick.row] for pick in picks]
    assert len(set(groups)) == len(picks) == 41
    assert not set(groups) & {GROUPS[row] for row in (*LABELLED, 39)}


def test_the_same_picks_each_time(name: str) -> None:
    first, second = (acquisition(name).pick(pool(), 12) for _ in range(2))
    assert first == second


def test_every_pick_is_explained(name: str) -> None:
    for pick in acquisition(name).pick(pool(), 12):
        assert pick.method in METHODS
        assert pick.cluster == pool().clusters.labels[list(pool().rows).index(pick.row)]
        assert math.isfinite(pick.score) and pick.score >= 0
        alone = pool().clusters.sizes[pick.cluster] == 1
        assert pick.typicality == 0 if alone else pick.typicality > 0
        assert len(pick.reason.split()) >= 3


def test_an_image_that_resembles_nothing_may_be_alone(name: str) -> None:
    single = make_pool(some_features(1), speaker=FakeSpeaker(), budget=1)
    (pick,) = acquisition(name).pick(single, 1)
    assert (pick.row, pick.cluster, pick.typicality) == (0, 0, 0)


def test_images_with_the_same_features_are_picked_all_the_same(name: str) -> None:
    same = np.repeat(some_features(1), 9, axis=0)
    picks = acquisition(name).pick(make_pool(same, speaker=FakeSpeaker()), 9)
    assert sorted(pick.row for pick in picks) == list(range(9))


def test_too_few_images_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="42 images to pick, but 41 are left; take 41 or fewer"):
        acquisition(name).pick(pool(), 42)
    everything = make_pool(some_features(5), labelled=range(5))
    with pytest.raises(DataError, match="every image is labelled"):
        acquisition(name).pick(everything, 1)


ASKING = [name for name in METHODS if variants.load("acquisition", name).Acquisition.asks]


@pytest.mark.parametrize("name", ASKING)
def test_methods_that_ask_a_captioner_say_that_there_is_none(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} asks a captioner, and there is none: set model"):
        acquisition(name).pick(make_pool(some_features(9)), 2)


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(ASKING)))
def test_the_others_need_none(name: str) -> None:
    assert len(acquisition(name).pick(make_pool(some_features(9)), 4)) == 4


def test_a_pool_without_images_is_refused() -> None:
    with pytest.raises(DataError, match="no images"):
        make_pool(np.zeros((0, 4), np.float32))
