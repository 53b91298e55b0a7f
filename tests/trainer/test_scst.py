"""Self-critical training: golden advantages, an exact policy gradient, and a reward that rises."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs import SIZE, batch_of
from test_loop import log, recipe
from tiny_captioner import TEXT, decoder_table

from exports.wording import breaks_off, words
from trainer import variants
from trainer.data import Example
from trainer.dataset import CaptionDataset
from trainer.decoding import greedy, sample
from trainer.errors import ConfigError
from trainer.metrics._hashes import count_ngrams, places_of
from trainer.objectives._captioning import IGNORE_INDEX, labels_of
from trainer.objectives.scst import leave_one_out, policy_loss
from trainer.rewards import _reward
from trainer.stages import finetune
from trainer.transforms import Augment, Transform

NOUNS = ["field", "house", "river", "garden", "street", "forest", "kitchen", "desert"]
WORDS = ["two", "dogs", "in", "a", *NOUNS]


class Words:
    """A tokenizer of whole words."""

    def encode(self, text: str) -> list[int]:
        return [WORDS.index(word) + 3 for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(WORDS[i - 3] if i - 3 < len(WORDS) else f"x{i}" for i in ids if i > 2)


def dataset() -> CaptionDataset:
    """Eight images of two dogs, each somewhere else."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, *SIZE, 3), np.uint8)
    examples = [Example(Path(f"{noun}.png"), (f"two dogs in a {noun}",), None) for noun in NOUNS]
    tokenizer: Any = Words()
    transform = Transform(Augment(), SIZE)
    return CaptionDataset(
        examples, pixels, tokenizer, TEXT, captions=1, transform=transform, seed=0
    )


def objective_of(captioner, data: CaptionDataset, **table: Any):
    module, config = variants.parse("objectives", {"name": "scst", "max_new_tokens": 7, **table})
    return module.Objective(config, captioner, data).train()


def trained(objective, data: CaptionDataset, steps: int, lr: float) -> list[dict[str, float]]:
    """Trains on all images at once; returns what was said after each step."""
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=lr)
    batch, said = batch_of(data), []
    for step in range(steps):
        torch.manual_seed(step)
        found = objective(batch)
        optimizer.zero_grad()
        found["loss"].backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        said.append({name: value.item() for name, value in found.items()})
    return said


def test_the_leave_one_out_advantage_has_its_golden_values() -> None:
    advantage = leave_one_out(torch.tensor([[1.0, 0.5, 0.2, 0.3, 0.0]]))
    expected = torch.tensor([[0.75, 0.125, -0.25, -0.125, -0.5]])
    torch.testing.assert_close(advantage, expected)
    assert (leave_one_out(torch.full((2, 5), 0.7)) == 0).all()


@pytest.mark.parametrize("baseline", ["leave_one_out", "greedy"])
def test_the_policy_gradient_of_a_bandit_is_the_analytic_one(baseline: str) -> None:
    logits = torch.tensor([0.2, -0.3, 0.5])
    rewards = torch.tensor([1.0, 0.2, 0.0])
    groups, samples = 20_000, 5
    torch.manual_seed(0)
    arms = torch.multinomial(logits.softmax(0), groups * samples, replacement=True)
    worth = rewards[arms].view(groups, samples)
    advantage = leave_one_out(worth) if baseline == "leave_one_out" else worth - rewards[2]
    own = logits.repeat(groups * samples, 1, 1).requires_grad_()
    policy_loss(own, arms.unsqueeze(1), advantage.flatten()).backward()
    assert own.grad is not None
    found = -own.grad.view(groups, samples, 3).sum(1) * groups  # of each group, (G, 3)
    known = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad((known.softmax(0) * rewards).sum(), known)
    error = found.std(0) / groups**0.5
    assert error.max() < 4e-3
    assert ((found.mean(0) - expected).abs() < 3 * error).all()


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


def test_equal_rewards_move_nothing(make_captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset()
    objective = objective_of(make_captioner(), data, xe_weight=0.0)
    cider = variants.load("rewards", "cider_d").Reward
    monkeypatch.setattr(cider, "scores", lambda self, sampled: np.full(len(sampled.texts), 0.7))
    objective(batch_of(data))["loss"].backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in objective.parameters())


def test_the_reward_and_its_frequencies_are_of_the_same_words(make_captioner) -> None:
    data = dataset()
    objective = objective_of(make_captioner(), data)
    frequencies = objective._rewards["cider_d"][1].sources.frequencies
    for example in data.examples:
        human = _reward.Sampled(example.captions, [True], [0], torch.zeros(1))
        ngrams = count_ngrams([words(text) for text in human.marked])
        assert places_of(ngrams.numbers, frequencies.numbers)[1].all()
    end = count_ngrams([["eos"]]).numbers
    assert frequencies.counts[places_of(end, frequencies.numbers)[0]].tolist() == [8]


def test_a_reward_is_a_weighted_sum_of_its_parts(make_captioner) -> None:
    data, batch = dataset(), batch_of(dataset())
    weights = {"cider_d": 0.5, "bleu4": 2.0, "repetition": -1.0}
    found = {}
    for name, table in {"all": weights, **{one: {one: 1.0} for one in weights}}.items():
        torch.manual_seed(0)
        found[name] = objective_of(make_captioner(), data, rewards=table)(batch)
    for name in weights:
        torch.testing.assert_close(found["all"][f"reward/{name}"], found[name]["reward"])
    expected = sum(weight * found[name]["reward"] for name, weight in weights.items())
    torch.testing.assert_close(found["all"]["reward"], expected)
    assert found["repetition"]["reward"] > 0


