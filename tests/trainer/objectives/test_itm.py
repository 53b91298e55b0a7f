"""Image-text matching: its values, and negatives that are hard and never right."""

import math

import pytest
import torch
from pairs import batch_of, make_dataset, make_matcher, objective_of, some_captions

from trainer.errors import ConfigError
from trainer.objectives._matching import hard_negatives

CONSTANT = 0.636514  # the entropy of one right pair in three


def with_head(bias: tuple[float, float]):
    captioner = make_matcher()
    with torch.no_grad():
        captioner.matcher.itm_head.weight.zero_()
        captioner.matcher.itm_head.bias.copy_(torch.tensor(bias))
    return captioner


def test_a_classifier_that_says_nothing_costs_the_log_of_two() -> None:
    dataset = make_dataset(some_captions(6))
    figures = objective_of({"name": "itm"}, dataset, with_head((0.0, 0.0)))(batch_of(dataset))
    assert figures["loss"].item() == pytest.approx(0.693147, abs=1e-6)
    assert figures["itm_gain"].item() == pytest.approx(CONSTANT - 0.693147, abs=1e-5)


def test_the_best_constant_answer_gains_nothing() -> None:
    dataset = make_dataset(some_captions(6))
    objective = objective_of({"name": "itm"}, dataset, with_head((math.log(2), 0.0)))
    figures = objective(batch_of(dataset))
    assert figures["loss"].item() == pytest.approx(CONSTANT, abs=1e-5)
    assert figures["itm_gain"].item() == pytest.approx(0, abs=1e-5)
    assert figures["itm_accuracy"].item() == pytest.approx(2 / 3)


def test_a_pair_s_own_is_never_drawn() -> None:
    torch.manual_seed(0)
    similarity = torch.eye(4) * 20 + torch.randn(4, 4)  # each is by far the nearest to itself
    for _ in range(2500):  # rows, 10^4 draws
        drawn, found = hard_negatives(similarity, torch.eye(4, dtype=torch.bool))
        assert found.all()
        assert (drawn != torch.arange(4)).all()


@pytest.mark.parametrize("easy", [0.0, 0.5])
def test_negatives_are_drawn_in_proportion_to_their_weights(easy: float) -> None:
    torch.manual_seed(0)
    similarity = torch.tensor([[9.0, 1.0, 0.2, -0.5, -30.0]])
    right = torch.tensor([[True, False, False, False, False]])
    rows = (part.expand(20_000, -1) for part in (similarity, right))
    drawn, _ = hard_negatives(*rows, easy=easy)
    counts = torch.bincount(drawn, minlength=5)
    weights = similarity[0].softmax(0)[1:] + 1e-4
    expected = 20_000 * ((1 - easy) * weights / weights.sum() + easy / 4)
    assert counts[0] == 0
    chi_square = ((counts[1:] - expected) ** 2 / expected).sum().item()
    assert chi_square < 16.27  # 3 degrees, p = 0.001


def test_rows_without_a_wrong_column_are_left_out() -> None:
    right = torch.tensor([[True, True], [False, True]])
    drawn, found = hard_negatives(torch.zeros(2, 2), right)
    assert found.tolist() == [False, True]
    assert drawn[1] == 0


@pytest.mark.parametrize("each", [1, 3])
def test_the_loss_is_that_of_its_pairs_read_one_by_one(each: int) -> None:
    captioner = make_matcher()
    dataset = make_dataset(some_captions(2, each), each=each)
    batch = batch_of(dataset)
    torch.manual_seed(4)
    with torch.no_grad():
        found = objective_of({"name": "itm"}, dataset, captioner)(batch)
        # With two images, a caption's other image is known, and an image's other texts are drawn
        # from those of the other image.
        images = captioner.matcher.embed_images(captioner.encoder(batch["images"])[1])
        texts = captioner.matcher.embed_captions(
            captioner.decoder, batch["token_ids"], batch["lengths"]
        )
        similarity = images @ texts.T / 0.07
        right = torch.eye(2, dtype=torch.bool).repeat_interleave(each, dim=1)
        torch.manual_seed(4)
        others, _ = hard_negatives(similarity.T, right.T)
        rows = [part.repeat_interleave(each, dim=0) for part in (similarity, right)]
        drawn, _ = hard_negatives(*rows)
        pairs = []
        for row in range(2 * each):
            own = row // each
            assert others[row] == 1 - own
            assert drawn[row] // each == 1 - own
            pairs += [(own, row, 1), (1 - own, row, 0), (own, int(drawn[row]), 0)]
        losses, hits = [], []
        for image, text, label in pairs:
            memory = captioner.memory(batch["images"][image : image + 1])
            ids, lengths = batch["token_ids"][text : text + 1], batch["lengths"][text : text + 1]
            logits = captioner.matcher.match_logits(captioner.decoder, ids, lengths, memory)[0]
            losses.append(-logits.log_softmax(0)[label].item())
            hits.append(float(logits.argmax() == label))
    assert found["loss"].item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert found["itm_accuracy"].item() == pytest.approx(sum(hits) / len(hits))


def test_captions_that_read_the_same_are_no_negatives() -> None:
    always = with_head((0.0, math.log(3)))  # a match with probability 3/4
    same = make_dataset([("def",), ("def",), ("def",)])
    figures = objective_of({"name": "itm"}, same, always)(batch_of(same))
    assert figures["itm_accuracy"].item() == 1  # three right pairs and nothing else
    assert figures["loss"].item() == pytest.approx(-math.log(0.75), abs=1e-5)
    two = make_dataset([("def",), ("def",), ("mno",)])
    figures = objective_of({"name": "itm"}, two, always)(batch_of(two))
    expected = (-3 * math.log(0.75) - 6 * math.log(0.25)) / 9
    assert figures["loss"].item() == pytest.approx(expected, abs=1e-5)


def test_a_batch_of_one_image_is_refused() -> None:
    dataset = make_dataset(some_captions(1))
    with pytest.raises(ConfigError, match=r"raise loop\.batch_size"):
        objective_of({"name": "itm"}, dataset)(batch_of(dataset))
