"""Figures of matching: their definitions by hand, and their intervals."""

import numpy as np
import pytest
import torch
from pairs import Letters, make_dataset, make_matcher, some_captions

from trainer.intervals import bootstrap
from trainer.retrieval import (
    Pairs,
    Reader,
    auc_scores,
    mean_recall,
    measure,
    rank_scores,
    retrieval_scores,
)


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(make_matcher(), Letters(), batch_size=3)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    captions = some_captions(7, 2)
    captions[3] = (captions[0][1], captions[3][1])  # two images share a caption
    captions[5] = (*captions[5], "def")
    return Pairs(make_dataset(captions).images, captions)


def test_ranks_are_counted_by_hand(reader, pairs) -> None:
    flat = [(row, text) for row, own in enumerate(pairs.captions) for text in own]
    with torch.no_grad():
        images = reader.embed_images(pairs.pixels)
        texts = reader.embed_captions([text for _, text in flat])
    near = (images @ texts.T).numpy()
    text_hits, image_hits = [], []
    for row, own in enumerate(pairs.captions):
        order = sorted(range(len(flat)), key=lambda column: -near[row][column])
        text_hits.append(flat[order[0]][1] in own)
    for column, (_, text) in enumerate(flat):
        order = sorted(range(7), key=lambda row: -near[row][column])
        image_hits.append(text in pairs.captions[order[0]])
    text_side, image_side = retrieval_scores(reader, pairs)
    assert text_side.corpus["TR R@1"] == pytest.approx(np.mean(text_hits))
    assert image_side.corpus["IR R@1"] == pytest.approx(np.mean(image_hits))
    assert image_side.corpus["IR R@10"] == 1  # of 7 images


def test_recall_and_median_of_known_ranks() -> None:
    scores = rank_scores("TR", [np.array(own) for own in ([1, 4], [2, 30], [6], [5000])])
    found = scores.corpus
    assert found == {
        "TR R@1": pytest.approx(1 / 6),
        "TR R@5": pytest.approx(3 / 6),
        "TR R@10": pytest.approx(4 / 6),
        "TR median": 4,
    }
    interval = bootstrap(scores)["TR R@5"]
    assert interval.low < 0.5 < interval.high


@pytest.mark.parametrize("seed", range(3))
def test_the_auc_is_the_share_of_pairs_in_order(seed: int) -> None:
    draw = np.random.default_rng(seed)
    true = [np.round(draw.random(2) + 0.2, 1) for _ in range(6)]
    false = [np.round(draw.random(3), 1) for _ in range(6)]
    pairs = [(a > b) + 0.5 * (a == b) for x in true for a in x for y in false for b in y]
    found = auc_scores("AUC", true, false)
    assert found.corpus["AUC"] == pytest.approx(np.mean(pairs))


def test_the_spread_of_the_auc_is_that_of_new_images() -> None:
    draw = np.random.default_rng(0)

    def scores_of():
        values = draw.normal(size=(60, 2)) + np.array([0.8, 0.0])
        return auc_scores("AUC", list(values[:, :1]), list(values[:, 1:]))

    drawn = np.array([scores_of().corpus["AUC"] for _ in range(300)])
    widths = [bootstrap(scores_of())["AUC"] for _ in range(20)]
    found = np.mean([one.high - one.low for one in widths])
    assert found == pytest.approx(2 * 1.96 * drawn.std(), rel=0.15)


def test_probabilities_do_not_depend_on_who_else_is_asked(reader, pairs) -> None:
    together = reader.probabilities(pairs.pixels, pairs.captions)
    assert [len(row) for row in together] == [len(own) for own in pairs.captions]
    for place, own in enumerate(pairs.captions):
        alone = reader.probabilities(pairs.pixels[place : place + 1], [own[:1]])
        assert alone[0][0] == pytest.approx(together[place][0], abs=1e-5)


def test_figures_without_attributes_have_no_swapped_auc(reader, pairs) -> None:
    names = {name for scores in measure(reader, pairs) for name in scores.names}
    assert "ITM AUC" in names and "ITM AUC swapped" not in names
    coloured = Pairs(pairs.pixels[:2], [["a red d", "a blue e"], ["f"]])
    names = {name for scores in measure(reader, coloured) for name in scores.names}
    assert "ITM AUC swapped" in names


def test_mean_recall_of_known_ranks() -> None:
    text = [np.array([1]), np.array([7]), np.array([30])]
    image = [np.array([1, 2]), np.array([11, 6]), np.array([40])]
    first = (3 / 3 + (0.5 + 1 + 1) / 3) / 2  # of R@1, R@5 and R@10, both ways
    second = (1 / 3 + 0.5 / 3) / 2
    assert mean_recall(text, image) == pytest.approx([first, second, 0])
