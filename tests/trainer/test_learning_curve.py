"""Learning curves: planted gains lie in the interval, and nothing is promised where nothing is."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from trainer import learning_curve
from trainer.errors import DataError
from trainer.learning_curve import LearningCurve, Measurement, fit

Truth = Callable[[float], float]
COUNTS = (25, 50, 75, 100)


def measured(
    truth: Truth,
    generator: np.random.Generator,
    *,
    counts: tuple[int, ...] = COUNTS,
    images: int = 100,
    runs: int = 1,
    luck: float = 0.03,
) -> list[Measurement]:
    """Images differ by 0.5, each caption by 0.4 from what is to be expected, runs by `luck`."""
    hardness = generator.normal(0, 0.5, images)
    return [
        Measurement(
            count,
            truth(count)
            + hardness
            + generator.normal(0, luck, (runs, 1))
            + generator.normal(0, 0.4, (runs, images)),
        )
        for count in counts
    ]


def power(count: float) -> float:
    return 1 - 3 * count**-0.5


PLANTED: dict[str, tuple[Truth, dict[str, object]]] = {
    "power law": (power, {}),
    "power law, two counts": (power, {"counts": (50, 100), "images": 300}),
    "power law, three runs": (power, {"runs": 3, "images": 300, "counts": (25, 50, 100)}),
    "logarithm": (lambda count: 0.1 * math.log(count), {"images": 200}),
    "fast": (lambda count: 0.7 - 10 / count, {"counts": (25, 50, 100), "luck": 0.02}),
    "exponential, of another family": (lambda count: 0.8 - 0.6 * math.exp(-count / 40), {}),
    "flat, few images": (lambda count: 0.6, {"images": 25}),
    "falling": (lambda count: 0.3 + 3 / count, {"runs": 2}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_gain_lies_in_the_interval(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_curve, "_DRAWS", 1000)  # enough for its ends, and quick
    truth, changes = PLANTED[name]
    generator = np.random.default_rng(6)
    gain, hits = truth(130) - truth(100), 0
    for _ in range(100):
        found = fit(measured(truth, generator, **changes)).gain(30)  # type: ignore[arg-type]
        hits += found.low <= gain <= found.high
    assert hits >= 85


def test_the_interval_is_no_wider_than_it_must_be() -> None:
    """Without luck and with many images, four points on a curve tell what comes next."""
    found = fit(measured(power, np.random.default_rng(0), images=2000, runs=8, luck=0.002))
    gain = found.gain(30)
    assert gain.low > 0.02
    assert gain.high - gain.low < 0.03
    assert found.at(130).value == pytest.approx(power(130), abs=0.02)
    assert found.run_deviation < 0.01


def test_a_curve_of_known_shape_is_found_again() -> None:
    scores = np.linspace(-0.001, 0.001, 50)
    exact = [Measurement(count, power(count) + scores) for count in (10, 20, 40, 80, 160)]
    found = fit(exact)
    assert np.median(found.exponents) == pytest.approx(0.5, abs=0.3)
    assert found.at(40).value == pytest.approx(power(40), abs=0.02)
    assert found.gain(160).value == pytest.approx(power(320) - power(160), abs=0.02)
    assert [one.value for one in found.measured] == pytest.approx([power(c) for c in found.counts])


def test_at_its_ends_a_share_is_nothing_and_all() -> None:
    exponents = np.array([0.0, 0.5, 2.0])
    share = learning_curve._share
    assert share(25, exponents, (25, 100)) == pytest.approx(np.zeros(3))
    assert share(100, exponents, (25, 100)) == pytest.approx(np.ones(3))
    by_hand = [(50**-c - 25**-c) / (100**-c - 25**-c) for c in (0.5, 2.0)]
    assert share(50, exponents, (25, 100)) == pytest.approx([0.5, *by_hand])


def test_the_fit_is_generalised_least_squares() -> None:
    """Given c and the deviation of runs, beside the textbook's normal equations."""
    counts, repeats = (25, 50, 100), np.array([1, 2, 3])
    means = np.array([0.2, 0.5, 0.4])
    covariance = np.array([[0.04, 0.01, 0.0], [0.01, 0.02, 0.005], [0.0, 0.005, 0.01]])
    weights, maps = learning_curve._posterior(
        counts, means, covariance, repeats, (0.02, 0.003), 0.1
    )
    assert weights.sum() == pytest.approx(1)
    logs = []
    for place in (700, 701, 1300):
        row, column = divmod(place, weights.shape[1])
        c = learning_curve._EXPONENTS[row]
        relative = learning_curve._DEVIATIONS[column]
        sigma = 0.1 * relative
        total = covariance + np.diag(sigma**2 / repeats)
        start, end = (count**-c for count in (25, 100))
        share = np.array([(count**-c - start) / (end - start) for count in counts])
        design = np.stack([1 - share, share], axis=1)
        inverse = np.linalg.inv(total)
        normal = design.T @ inverse @ design
        by_hand = np.linalg.inv(normal) @ design.T @ inverse
        assert maps[place] == pytest.approx(by_hand)
        left = means - design @ by_hand @ means
        density = math.exp(-left @ inverse @ left / 2)
        density /= math.sqrt(np.linalg.det(total) * np.linalg.det(normal))
        variance = sigma**2 + 0.003
        density *= variance**-1.5 * math.exp(-0.02 / (2 * variance))  # three runs beyond one each
        density *= (1 + relative**2 / 4) ** -2.5 * relative * math.exp(-2 * c)
        logs.append(math.log(density) - math.log(weights.ravel()[place]))
    assert logs == pytest.approx([logs[0]] * 3)


