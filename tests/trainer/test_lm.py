"""The language-modelling objective: its value, its gradients, and that it learns."""

import math

import pytest
import torch
from tiny_captioner import CNN, TEXT

from trainer.objectives._captioning import IGNORE_INDEX, labels_of
from trainer.objectives.lm import Config, Objective


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([6, 8, 5, 8])
    token_ids = torch.randint(3, TEXT.vocab_size, (4, 8), generator=draw)
    token_ids[:, 0] = TEXT.bos_id
    for row, length in enumerate(lengths.tolist()):
        token_ids[row, length - 1] = TEXT.eos_id
        token_ids[row, length:] = TEXT.pad_id
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=draw)
    return {"images": images, "token_ids": token_ids, "lengths": lengths}


def test_labels_are_shifted_and_padding_is_ignored(batch) -> None:
    labels = labels_of(batch["token_ids"], batch["lengths"])
    for row, length in enumerate(batch["lengths"].tolist()):
        assert labels[row, : length - 1].tolist() == batch["token_ids"][row, 1:length].tolist()
        assert (labels[row, length - 1 :] == IGNORE_INDEX).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_equals_a_slow_transcription(make_captioner, batch, smoothing: float) -> None:
    captioner = make_captioner()
    objective = Objective(Config(label_smoothing=smoothing), captioner, None).eval()
    with torch.no_grad():
        found = objective(batch)["loss"].item()
        logits = captioner(batch["images"], batch["token_ids"][:, :-1])
    terms = []
    for row, length in enumerate(batch["lengths"].tolist()):
        for position in range(length - 1):
            log_probs = logits[row, position].log_softmax(-1)
            right = log_probs[batch["token_ids"][row, position + 1]].item()
            terms.append(-(1 - smoothing) * right - smoothing * log_probs.mean().item())
    assert found == pytest.approx(sum(terms) / len(terms), abs=1e-4)


def test_uniform_logits_cost_the_log_of_the_vocabulary(make_captioner, batch) -> None:
    captioner = make_captioner()
    with torch.no_grad():
        captioner.decoder.model.lm_head.weight.zero_()
    loss = Objective(Config(label_smoothing=0.0), captioner, None)(batch)["loss"].item()
    assert loss == pytest.approx(math.log(TEXT.vocab_size), abs=1e-5)


def test_gradients_reach_what_is_trained_and_nothing_else(make_captioner, batch) -> None:
    captioner = make_captioner(encoder=CNN)
    config = Config(frozen=("encoder.backbone.conv_stem",), encoder_from_epoch=1)
    objective = Objective(config, captioner, None).train()
    statistics = {k: v.clone() for k, v in captioner.encoder.named_buffers()}
    objective.before_epoch(0)
    objective(batch)["loss"].backward()
    assert all(p.grad is None for p in captioner.encoder.parameters())
    assert all(p.grad is not None for p in captioner.bridge.parameters())
    assert all(p.grad is not None for p in captioner.decoder.parameters())
    objective.before_epoch(1)
    objective(batch)["loss"].backward()
    for name, parameter in captioner.encoder.named_parameters():
        assert (parameter.grad is None) == name.startswith("backbone.conv_stem"), name
    for name, value in captioner.encoder.named_buffers():
        assert torch.equal(value, statistics[name]), f"{name} moved"


def test_padding_changes_nothing(make_captioner, batch) -> None:
    objective = Objective(Config(), make_captioner(), None).eval()
    wider = torch.nn.functional.pad(batch["token_ids"], (0, 3), value=TEXT.pad_id)
    with torch.no_grad():
        first = objective(batch)["loss"]
        second = objective({**batch, "token_ids": wider})["loss"]
    torch.testing.assert_close(first, second)
