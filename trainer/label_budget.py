"""The label-budget advisor: what more labels would bring, or that it cannot be told."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.errors import DataError
from trainer.intervals import Interval
from trainer.learning_curve import FAR, RUN_SCALE, LearningCurve, Measurement, fit


@dataclass(frozen=True, slots=True)
class Advice:
    """What to expect of more labels.

    Attributes:
        more: How many beyond the most that were measured.
        figure: What the score is called.
        gain: What they would bring.
        worthwhile: The gain that is worth their writing.
        enough: The smallest number of further labels that brings it, as far as can be told; None
            where ten times the labels would not.
        sentence: What to expect of `more`.
        notes: What to expect of other numbers, what would help, what the interval rests on.
    """

    more: int
    figure: str
    gain: Interval
    worthwhile: float
    enough: int | None
    sentence: str
    notes: tuple[str, ...]


def advice(
    measurements: Sequence[Measurement],
    *,
    more: int = 30,
    worthwhile: float = 0.02,
    figure: str = "CIDEr-D",
) -> Advice:
    """Returns what `more` labels would bring.

    Args:
        measurements: At two label counts or more.
        more: Labels beyond the most that were measured.
        worthwhile: The gain that is worth their writing, in units of the figure.
        figure: What the scores are called.

    Raises:
        DataError: As `trainer.learning_curve.fit` does, or `more` or `worthwhile` is not above 0.
    """
    return advice_of(fit(measurements), more=more, worthwhile=worthwhile, figure=figure)


def advice_of(
    curve: LearningCurve, *, more: int = 30, worthwhile: float = 0.02, figure: str = "CIDEr-D"
) -> Advice:
    """Returns the advice that a fitted curve gives; arguments and errors as of `advice`."""
    if more < 1 or worthwhile <= 0:
        raise DataError(f"{more} more labels for a gain of {worthwhile}: both must be above 0")
    gain, rise, enough = curve.gain(more), curve.rise, curve.enough(worthwhile)
    if gain.low > 0:
        sentence = f"{more} more labels: about {gain_words(gain)} {figure}"
        notes = [_enough(curve, enough, worthwhile, figure)]
    elif rise.high < 0:
        sentence = (
            f"More labels made it worse: {gain_words(rise)} {figure} from {curve.counts[0]} to "
            f"{curve.counts[-1]} labels"
        )
        notes = ["Look at the labels and at how long it was trained before you write more."]
    elif gain.high < worthwhile:
        sentence = f"{more} more labels: hardly anything, at most {gain.high:+.3f} {figure}"
        notes = []
    else:
        between = f"the gain is between {gain.low:+.3f} and {gain.high:+.3f} {figure}"
        sentence = f"{_lacking(curve)} to tell what {more} more labels bring: {between}"
        notes = [_what_helps(curve, more, worthwhile, figure)]
    return Advice(more, figure, gain, worthwhile, enough, sentence, (*notes, *_rests_on(curve)))


def gain_words(gain: Interval) -> str:
    """Returns, for instance, "+0.041 (+0.020 to +0.070)"."""
    return f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"


def _enough(curve: LearningCurve, enough: int | None, worthwhile: float, figure: str) -> str:
    if enough is None:
        far = f"{FAR * curve.counts[-1]:,}"
        return f"Not even {far} labels in all are sure to bring {worthwhile:+.3f} {figure}."
    return (
        f"{enough:,} more labels are the fewest that are sure to bring {worthwhile:+.3f} {figure}."
    )


def _lacking(curve: LearningCurve) -> str:
    if curve.from_images < curve.from_runs:
        return "Too few runs"
    return f"Too few test images ({curve.images})"


def _what_helps(curve: LearningCurve, more: int, worthwhile: float, figure: str) -> str:
    needed = curve.images_needed(more, worthwhile)
    if curve.from_images < curve.from_runs:
        return (
            f"Another run moves the score by about {curve.run_deviation:.3f}: train several seeds "
            "at each label count."
        )
    if needed is None:
        return "More test images would help, and several seeds at each label count."
    if needed <= curve.images:
        return f"A gain of {worthwhile:+.3f} {figure} would have shown: it is likely to be less."
    return (
        f"About {_rounded(needed):,} test images would show a gain of {worthwhile:+.3f} {figure}."
    )


def _rounded(number: int) -> int:
    """Returns the number rounded up to two digits."""
    unit = 10 ** max(0, int(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit


def _rests_on(curve: LearningCurve) -> list[str]:
    notes = []
    if max(curve.runs) == 1:
        notes.append(
            "One run at each label count: how far another would fall "
            f"({curve.run_deviation:.3f}) is a guess, from {RUN_SCALE:.0%} of the score and from "
            "how far the points lie off a curve."
        )
    if len(curve.counts) == 2:
        notes.append(
            "Two label counts tell nothing of the curve's shape, and the interval allows for any. "
            "A third would narrow it."
        )
    return notes
