"""Disagreement among captions."""

import pytest
from pools import FakeSpeaker, acquisition, make_pool, some_features

from trainer.acquisition.uncertainty import disagreement
from trainer.metrics.cider import DocumentFrequencies, score

SAID = [
    ["a dog runs on the grass"] * 3,
    ["a red bus on the street", "a blue bus on the street", "a bus parked near a tree"],
    ["two people ride bikes", "one cat sleeps inside", "snow falls over hills"],
]
FREQUENCIES = DocumentFrequencies.of(SAID)


def test_it_goes_from_the_same_to_nothing_in_common() -> None:
    same, some, none = (disagreement(captions, FREQUENCIES) for captions in SAID)
    assert same == pytest.approx(0, abs=1e-9)
    assert 0.3 < some < 0.95
    assert none == 1


def test_it_is_cider_d_in_pairs() -> None:
    first, second = SAID[1][:2]
    both = [
        score([[one]], [other], frequencies=FREQUENCIES).per_image[0, 0]
        for one, other in ((first, second), (second, first), (first, first), (second, second))
    ]
    expected = 1 - (both[0] + both[1]) / 2 / (both[2] * both[3]) ** 0.5
    assert disagreement([first, second], FREQUENCIES) == pytest.approx(expected)


def test_words_that_all_images_have_in_common_are_compared_as_they_are() -> None:
    frequencies = DocumentFrequencies.of([["a dog"], ["a dog"]])
    assert disagreement(["a dog", "a dog"], frequencies) == 0
    assert disagreement(["a dog", "dog a"], frequencies) == 1
    assert disagreement(["", ""], frequencies) == 0


def test_the_captioner_s_doubts_come_first() -> None:
    pool = make_pool(some_features(20), labelled=[1, 3], speaker=FakeSpeaker())
    picks = acquisition("uncertainty").pick(pool, 18)
    assert all(pick.row % 2 for pick in picks[:8])  # of even rows it always says the same
    assert [pick.score for pick in picks[8:]] == [0.0] * 10
    scores = [pick.score for pick in picks]
    assert scores == sorted(scores, reverse=True)
    said = FakeSpeaker()._said(picks[0].row, 5, 20)
    assert picks[0].reason == f'the captioner says both "{said[0]}" and "{said[1]}"'
    assert picks[-1].reason.startswith('the captioner says always "')


def test_only_some_are_asked_about() -> None:
    speaker = FakeSpeaker()
    pool = make_pool(some_features(50), labelled=[5], speaker=speaker)
    acquisition("uncertainty", candidates=12).pick(pool, 3)
    assert len(set(speaker.asked)) == len(speaker.asked) == 12
    assert 5 not in speaker.asked
