"""A learning curve through a few label counts, with all that is not known about it.

The expected score after n labels is taken as f(n) = a - b n^-c, the inverse power law that the
field fits (Figueroa et al., 2012, "Predicting sample size required for classification performance",
https://doi.org/10.1186/1472-6947-12-8; Viering and Loog, 2021, "The Shape of Learning Curves: a
Review", https://arxiv.org/abs/2103.10948), with c from 0, where it is logarithmic, to 2.

Three things are unknown, and intervals are over all of them:

- other test images: images are drawn with replacement, the same for all label counts, so that what
  is hard about an image cancels out (see `trainer.intervals`);
- other runs: another seed or other labels move the mean of a run by a normal deviation;
- the shape c, of which two or three points say little.

Departures from a least-squares fit of a, b and c:

1. Each draw takes c and the deviation of runs by how likely they make the measured means, a and b
   integrated out, and fits a and b to its own means by generalised least squares. A single fitted
   c would often lie at a bound, and its interval would be far too narrow.
2. A priori c falls off as exp(-2 c): small exponents are the rule (Hestness et al., 2017,
   https://arxiv.org/abs/1712.00409). The deviation of runs is a half Student t (4 degrees of
   freedom) with a scale of 5 % of the mean score: one run at each count tells little of it.
3. b may be negative: a curve that falls is told, not flattened.
4. Deviations of bootstrap means are widened as Student's t is beside the normal distribution: of
   few images the plain percentile interval is too narrow (Hesterberg, 2015,
   https://doi.org/10.1080/00031305.2015.1089789).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError
from trainer.intervals import Interval, resamples

Array = NDArray[np.float64]

LEVEL = 0.95
FAR = 10  # times the most labels measured: nothing is said of what lies beyond
RUN_SCALE = 0.05  # of the mean score
_DRAWS = 10_000
_EXPONENTS = np.linspace(0, 2, 41)
_DEVIATIONS = np.geomspace(0.02, 50, 48)  # of runs, in units of the scale


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a captioner trained on so many labels scores.

    Attributes:
        labels: How many images with captions by people it was trained on.
        scores: (n,) of held-out images, or (R, n) of R runs: other seeds, folds or labels. The
            images are the same, in one order, at every label count.
    """

    labels: int
    scores: Array


@dataclass(frozen=True, slots=True)
class LearningCurve:
    """Draws of the curve, each with its own test images, runs and shape.

    Attributes:
        counts: The label counts (K,) that were measured, rising.
        runs: How many runs at each (K,).
        images: How many test images.
        measured: Of each count the mean score; its interval is over test images alone.
        first: (draws,), the curve at the smallest count.
        last: (draws,), the curve at the largest.
        exponents: (draws,), its c.
        run_deviation: By how much another run's mean falls elsewhere, the median draw.
        from_images: Standard deviation of the rise `last - first` that the test images bring.
        from_runs: And that the runs bring.
    """

    counts: tuple[int, ...]
    runs: tuple[int, ...]
    images: int
    measured: tuple[Interval, ...]
    first: Array
    last: Array
    exponents: Array
    run_deviation: float
    from_images: float
    from_runs: float

    def at(self, labels: float) -> Interval:
        """Returns the expected score after so many labels: the median draw, and 95 %."""
        share = _share(labels, self.exponents, self.counts)
        return _interval(self.first + (self.last - self.first) * share)

    def gain(self, more: float) -> Interval:
        """Returns what so many labels beyond the most that were measured would bring."""
        return _interval((self.last - self.first) * self._beyond(more))

    @property
    def rise(self) -> Interval:
        """From the smallest measured count to the largest."""
        return _interval(self.last - self.first)

    def enough(self, worthwhile: float) -> int | None:
        """Returns how many more labels gain more than `worthwhile`, as far as can be told.

        The smallest number whose interval of the gain lies above it; None where ten times the
        labels would not do.
        """
        none, far = 0, (FAR - 1) * self.counts[-1]
        if self.gain(far).low <= worthwhile:
            return None
        while far - none > 1:  # where the low end is above 0 it rises
            middle = (none + far) // 2
            none, far = (none, middle) if self.gain(middle).low > worthwhile else (middle, far)
        return far

    def images_needed(self, more: int, worthwhile: float) -> int | None:
        """Returns how many test images would show a gain of `worthwhile` by `more` labels.

        None where no number would, because the runs differ by more.
        """
        shown = worthwhile / (1.96 * float(self._beyond(more).mean()))
        room = shown**2 - self.from_runs**2
        return math.ceil(self.images * self.from_images**2 / room) if room > 0 else None

    def _beyond(self, more: float) -> Array:
        return _share(self.counts[-1] + more, self.exponents, self.counts) - 1


