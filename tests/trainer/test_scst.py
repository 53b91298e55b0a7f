"""Self-critical training: golden advantages, an exact policy gradient, and a reward that rises."""

import json
from pathlib import Path

import pytest
import torch
from test_loop import log, recipe
from tiny_captioner import TEXT

from trainer.decoding import sample
from trainer.errors import ConfigError
from trainer.objectives._captioning import IGNORE_INDEX
from trainer.objectives.scst import leave_one_out, policy_loss
from trainer.stages import finetune
from trainer.transforms import Augment


def test_the_leave_one_out_advantage_has_its_golden_values() -> None:
    advantage = leave_one_out(torch.tensor([[1.0, 0.5, 0.2, 0.3, 0.0]]))
    expected = torch.tensor([[0.75, 0.125, -0.25, -0.125, -0.5]])
    torch.testing.assert_close(advantage, expected)
    assert leave_one_out(torch.full((2, 4), 0.7)).abs().max() < 1e-6


def test_the_policy_gradient_of_a_bandit_is_the_analytic_one() -> None:
    logits = torch.tensor([0.2, -0.3, 0.5], requires_grad=True)
    rewards = torch.tensor([1.0, 0.2, 0.0])
    draws = 200_000
    torch.manual_seed(0)
    arms = torch.multinomial(logits.detach().softmax(0), draws, replacement=True)
    advantage = leave_one_out(rewards[arms].view(-1, 5)).flatten()
    policy_loss(logits.expand(draws, 1, 3), arms.unsqueeze(1), advantage).backward()
    expected = torch.autograd.grad((logits.softmax(0) * rewards).sum(), logits)[0]
    assert logits.grad is not None
    torch.testing.assert_close(-logits.grad, expected, atol=3e-3, rtol=0)


def test_ignored_tokens_and_equal_rewards_give_no_gradient() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[1, 2, 3], [4, 0, IGNORE_INDEX]])
    policy_loss(logits, labels, torch.tensor([1.0, -1.0])).backward()
    assert logits.grad is not None
    assert logits.grad[1, 2].abs().max() == 0
    assert logits.grad[1, 1].abs().max() > 0
    logits.grad = None
    policy_loss(logits, labels, torch.zeros(2)).backward()
    assert logits.grad.abs().max() == 0


def test_samples_follow_the_model(make_captioner) -> None:
    captioner = make_captioner()
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    torch.manual_seed(1)
    with torch.no_grad():
        memory = captioner.memory(images)
        token_ids, lengths = sample(captioner, memory, 600, max_new_tokens=9)
        logits = captioner(images, torch.full((2, 1), TEXT.bos_id))[:, 0]
    for image, rows in enumerate(token_ids.view(2, 600, -1)):
        expected = logits[image].softmax(-1)
        found = torch.bincount(rows[:, 1], minlength=TEXT.vocab_size) / 600
        assert (found - expected).abs().max() < 0.08
    for ids, length in zip(token_ids.tolist(), lengths.tolist(), strict=True):
        assert ids[0] == TEXT.bos_id
        assert TEXT.eos_id not in ids[: length - 1]
        assert set(ids[length:]) <= {TEXT.pad_id}
        assert ids[length - 1] == TEXT.eos_id or length == 10


def test_the_reward_rises_from_where_cross_entropy_left_it(shapes, tmp_path: Path) -> None:
    quick = {"epochs": 12, "ema": 0.0, "save_every": 1000}
    calm = Augment()
    decoder = {"dropout": 0.0}
    first = recipe(shapes, loop=quick, augment=calm, decoder=decoder, optim={"lr": 3e-3})
    finetune.run(first, tmp_path / "xe")
    second = recipe(
        shapes,
        start=tmp_path / "xe",
        objective={"name": "scst", "frozen": ["encoder"], "samples": 5},
        loop=quick,
        augment=calm,
        decoder=decoder,
        optim={"lr": 1e-3},
    )
    finetune.run(second, tmp_path / "rl")
    rewards = [row["reward"] for row in log(tmp_path / "rl")]
    before, after = sum(rewards[:12]) / 12, sum(rewards[-12:]) / 12
    assert after > 1.1 * before, (before, after)
    assert json.loads((tmp_path / "rl/text.json").read_text()) == json.loads(
        (tmp_path / "xe/text.json").read_text()
    )


def test_one_sample_has_no_baseline(shapes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="samples = 1"):
        finetune.run(recipe(shapes, objective={"name": "scst", "samples": 1}), tmp_path)
