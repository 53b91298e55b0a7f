"""Which of several encoders to keep: paired differences, a corrected test, and one sentence.

Every arm is trained once for each of S seeds, and each of its runs is scored on the same n images.
A resample draws seeds and images, both with replacement, so that an interval covers other images
and other seeds alike (Owen 2007, "The pigeonhole bootstrap", https://doi.org/10.1214/07-AOAS122).
All arms are scored on the same draws: what is hard about an image cancels out. Of one seed, how far
another would fall is unknown, and the intervals are of images alone.

The two-sided p value of a difference is twice the smaller share of resamples on one side of 0: the
level at which the percentile interval begins to touch it (Efron and Tibshirani 1993, "An
Introduction to the Bootstrap"). One is added to both counts, so that it is never 0 (Davison and
Hinkley 1997, "Bootstrap Methods and their Application"). Holm 1979,
https://www.jstor.org/stable/4615733, corrects the p values for the number of arms.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError
from trainer.intervals import Interval, resamples

LEVEL = 0.95
_DRAWS = 10_000


@dataclass(frozen=True, slots=True)
class Difference:
    """An arm minus the baseline.

    Attributes:
        interval: The difference, with its own 95 % interval.
        p_value: Two-sided, after Holm's correction over all arms.
    """

    interval: Interval
    p_value: float

    @property
    def better(self) -> bool:
        """Whether the arm beats the baseline, however many arms were tried."""
        return self.interval.low > 0 and self.p_value < 1 - LEVEL

    @property
    def worse(self) -> bool:
        """Whether the baseline beats the arm, however many arms were tried."""
        return self.interval.high < 0 and self.p_value < 1 - LEVEL

    def __str__(self) -> str:
        """Returns, for instance, "+0.061 [+0.034, +0.089]"."""
        shown = self.interval
        return f"{shown.value:+.3f} [{shown.low:+.3f}, {shown.high:+.3f}]"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the scores say of the arms.

    Attributes:
        baseline: The arm that the others are compared with.
        seeds: How many runs of each arm were scored.
        scores: Of each arm the mean over seeds and images.
        differences: Of each arm but the baseline.
    """

    baseline: str
    seeds: int
    scores: dict[str, Interval]
    differences: dict[str, Difference]

    def verdict(self, subject: str) -> str:
        """Returns one sentence; `subject` is what it calls the baseline."""
        best = max(self.differences, key=lambda name: self.differences[name].interval.value)
        seeds = f"{self.seeds} seeds" if self.seeds > 1 else "one seed"
        winners = [name for name, found in self.differences.items() if found.better]
        if winners:
            best = max(winners, key=lambda name: self.differences[name].interval.value)
            found = self.differences[best]
            return (
                f"Keep {best}: it scores {self.scores[best].value:.3f}, {found} over {subject} "
                f"(p {p_words(found.p_value)}, {seeds})."
            )
        if all(found.worse for found in self.differences.values()):
            return (
                f"Keep {subject}: every other arm is worse "
                f"(the least: {best}, {self.differences[best]}, {seeds})."
            )
        found = self.differences[best]
        return f"Keep {subject}: no other arm beat it (best: {best}, {found}, {seeds})."


def p_words(p_value: float) -> str:
    """Returns, for instance, "= 0.023" or "< 0.001"."""
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"


def judge(values: Mapping[str, NDArray[np.float64]], baseline: str) -> Judgement:
    """Compares every arm with one of them.

    Args:
        values: Of each arm the images' scores (S, n); seeds and images in one order for all.
        baseline: Which arm the others are compared with.

    Raises:
        DataError: A score is not a number.
    """
    for name, scores in values.items():
        if not np.isfinite(scores).all():
            raise DataError(f"arm {name!r}: a score is not a number, and nothing can be compared")
    drawn = dict(zip(values, _resample(np.stack(list(values.values()))), strict=True))
    gains = {name: drawn[name] - drawn[baseline] for name in values if name != baseline}
    p_values = holm({name: _p_value(gain) for name, gain in gains.items()})
    means = {name: float(scores.mean()) for name, scores in values.items()}
    return Judgement(
        baseline=baseline,
        seeds=len(values[baseline]),
        scores={name: _interval(means[name], drawn[name]) for name in values},
        differences={
            name: Difference(_interval(means[name] - means[baseline], gain), p_values[name])
            for name, gain in gains.items()
        },
    )


def successive(values: Mapping[str, NDArray[np.float64]]) -> dict[str, Difference]:
    """Returns of every step but the first how it differs from the one before.

    Args:
        values: Of each step the images' scores (S, n), in order; corrected for the number of steps.

    Raises:
        DataError: A score is not a number.
    """
    found = {
        after: judge({before: values[before], after: values[after]}, before).differences[after]
        for before, after in pairwise(values)
    }
    p_values = holm({name: one.p_value for name, one in found.items()})
    return {name: Difference(one.interval, p_values[name]) for name, one in found.items()}


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Returns p values that hold for all tests together: smaller than a level is significant."""
    corrected: dict[str, float] = {}
    floor = 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        floor = max(floor, min(1.0, p_values[name] * (len(p_values) - place)))
        corrected[name] = floor
    return corrected


def _resample(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the means (A, draws) of A arms with scores (A, S, n), all on the same draws."""
    arms, seeds, images = scores.shape
    rows = scores.reshape(-1, images)
    means = [
        ((by_image @ rows.T).reshape(-1, arms, seeds) * by_seed[:, None]).sum(2)
        for by_image, by_seed in zip(
            resamples(images, _DRAWS, 0), resamples(seeds, _DRAWS, 1), strict=True
        )
    ]
    return np.concatenate(means).T / (seeds * images)


def _interval(value: float, drawn: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def _p_value(drawn: NDArray[np.float64]) -> float:
    smaller = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
    return min(1.0, 2 * (1 + smaller) / (1 + len(drawn)))
