"""The verdict: what its intervals cover, that nothing is found where nothing is, and its words."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.errors import DataError
from trainer.intervals import Interval, paired_difference
from trainer.metrics._scores import mean_scores
from trainer.verdict import Difference, Judgement, holm, judge, successive


def scores(
    seeds: int, images: int, generator: np.random.Generator, *, gain: float = 0.0
) -> NDArray[np.float64]:
    """Returns an arm's scores: seeds differ by 0.1, images by 1, and each from each by 0.5."""
    hardness = np.random.default_rng(99).normal(2, 1, images)
    luck = generator.normal(0, 0.1, (seeds, 1))
    return gain + hardness + luck + generator.normal(0, 0.5, (seeds, images))


def test_holm_is_the_textbook_s() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_an_interval_is_over_seeds_and_images() -> None:
    by_seed, by_image = np.array([0.0, 0.3, 0.9, 0.4]), np.random.default_rng(0).normal(size=60)
    arm = by_seed[:, None] + by_image
    found = judge({"base": np.zeros_like(arm), "arm": arm}, "base").differences["arm"].interval
    deviation = math.sqrt(by_seed.var() / 4 + by_image.var() / 60)
    assert found.value == pytest.approx(arm.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.05)


def test_of_one_seed_it_is_the_paired_bootstrap() -> None:
    generator = np.random.default_rng(3)
    first, second = scores(1, 80, generator, gain=0.2), scores(1, 80, generator)
    found = judge({"first": first, "second": second}, "second").differences["first"].interval
    known = paired_difference(mean_scores("x", first[0]), mean_scores("x", second[0]), draws=4000)
    assert (found.value, found.low, found.high) == pytest.approx(
        (known["x"].value, known["x"].low, known["x"].high), abs=0.01
    )


def test_a_p_value_is_the_normal_one_where_scores_are_normal() -> None:
    draw = np.random.default_rng(4).normal(size=400)
    draw = (draw - draw.mean()) / draw.std()
    for z in (0.5, 1.5, 2.5):
        arm = (draw + z / 20)[None]  # the mean is z standard errors above 0
        found = judge({"base": np.zeros((1, 400)), "arm": arm}, "base").differences["arm"]
        assert found.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.015)


def test_the_same_arm_twice_is_no_difference() -> None:
    arm = scores(3, 50, np.random.default_rng(0))
    found = judge({"base": arm, "same": arm}, "base").differences["same"]
    assert found.interval == Interval(0.0, 0.0, 0.0)
    assert found.p_value == 1.0 and not found.better and not found.worse


def test_arms_that_differ_by_luck_are_seldom_told_apart() -> None:
    generator = np.random.default_rng(1)
    lucky = 0
    for _ in range(100):
        arms = {name: scores(3, 60, generator) for name in ("base", "one", "two")}
        found = judge(arms, "base").differences.values()
        lucky += any(difference.better or difference.worse for difference in found)
    assert lucky <= 8  # of 100, two tests each


@pytest.mark.parametrize("seeds", [3, 5])
def test_of_an_arm_that_is_trained_twice_the_interval_covers_0(seeds: int) -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(100):
        arms = {name: scores(seeds, 60, generator) for name in ("base", "again")}
        found = judge(arms, "base").differences["again"].interval
        covered += found.low <= 0 <= found.high
    assert covered >= 90


def test_a_planted_effect_is_found() -> None:
    generator = np.random.default_rng(2)
    found = 0
    for _ in range(20):
        arms = {"base": scores(3, 60, generator), "none": scores(3, 60, generator)}
        arms["planted"] = scores(3, 60, generator, gain=0.5)
        judgement = judge(arms, "base")
        found += judgement.verdict("base").startswith("Keep planted: it scores ")
        assert not judgement.differences["none"].worse
    assert found >= 18


def test_what_is_no_number_is_not_judged() -> None:
    with pytest.raises(DataError, match="'odd': a score is not a number"):
        judge({"base": np.zeros((1, 4)), "odd": np.full((1, 4), np.nan)}, "base")


def judgement(seeds: int = 3, **differences: tuple[float, float, float, float]) -> Judgement:
    return Judgement(
        baseline="frozen",
        seeds=seeds,
        scores={name: Interval(1 + found[0], 0, 2) for name, found in differences.items()},
        differences={
            name: Difference(Interval(*found[:3]), found[3]) for name, found in differences.items()
        },
    )


def test_the_best_of_those_that_beat_the_baseline_is_kept() -> None:
    wide = (0.5, -0.1, 1.1, 0.1)
    found = judgement(wide=wide, good=(0.1, 0.02, 0.2, 0.01), best=(0.2, 0.1, 0.3, 0.0002))
    assert found.verdict("the frozen encoder") == (
        "Keep best: it scores 1.200, +0.200 [+0.100, +0.300] over the frozen encoder "
        "(p < 0.001, 3 seeds)."
    )


def test_an_interval_above_0_is_not_enough_where_many_were_tried() -> None:
    found = judgement(lucky=(0.1, 0.01, 0.19, 0.09), other=(-0.1, -0.3, 0.1, 0.4))
    assert found.verdict("the frozen encoder") == (
        "Keep the frozen encoder: no other arm beat it "
        "(best: lucky, +0.100 [+0.010, +0.190], 3 seeds)."
    )


def test_where_all_are_worse_it_says_so() -> None:
    found = judgement(1, bad=(-0.5, -0.6, -0.4, 0.001), less=(-0.2, -0.3, -0.1, 0.001))
    assert found.verdict("frozen") == (
        "Keep frozen: every other arm is worse "
        "(the least: less, -0.200 [-0.300, -0.100], one seed)."
    )


def test_successive_steps_are_compared_with_the_one_before() -> None:
    generator = np.random.default_rng(8)
    base = scores(1, 200, generator)
    steps = {"a": base, "b": base + 0.5, "c": base + 0.5, "d": base + 0.2}
    found = successive(steps)
    assert list(found) == ["b", "c", "d"]
    assert [round(one.interval.value, 6) for one in found.values()] == [0.5, 0.0, -0.3]
    assert found["b"].better and found["d"].worse
    assert not found["c"].better and not found["c"].worse
    assert successive({"a": base}) == {} == successive({})


def test_successive_steps_are_corrected_for_their_number() -> None:
    noise = np.random.default_rng(9).normal(size=(1, 100))
    noise = (noise - noise.mean()) / noise.std()
    start = np.zeros((1, 100))
    lone = successive({"a": start, "b": start + noise + 0.23})["b"]
    steps = {"a": start, "b": start + noise + 0.23, **{f"c{n}": start + n for n in range(4)}}
    one_of_many = successive({**steps, "c0": start + noise + 0.23, "c1": start + noise + 0.23})["b"]
    assert lone.better
    assert one_of_many.interval == lone.interval and one_of_many.p_value > lone.p_value
    assert not one_of_many.better