def fit(measurements: Sequence[Measurement], *, seed: int = 0) -> LearningCurve:
    """Returns the curve through what was measured.

    Raises:
        DataError: Fewer than two label counts, one of them twice, other images at one than at
            another, or a score that is not a number.
    """
    runs = _checked(measurements)
    counts = tuple(sorted(runs))
    scores = np.stack([runs[count].mean(axis=0) for count in counts])  # (K, n)
    repeats = np.array([len(runs[count]) for count in counts])
    images = scores.shape[1]
    means, covariance = scores.mean(axis=1), np.atleast_2d(np.cov(scores)) / images
    scale = max(1e-6, RUN_SCALE * float(np.abs(means).mean()))
    spread = _spread_of_runs(list(runs.values()))
    weights, maps = _posterior(counts, means, covariance, repeats, spread, scale)
    generator = np.random.default_rng(seed)
    cells = generator.choice(weights.size, size=_DRAWS, p=weights.ravel())
    deviations = scale * _DEVIATIONS[cells % len(_DEVIATIONS)]
    drawn = np.concatenate([block @ scores.T / images for block in resamples(images, _DRAWS, seed)])
    by_images = drawn - means
    by_images *= np.sqrt(images / generator.chisquare(images - 1, size=(_DRAWS, 1)))
    by_runs = generator.normal(size=by_images.shape) * deviations[:, None] / np.sqrt(repeats)
    ends, from_images, from_runs = (
        np.einsum("dek,dk->de", maps[cells], part) for part in (means[None], by_images, by_runs)
    )  # each (draws, 2): the curve at the smallest and at the largest count
    first, last = (ends + from_images + from_runs).T
    return LearningCurve(
        counts=counts,
        runs=tuple(repeats.tolist()),
        images=images,
        measured=tuple(
            _interval(means[place] + by_images[:, place], float(means[place]))
            for place in range(len(counts))
        ),
        first=first,
        last=last,
        exponents=_EXPONENTS[cells // len(_DEVIATIONS)],
        run_deviation=float(np.median(deviations)),
        from_images=float(np.diff(from_images).std()),
        from_runs=float(np.diff(from_runs).std()),
    )


def _checked(measurements: Sequence[Measurement]) -> dict[int, Array]:
    """Returns the scores (R, n) by label count."""
    runs: dict[int, Array] = {}
    for one in measurements:
        if one.labels in runs:
            raise DataError(
                f"{one.labels} labels are measured twice: give both as the rows of one measurement"
            )
        if one.labels < 1:
            raise DataError(f"a measurement after {one.labels} labels; a curve begins with 1")
        runs[one.labels] = np.atleast_2d(np.asarray(one.scores, np.float64))
    if len(runs) < 2:
        found = f"only {next(iter(runs))} labels were" if runs else "nothing was"
        raise DataError(
            f"{found} measured, and a learning curve needs two label counts: train and evaluate on "
            "half of the labels too"
        )
    images = {count: scores.shape[1] for count, scores in runs.items()}
    if len(set(images.values())) > 1:
        listed = ", ".join(f"{number} at {count} labels" for count, number in images.items())
        raise DataError(f"unequal numbers of test images ({listed}): score the same images")
    if min(images.values()) < 2:
        raise DataError("one test image tells nothing of another: score several")
    for count, scores in runs.items():
        if not np.isfinite(scores).all():
            raise DataError(f"at {count} labels a score is not a number")
    return runs


def _spread_of_runs(scores: Sequence[Array]) -> tuple[float, float]:
    """Returns how the runs' means differ, and how much of that is chance of few test images.

    Args:
        scores: (R, n) of each label count.

    Returns:
        The sum of squares of the runs' means about those of their counts; and the variance of such
        a mean that comes from how runs differ image by image.
    """
    within = residual = 0.0
    free = 0
    for rows in scores:
        centred = rows - rows.mean(axis=0)
        luck = centred.mean(axis=1, keepdims=True)
        within += float(np.sum(luck**2))
        residual += float(np.sum((centred - luck) ** 2))
        free += (rows.shape[0] - 1) * (rows.shape[1] - 1)
    return within, residual / free / scores[0].shape[1] if free else 0.0


def _posterior(
    counts: Sequence[int],
    means: Array,
    covariance: Array,
    repeats: NDArray[np.int64],
    spread: tuple[float, float],
    scale: float,
) -> tuple[Array, NDArray[np.floating[Any]]]:
    """Returns how likely each exponent and deviation of runs is, and what it makes of means.

    Args:
        counts: (K,).
        means: (K,) that were measured.
        covariance: (K, K) of them, over test images.
        repeats: (K,) runs at each count.
        spread: What `_spread_of_runs` says.
        scale: Of the deviation of runs.

    Returns:
        Probabilities (C, S), and matrices (C * S, 2, K) that map means to the fitted curve at the
        smallest and at the largest count.
    """
    free = int(repeats.sum()) - len(repeats)
    share = _share(np.array(counts, float), _EXPONENTS[:, None], counts)
    design = np.stack([1 - share, share], axis=-1)[:, None]  # (C, 1, K, 2)
    deviation = scale * _DEVIATIONS  # (S,)
    noise = deviation[:, None, None] ** 2 * np.diag(1 / repeats)
    precision = np.linalg.inv(covariance + noise)  # (S, K, K)
    weighted = design.swapaxes(-1, -2) @ precision  # (C, S, 2, K)
    information = weighted @ design
    maps = np.linalg.solve(information, weighted)
    left = means - (design @ (maps @ means)[..., None])[..., 0]  # (C, S, K)
    squares = np.einsum("csj,sjk,csk->cs", left, precision, left)
    logs = np.linalg.slogdet(precision)[1] - np.linalg.slogdet(information)[1] - squares
    within, chance = spread
    variance = deviation**2 + chance
    logs = (logs - free * np.log(variance) - within / variance) / 2
    logs -= 2 * _EXPONENTS[:, None]
    # The prior is a density over deviations, the grid one of their logarithms.
    logs += np.log(_DEVIATIONS) - 2.5 * np.log1p(_DEVIATIONS**2 / 4)
    found: Array = np.exp(logs - logs.max())
    return found / found.sum(), maps.reshape(-1, 2, len(counts))


def _share(labels: float | Array, exponents: float | Array, counts: Sequence[int]) -> Array:
    """Returns the rise of n^-c up to `labels`, 1 being that over all measured counts."""
    power = np.maximum(exponents, 1e-9)  # so near to 0 it is the logarithm
    start, end = counts[0], counts[-1]
    rise: Array = np.expm1(-power * np.log(labels / start)) / np.expm1(-power * np.log(end / start))
    return rise


def _interval(drawn: Array, value: float | None = None) -> Interval:
    low, middle, high = np.quantile(drawn, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2])
    return Interval(float(middle) if value is None else value, float(low), float(high))
