"""The advisor's sentences: a promise only where there is one, and what is missing elsewhere."""

import math
import re

import numpy as np
import pytest
from test_learning_curve import measured, power

from trainer.errors import DataError
from trainer.label_budget import Advice, advice
from trainer.learning_curve import Measurement

NUMBER = r"[+-]\d+\.\d{3}"


def advised(truth, **changes) -> Advice:
    keys = {name: changes.pop(name) for name in ("more", "worthwhile") if name in changes}
    return advice(measured(truth, np.random.default_rng(5), **changes), **keys)


def test_a_clear_curve_is_promised_with_its_interval() -> None:
    found = advised(power, images=1000, runs=3, luck=0.005, worthwhile=0.05)
    assert re.fullmatch(
        rf"30 more labels: about {NUMBER} \({NUMBER} to {NUMBER}\) CIDEr-D", found.sentence
    )
    assert 0 < found.gain.low < found.gain.value < found.gain.high
    assert found.enough is not None and found.enough > 30
    assert found.notes == (
        f"{found.enough} more labels are the fewest that are sure to bring +0.050 CIDEr-D.",
    )
    assert f"{found.gain.value:+.3f}" in found.sentence


def test_what_ten_times_the_labels_would_not_bring_is_told() -> None:
    found = advised(power, images=1000, runs=3, luck=0.005, worthwhile=2.0)
    assert found.enough is None
    assert found.notes == ("Not even 1,000 labels in all are sure to bring +2.000 CIDEr-D.",)


def slow(count: float) -> float:
    return 0.4 + 0.03 * math.log(count)


def test_few_test_images_promise_nothing() -> None:
    found = advised(slow, images=23, luck=0.0)
    assert re.fullmatch(
        rf"Too few test images \(23\) to tell what 30 more labels bring: the gain is between "
        rf"{NUMBER} and {NUMBER} CIDEr-D",
        found.sentence,
    )
    assert found.gain.low < 0 < found.gain.high
    assert found.notes[1].startswith("One run at each label count: how far another would fall (0.")


def test_the_number_of_images_that_would_do_is_round() -> None:
    found = advised(slow, images=40, luck=0.0, runs=20, counts=(50, 100), worthwhile=0.01)
    images = re.match(r"About ([\d,]+) test images would show a gain of \+0.010", found.notes[0])
    assert images is not None
    number = int(images[1].replace(",", ""))
    assert number > 40 and number % 10 ** max(0, int(math.log10(number)) - 1) == 0
    assert found.notes[1].startswith("Two label counts tell nothing of the curve's shape")
    assert len(found.notes) == 2


def test_a_gain_that_would_have_shown_is_likely_less() -> None:
    found = advised(slow, images=40, luck=0.0, runs=20, counts=(50, 100))
    assert found.gain.low < 0 and found.gain.value < 0.02 < found.gain.high
    assert found.notes[0].startswith("A gain of +0.020 CIDEr-D would have shown")


def test_runs_that_differ_are_named_where_they_are_the_reason() -> None:
    found = advised(slow, images=500, runs=2, luck=0.1)
    assert found.sentence.startswith("Too few runs to tell what 30 more labels bring: the gain is")
    assert found.notes[0].endswith("train several seeds at each label count.")


def test_a_flat_curve_is_no_promise() -> None:
    found = advised(lambda count: 0.6, images=1000, runs=4, luck=0.002, worthwhile=0.03)
    assert re.fullmatch(
        rf"30 more labels: hardly anything, at most {NUMBER} CIDEr-D", found.sentence
    )
    assert found.gain.low < 0 < found.gain.high < 0.03
    assert found.enough is None


def test_flat_curves_are_seldom_promised_anything() -> None:
    generator = np.random.default_rng(7)
    promised = sum(
        advice(measured(lambda count: 0.6, generator, images=80)).gain.low > 0 for _ in range(40)
    )
    assert promised <= 3


def test_a_falling_curve_says_so() -> None:
    found = advised(lambda count: 0.2 + 10 / count, images=500, runs=3, luck=0.005)
    assert re.fullmatch(
        rf"More labels made it worse: {NUMBER} \({NUMBER} to {NUMBER}\) CIDEr-D from 25 to 100 "
        "labels",
        found.sentence,
    )
    assert found.gain.high < 0.02 and found.enough is None
    assert found.notes[0].startswith("Look at the labels")


def test_more_labels_gain_more() -> None:
    rows = measured(power, np.random.default_rng(5), images=1000, runs=3, luck=0.005)
    gains = [advice(rows, more=more).gain.value for more in (10, 30, 100)]
    assert gains[0] < gains[1] < gains[2]


def test_faults_are_told() -> None:
    rows = [Measurement(count, np.arange(9.0)) for count in (50, 100)]
    with pytest.raises(DataError, match=r"0 more labels for a gain of 0.02: both must be above 0"):
        advice(rows, more=0)
    with pytest.raises(DataError, match="both must be above 0"):
        advice(rows, worthwhile=0)
    with pytest.raises(DataError, match="a learning curve needs two label counts"):
        advice(rows[:1])