def test_the_greedy_baseline_is_what_the_model_would_say(make_captioner) -> None:
    captioner, data = make_captioner(), dataset()
    batch = batch_of(data)
    with torch.no_grad():
        memory = captioner.memory(batch["images"])
        token_ids, lengths = greedy(captioner, memory, max_new_tokens=7)
        logits = captioner(batch["images"], token_ids[:, :-1])
    labels = labels_of(token_ids, lengths)
    assert (logits.argmax(-1) == labels)[labels != IGNORE_INDEX].all()
    objective = objective_of(captioner, data, baseline="greedy", samples=1, xe_weight=0.0)
    worth, _ = objective._worth(token_ids, lengths, batch)
    torch.manual_seed(0)
    found = objective(batch)
    torch.testing.assert_close(found["greedy_reward"], worth.mean())
    torch.manual_seed(0)
    drawn, ends = sample(captioner, memory, 1, max_new_tokens=7)
    rewards, _ = objective._worth(drawn, ends, batch)
    logits = captioner(batch["images"], drawn[:, :-1])
    expected = policy_loss(logits, labels_of(drawn, ends), (rewards - worth).flatten())
    torch.testing.assert_close(found["loss"], expected)


@pytest.mark.parametrize("family", variants.names("decoders"))
def test_every_decoder_learns_from_its_reward(family: str, make_captioner) -> None:
    """From random weights: words of the references become likelier than the others."""
    captioner = make_captioner(decoder=decoder_table(family), sharpen=1)
    data = dataset()
    objective = objective_of(captioner, data, rewards={"bleu4": 1.0}, xe_weight=0.0)
    before = {name: p.clone() for name, p in captioner.named_parameters()}
    said = trained(objective, data, steps=25, lr=1e-2)
    rewards = [row["reward"] for row in said]
    assert np.mean(rewards[-5:]) > 1.4 * np.mean(rewards[:5]), rewards
    moved = {name for name, p in captioner.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("decoder") for name in moved)


@pytest.mark.slow
def test_without_the_end_as_a_word_captions_break_off(
    make_captioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that cannot tell the places apart does best to say nothing of them, if that is free.

    In a corpus where all these words are rare a wrong noun costs more than none.
    """
    corpus = tmp_path / "corpus.jsonl"
    others = [{"image": f"{n}.jpg", "caption": f"thing {n}"} for n in range(200)]
    rows = [{"image": f"{noun}.jpg", "caption": f"two dogs in a {noun}"} for noun in NOUNS]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in others + rows))

    def broken(end: str) -> float:
        """Returns the share of samples that break off after training with this word for an end."""
        monkeypatch.setattr(_reward, "END", end)
        captioner, data = make_captioner(sharpen=1), dataset()
        module, config = variants.parse("objectives", {"name": "lm", "label_smoothing": 0.0})
        blind = module.Objective(config, captioner, data).train()
        for parameter in captioner.encoder.parameters():
            parameter.requires_grad_(False)
        data.images[:] = data.images[0]  # all look alike
        trained(blind, data, steps=60, lr=5e-3)
        objective = objective_of(captioner, data, frequencies=str(corpus), xe_weight=0.0)
        trained(objective, data, steps=60, lr=5e-3)
        with torch.no_grad():
            memory = captioner.memory(batch_of(data)["images"])
            token_ids, _ = sample(captioner, memory, 25, max_new_tokens=7)
        ends = [breaks_off(Words().decode(ids).split()) for ids in token_ids.tolist()]
        return sum(ends) / len(ends)

    with_end, without = broken(" eos"), broken("")
    assert with_end < 0.2 and without > with_end + 0.3, (with_end, without)


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


def test_a_run_goes_on_without_the_corpus(shapes, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.json"
    corpus.write_bytes((shapes / "captions_train.json").read_bytes())
    table = {"name": "scst", "max_new_tokens": 4, "samples": 2, "frequencies": corpus}
    loop = {"epochs": 2, "ema": 0.0}
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    finetune.run(recipe(shapes, objective=table, loop=loop), whole)
    own = recipe(shapes, objective={**table, "frequencies": None}, loop=loop)
    finetune.run(own, tmp_path / "own")
    assert log(tmp_path / "own") == log(whole), "it is of the training captions themselves"
    saves: list[int] = []
    real = finetune.TrainingLoop._save

    def saved(self: Any) -> None:
        real(self)
        saves.append(self.step)
        if len(saves) == 1:
            raise KeyboardInterrupt

    config = recipe(shapes, objective=table, loop=loop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune.TrainingLoop, "_save", saved)
        with pytest.raises(KeyboardInterrupt):
            finetune.run(config, halved)
    corpus.unlink()
    finetune.run(config, halved)
    assert log(halved) == log(whole)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"samples": 1}, "samples = 1; leaving one out takes at least 2"),
        ({"rewards": {"cider": 1.0}}, "no rewards called 'cider'; there are bad_endings, bleu4"),
        ({"rewards": {"cider_d": 0.0}}, "not all are 0"),
        ({"rewards": {"cider_d": float("nan")}}, "weights are finite"),
        ({"rewards": {}}, "rewards: .* at least 1"),
        ({"baseline": "mean"}, "baseline: .*'leave_one_out' or 'greedy'"),
    ],
)
def test_what_cannot_be_is_said(table: dict[str, Any], message: str, make_captioner) -> None:
    with pytest.raises(ConfigError, match=message):
        objective_of(make_captioner(), dataset(), **table)
