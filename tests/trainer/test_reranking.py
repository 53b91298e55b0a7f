"""Captions sorted anew, by a matcher that follows a script."""

from collections.abc import Sequence

import pytest

from exports.manifest import Reranking
from trainer.decoding import Hypothesis
from trainer.reranking import EVIDENCE, WEIGHTS, Judged, reranked, tuned

WORDS = ["a", "red", "cat", "on", "the", "mat", "blue", "dog", "in", "tree"]
REFERENCES = [["a red cat on the mat"], ["a blue dog in the tree"], ["the cat in the tree"]]


def decode(token_ids: Sequence[int]) -> str:
    return " ".join(WORDS[i] for i in token_ids)


def encode(text: str) -> tuple[int, ...]:
    return tuple(WORDS.index(word) for word in text.split())


def lists_of(*, right_match: float, wrong_match: float) -> list[list[Judged]]:
    """The search prefers what the image before says; the matcher may know better."""
    lists = []
    for at, [right] in enumerate(REFERENCES):
        [wrong] = REFERENCES[at - 1]
        lists.append(
            [
                Judged(Hypothesis(encode(wrong), -0.5, -3.0), wrong_match, wrong_match - 0.5),
                Judged(Hypothesis(encode(right), -1.0, -6.0), right_match, right_match - 0.5),
            ]
        )
    return lists


def texts(found: Sequence[Hypothesis]) -> list[str]:
    return [decode(one.token_ids) for one in found]


@pytest.mark.parametrize("evidence", EVIDENCE)
def test_an_oracle_s_best_comes_out_and_with_all_the_weight_the_search_s(evidence: str) -> None:
    lists = lists_of(right_match=0.9, wrong_match=0.1)
    right = [right for [right] in REFERENCES]
    even = Reranking(temperature=0.1)
    assert texts(reranked(lists, even, evidence)) == right
    search = even.model_copy(update={f"{evidence}_weight": 1.0})
    assert texts(reranked(lists, search, evidence)) == [*right[-1:], *right[:-1]]


def test_ranks_are_sums_of_log_probabilities() -> None:
    reranking = Reranking(temperature=0.2, itm_weight=0.25, clip_weight=0.75)
    assert reranking.rank("itm", -2.0, 0.5, 0.0) == pytest.approx(0.25 * -2 + 0.75 * -0.6931472)
    assert reranking.rank("clip", -2.0, 0.5, 0.3) == pytest.approx(0.75 * -2 + 0.25 * 1.5)
    assert reranking.rank("itm", 0.0, 0.0, 0.0) == pytest.approx(0.75 * -20.7232658)


def test_weights_are_those_with_the_highest_figure_nearest_to_what_they_were() -> None:
    usual = Reranking(temperature=0.1)
    # 0.9 of -0.5 weighs 0.45 against log 9: the search must weigh less to lose ...
    good = tuned(usual, lists_of(right_match=0.9, wrong_match=0.1), REFERENCES, decode)
    assert good == usual  # ... and at 0.5 it does already
    faint = tuned(usual, lists_of(right_match=0.5, wrong_match=0.45), REFERENCES, decode)
    assert faint.itm_weight == 0.1  # 0.25 * 0.5 > 0.75 * log(0.5 / 0.45)
    misled = tuned(
        usual,
        [own[::-1] for own in lists_of(right_match=0.1, wrong_match=0.9)],
        REFERENCES,
        decode,
    )
    assert misled.itm_weight == misled.clip_weight == 0.5  # all weights choose alike
    assert {faint.itm_weight, faint.clip_weight} <= set(WEIGHTS)
