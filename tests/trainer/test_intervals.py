"""Bootstrap intervals: what they resample, how often they cover, when a difference is one."""

import random

import numpy as np
import pytest

from trainer.errors import DataError
from trainer.intervals import Interval, bootstrap, paired_difference
from trainer.metrics import bleu, cider, rouge
from trainer.metrics._scores import mean_scores


def _captions(images: int, noise: float, seed: int) -> tuple[list[list[str]], list[str]]:
    """Returns references, and copies of the first with a share of words replaced."""
    fixed, generator = random.Random(99), random.Random(seed)
    vocabulary = [f"w{number}" for number in range(40)]
    references = [[" ".join(fixed.choices(vocabulary, k=9)) for _ in "12"] for _ in range(images)]
    candidates = [
        " ".join(
            generator.choice(vocabulary) if generator.random() < noise else word
            for word in group[0].split()
        )
        for group in references
    ]
    return references, candidates


def test_a_resample_of_bleu_is_the_bleu_of_the_resampled_corpus() -> None:
    references, candidates = _captions(30, 0.3, 1)
    scored = bleu.score(references, candidates)
    drawn = np.random.default_rng(0).integers(30, size=30)
    counts = np.bincount(drawn, minlength=30).astype(float)
    again = bleu.score([references[i] for i in drawn], [candidates[i] for i in drawn])
    resampled = scored.combine(counts @ scored.statistics, 30)
    assert resampled == pytest.approx(list(again.corpus.values()), abs=1e-12)


def test_the_interval_of_a_mean_is_the_textbook_one() -> None:
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    interval = bootstrap(mean_scores("x", values), seed=0, draws=4000)["x"]
    half = 1.96 * values.std() / 20
    assert interval.value == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.01
    )


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        interval = bootstrap(mean_scores("x", generator.exponential(size=80)), seed=trial)["x"]
        covered += interval.low <= 1.0 <= interval.high
    assert 178 <= covered <= 198  # of 200; 190 expected, a few less for a skewed sample


def test_the_same_seed_gives_the_same_interval() -> None:
    scored = bleu.score(*_captions(40, 0.3, 1))
    assert bootstrap(scored, seed=5) == bootstrap(scored, seed=5)
    assert bootstrap(scored, seed=5) != bootstrap(scored, seed=6)


@pytest.mark.parametrize("metric", [bleu, cider, rouge])
def test_a_paired_difference_knows_better_from_equal(metric: object) -> None:
    references, good = _captions(120, 0.2, 1)
    _, bad = _captions(120, 0.5, 2)
    score = metric.score  # type: ignore[attr-defined]
    first, second = score(references, good), score(references, bad)
    for name, interval in paired_difference(first, second).items():
        assert interval.excludes_zero
        assert interval.value == pytest.approx(first.corpus[name] - second.corpus[name])
        assert interval.low < interval.value < interval.high
    for interval in paired_difference(first, first).values():
        assert interval == Interval(0.0, 0.0, 0.0)
        assert not interval.excludes_zero


def test_pairing_removes_what_is_hard_about_an_image() -> None:
    generator = np.random.default_rng(3)
    hardness = generator.normal(0, 5, 100)
    first = mean_scores("x", hardness + 0.5 + generator.normal(0, 0.1, 100))
    second = mean_scores("x", hardness)
    assert paired_difference(first, second)["x"].excludes_zero
    assert bootstrap(first)["x"].low < bootstrap(second)["x"].high


def test_different_corpora_cannot_be_paired() -> None:
    with pytest.raises(DataError, match="x of 3 images with x of 4"):
        paired_difference(mean_scores("x", np.zeros(3)), mean_scores("x", np.zeros(4)))


def test_an_undefined_figure_has_undefined_bounds() -> None:
    interval = bootstrap(mean_scores("x", np.full(5, np.nan)))["x"]
    assert np.isnan([interval.value, interval.low, interval.high]).all()
    assert not interval.excludes_zero


def test_an_interval_prints_with_its_bounds() -> None:
    assert str(Interval(0.5614, 0.534, 0.5888)) == "0.561 [0.534, 0.589]"