def test_images_are_paired_over_counts() -> None:
    """What is hard about an image is no reason to doubt a gain."""
    generator = np.random.default_rng(1)
    hard = generator.normal(0, 3, 50)
    paired = [Measurement(n, power(n) + hard) for n in COUNTS]
    apart = [Measurement(n, power(n) + generator.permutation(hard)) for n in COUNTS]
    narrow, wide = (fit(one).rise for one in (paired, apart))
    assert narrow.low > 0 > wide.low
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_runs_that_differ_widen_the_interval() -> None:
    scores = np.random.default_rng(2).normal(0, 0.3, 100)
    rows = {luck: np.stack([scores - luck, scores + luck]) for luck in (0.005, 0.2)}
    calm, wild = (
        fit([Measurement(n, power(n) + found) for n in COUNTS]) for found in rows.values()
    )
    assert calm.gain(30).low > 0 > wild.gain(30).low
    assert wild.from_runs > 5 * calm.from_runs
    assert wild.run_deviation == pytest.approx(0.2 * math.sqrt(2), rel=0.35)
    assert wild.runs == (2, 2, 2, 2)


def test_what_few_images_do_to_runs_is_not_taken_for_luck() -> None:
    generator = np.random.default_rng(11)
    found = fit(measured(power, generator, images=40, runs=20, luck=0.0))
    assert found.run_deviation < 0.03  # the runs' means differ by 0.4 / sqrt(40) = 0.063
    found = fit(measured(power, generator, images=40, runs=20, luck=0.2))
    assert found.run_deviation == pytest.approx(0.2, rel=0.25)


def test_few_images_are_doubted_more_than_the_plain_bootstrap_does() -> None:
    scores = np.array([0.1, 0.4, 0.5, 1.0, 1.5])
    found = fit([Measurement(50, scores), Measurement(100, scores + 1)]).measured[0]
    deviation = scores.std(ddof=1) / math.sqrt(5)
    assert found.value == pytest.approx(0.7)
    assert found.high - found.low > 2 * 2.3 * deviation  # t of 4 degrees: 2.78; normal: 1.96


def test_enough_is_the_smallest_number_that_gains_so_much() -> None:
    curve = known(first=0.0, last=1.0, exponent=0.5)
    worth = 0.1
    brute = next(n for n in range(1, 1000) if curve.gain(n).low > worth)
    assert curve.enough(worth) == brute > 1
    assert curve.enough(curve.gain(900).low) is None
    assert curve.enough(curve.gain(900).low - 1e-9) == 900
    assert known(first=1.0, last=0.0, exponent=0.5).enough(0.01) is None


def test_images_needed_makes_the_worthwhile_gain_visible() -> None:
    curve = known(first=0.0, last=1.0, exponent=1e-9, from_images=0.4, from_runs=0.0)
    share = math.log(200 / 25) / math.log(100 / 25) - 1
    needed = curve.images_needed(100, 0.1)
    assert needed == math.ceil(50 * (1.96 * 0.4 * share / 0.1) ** 2)
    assert known(from_images=0.4, from_runs=0.5).images_needed(100, 0.1) is None


def known(
    *,
    first: float = 0.0,
    last: float = 1.0,
    exponent: float = 0.5,
    from_images: float = 0.1,
    from_runs: float = 0.1,
) -> LearningCurve:
    draws = np.ones(10)
    return LearningCurve(
        counts=(25, 100),
        runs=(1, 1),
        images=50,
        measured=(),
        first=first * draws,
        last=last * draws,
        exponents=exponent * draws,
        run_deviation=0.1,
        from_images=from_images,
        from_runs=from_runs,
    )


@pytest.mark.parametrize(
    ("measurements", "message"),
    [
        ([], "nothing was measured, and a learning curve needs two label counts"),
        ([(100, 5)], "only 100 labels were measured, and a learning curve needs two"),
        ([(50, 5), (100, 5), (50, 5)], "50 labels are measured twice: give both as the rows"),
        ([(50, 5), (100, 6)], r"unequal numbers of test images \(5 at 50 labels, 6 at 100"),
        ([(50, 1), (100, 1)], "one test image tells nothing"),
        ([(0, 5), (100, 5)], "a measurement after 0 labels"),
    ],
)
def test_what_tells_nothing_is_refused(measurements: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit([Measurement(labels, np.ones(images)) for labels, images in measurements])


def test_a_score_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(DataError, match="at 100 labels a score is not a number"):
        fit([Measurement(50, np.ones(3)), Measurement(100, np.array([1, np.nan, 1]))])


def test_equal_scores_at_all_counts_are_no_gain() -> None:
    found = fit([Measurement(count, np.zeros(20)) for count in COUNTS])
    assert abs(found.gain(30).low) < 1e-4 and abs(found.gain(30).high) < 1e-4


def test_it_is_the_same_twice() -> None:
    rows = measured(power, np.random.default_rng(3))
    assert fit(rows).gain(30) == fit(rows).gain(30)
    assert fit(rows[::-1]).gain(30) == fit(rows).gain(30)
