"""What all objectives on pairs keep to: they learn, go on after a crash, and say what they need."""

import json
from pathlib import Path

import pytest
import torch
from pairs import BERT, batch_of, make_dataset, make_matcher, objective_of, some_captions
from test_loop import log, recipe
from tiny_captioner import GPT2

from trainer.checkpoint import load_checkpoint
from trainer.errors import ConfigError
from trainer.loop import TrainingLoop
from trainer.run import Recipe, Run
from trainer.stages import evaluate, finetune

ON_PAIRS = ["blip", "itc", "itm", "mlm"]
PARTS = {"blip": ("itc", "itm", "lm")}


def pairs_recipe(shapes: Path, name: str, **changes) -> Recipe:
    return recipe(
        shapes,
        decoder={**BERT, "max_length": 24},
        matcher={"width": 16},
        objective={"name": name},
        **changes,
    )


@pytest.mark.parametrize("name", ON_PAIRS)
def test_each_loss_falls_on_sixteen_pairs(name: str) -> None:
    dataset = make_dataset(some_captions(16))
    momentum = {} if name in ("itm", "mlm") else {"momentum": 0.9}
    objective = objective_of({"name": name, **momentum}, dataset).train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    batch, found = batch_of(dataset), []
    torch.manual_seed(0)
    for step in range(60):
        figures = objective(batch)
        optimizer.zero_grad()
        figures["loss"].backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        objective.after_step(step + 1)
        found.append([figures[part].item() for part in PARTS.get(name, ("loss",))])
    first, last = torch.tensor(found[0]), torch.tensor(found[-5:]).mean(0)
    assert (last < 0.95 * first).all(), (first, last)
    if name == "itm":
        assert last < 0.6, "no better than the constant answer"


@pytest.mark.parametrize("name", ON_PAIRS)
def test_decoders_that_cannot_read_are_refused(name: str) -> None:
    dataset = make_dataset(some_captions(4))
    for decoder in (GPT2, {**BERT, "text_encoder": False}):
        with pytest.raises(ConfigError, match='name = "bert", text_encoder = true'):
            objective_of({"name": name}, dataset, make_matcher(decoder=decoder, matcher=None))
    joined = make_matcher(bridge={"name": "concat"}, matcher=None)
    with pytest.raises(
        ConfigError, match=r'not by prefix: set \[bridge\] name = "cross_attention"'
    ):
        objective_of({"name": name}, dataset, joined)


@pytest.mark.parametrize("name", ["blip", "itc", "itm"])
def test_a_matcher_is_asked_for(name: str) -> None:
    dataset = make_dataset(some_captions(4))
    with pytest.raises(ConfigError, match=rf"objective {name} .* add a \[matcher\] table"):
        objective_of({"name": name}, dataset, make_matcher(matcher=None))


def test_a_run_with_momentum_goes_on_bit_for_bit(shapes, tmp_path: Path, monkeypatch) -> None:
    table = pairs_recipe(shapes, "blip")
    finetune.run(table, tmp_path / "whole")
    train_step, steps = TrainingLoop._train_step, []

    def until_killed(self, batches):
        if len(steps) == 7:
            raise KeyboardInterrupt
        steps.append(1)
        return train_step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_train_step", until_killed)
        with pytest.raises(KeyboardInterrupt):
            finetune.run(table, tmp_path / "killed")
    finetune.run(table, tmp_path / "killed")
    assert log(tmp_path / "killed") == log(tmp_path / "whole")
    first, _ = load_checkpoint(tmp_path / "whole/last.safetensors")
    second, _ = load_checkpoint(tmp_path / "killed/last.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "objective.contrast.queue_keys" in first
    assert Run(tmp_path / "whole").captioner().matcher is not None


def test_runs_without_captions_are_measured_by_what_they_learn(shapes, tmp_path: Path) -> None:
    dev = {"dev": shapes / "captions_dev.json"}
    finetune.run(pairs_recipe(shapes, "itc", data=dev, loop={"epochs": 1}), tmp_path / "itc")
    figures = log(tmp_path / "itc")[-1]
    assert {"dev/loss", "dev/TR R@1", "dev/IR median", "dev/ITM AUC swapped"} <= figures.keys()
    assert "dev/CIDEr-D" not in figures
    start = {"start": tmp_path / "itc", "loop": {"epochs": 1, "autocast": "bf16"}}
    table = pairs_recipe(shapes, "blip", data=dev, **start)
    prompted = table.model_copy(update={"objective": {"name": "blip", "prompt": "there is"}})
    finetune.run(prompted, tmp_path / "blip")
    figures = log(tmp_path / "blip")[-1]
    assert {"dev/CIDEr-D", "dev/TR R@1", "dev/ITM AUC"} <= figures.keys()
    assert "dev/loss" not in figures
    config = evaluate.Config(model=tmp_path / "blip", data=shapes / "captions_dev.json")
    evaluate.run(config, tmp_path / "evaluation")
    report = json.loads((tmp_path / "evaluation/figures.json").read_text())
    value, low, high = report["matching"]["IR R@10"]
    assert low <= value <= high
    assert report["figures"]["CIDEr-D"][0] == pytest.approx(figures["dev/CIDEr-D"], abs=1e-3)
    rows = (tmp_path / "evaluation/captions.jsonl").read_text().splitlines()
    prompt = list(Run(tmp_path / "blip").prompt_ids)
    assert prompt and all(json.loads(row)["token_ids"][: len(prompt)] != prompt for row in rows)


def test_batches_that_are_compared_are_not_accumulated(shapes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"accumulate = 2, but 'itc' compares the images"):
        finetune.run(pairs_recipe(shapes, "itc", loop={"accumulate": 2}), tmp_path)
