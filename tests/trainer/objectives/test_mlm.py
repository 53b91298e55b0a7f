"""Masked language modelling: what is masked, what is learnt from it, and what is not."""

import pytest
import torch
from pairs import batch_of, make_dataset, make_matcher, objective_of, some_captions
from tiny_captioner import TEXT

from trainer.objectives.mlm import draw_masking

SPECIALS = (TEXT.pad_id, TEXT.bos_id, TEXT.eos_id)
ORDINARY = TEXT.vocab_size - len(SPECIALS)


def chi_square(found: list[int], expected: list[float]) -> float:
    return sum((f - e) ** 2 / e for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("ratio", [0.15, 0.5])
def test_masking_has_the_paper_s_statistics(ratio: float) -> None:
    torch.manual_seed(0)
    token_ids = torch.randint(3, TEXT.vocab_size, (4000, 10))
    masking = draw_masking(token_ids, TEXT, ratio)
    changed = masking.token_ids != token_ids
    assert not (changed & ~masking.asked).any()
    assert not (changed & masking.masked).any()
    counts = [
        int(part.sum())
        for part in (~masking.asked, masking.masked, changed)  # disjoint
    ]
    counts.append(token_ids.numel() - sum(counts))  # asked for, and as they were
    moved = 0.1 * (ORDINARY - 1) / ORDINARY  # a random token may be the same one
    shares = [1 - ratio, 0.8 * ratio, moved * ratio, (0.2 - moved) * ratio]
    assert chi_square(counts, [share * token_ids.numel() for share in shares]) < 16.27  # p = 0.001
    drawn = torch.bincount(masking.token_ids[changed], minlength=TEXT.vocab_size)
    assert drawn[: len(SPECIALS)].sum() == 0
    expected = [int(changed.sum()) / ORDINARY] * ORDINARY
    assert chi_square(drawn[len(SPECIALS) :].tolist(), expected) < 68.0  # 36 degrees, p = 0.001


def test_special_tokens_are_never_asked_for() -> None:
    torch.manual_seed(0)
    token_ids = torch.randint(0, 6, (500, 10))  # every second one is special
    masking = draw_masking(token_ids, TEXT, 0.5)
    assert masking.asked.any()
    assert not masking.asked[token_ids < 3].any()
    assert torch.equal(masking.token_ids[token_ids < 3], token_ids[token_ids < 3])


def test_the_loss_is_of_masked_positions_only() -> None:
    dataset = make_dataset(some_captions(4, 2), each=2)
    objective = objective_of({"name": "mlm", "mask_ratio": 0.4}, dataset)
    batch, captioner = batch_of(dataset), objective.captioner
    kept = {}

    def keep(*given, read=captioner.decoder.read, **named):
        kept["hidden"] = read(*given, **named)
        kept["hidden"].retain_grad()
        return kept["hidden"]

    captioner.decoder.read = keep
    torch.manual_seed(3)
    loss = objective(batch)["loss"]
    loss.backward()
    torch.manual_seed(3)
    masking = draw_masking(batch["token_ids"], TEXT, 0.4)
    assert 0 < masking.asked.sum() < masking.asked.numel()
    slopes = kept["hidden"].grad.abs().sum(2)
    assert (slopes[~masking.asked] == 0).all()
    assert (slopes[masking.asked] > 0).all()
    terms = [
        -captioner.decoder.head(kept["hidden"][row, place])
        .log_softmax(0)[batch["token_ids"][row, place]]
        .item()
        for row, place in masking.asked.nonzero().tolist()
    ]
    assert loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


def test_hidden_tokens_are_read_as_the_mask_and_the_image_counts() -> None:
    captioner = make_matcher()
    batch = batch_of(make_dataset(some_captions(2)))
    other = batch["token_ids"].clone()
    other[:, 2] = 30
    masked = torch.zeros_like(other, dtype=torch.bool)
    masked[:, 2] = True
    with torch.no_grad():
        memory = captioner.memory(batch["images"])
        first, second = (
            captioner.decoder.read(ids, batch["lengths"], memory, masked=masked)
            for ids in (batch["token_ids"], other)
        )
        assert torch.equal(first, second)
        elsewhere = captioner.memory(batch["images"].flip(0))
        third = captioner.decoder.read(other, batch["lengths"], elsewhere, masked=masked)
    assert (third - first).abs().max() > 1e-4


def test_a_batch_of_which_nothing_is_asked_costs_nothing() -> None:
    dataset = make_dataset([("d",)])
    objective = objective_of({"name": "mlm", "mask_ratio": 0.01}, dataset)
    torch.manual_seed(0)
    figures = objective(batch_of(dataset))
    assert figures["loss"].item() == 0
    figures["loss"].backward()
