"""What every method owes, whatever it is: a new file in trainer/methods/ is tested by this."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pretraining import batch_of, method_of, recipe
from tiny_captioner import GPT2

from trainer import variants
from trainer.checkpoint import load_checkpoint
from trainer.loop import TrainingLoop
from trainer.run import Recipe
from trainer.stages import finetune, pretrain

METHODS = variants.names("methods")
BATCH = 4
pytestmark = pytest.mark.usefixtures("no_curves")
# Sizes that make these tests fast; a method that is not here is tested as it is by default.
SMALL: dict[str, dict[str, Any]] = {
    "beit": {"tokenizer": {"name": "dvae", "vocab_size": 32, "width": 16, "epochs": 2}},
    "clip": {"width": 32, "text": {"width": 32, "layers": 1}},
    "mae": {"decoder_width": 64, "decoder_layers": 2, "decoder_heads": 4},
    "moco": {"hidden": 64, "width": 32},
    "simclr": {"hidden": 64, "width": 32},
}


class Killed(Exception):
    pass


@pytest.fixture(params=METHODS)
def name(request) -> str:
    return request.param


def table(name: str, **keys: Any) -> dict[str, Any]:
    return {"name": name, **SMALL.get(name, {}), **keys}


def prepared(name: str):
    """A method that has done what it must do first."""
    method = method_of(table(name), batch=BATCH)
    if preparation := method.preparation():
        optimizer = torch.optim.AdamW(preparation.objective.parameters(), lr=preparation.lr)
        preparation.objective.train()
        images = batch_of(method, 8)["images"][:8]
        for step in range(60):
            torch.manual_seed(step)
            optimizer.zero_grad()
            preparation.objective({"images": images})["loss"].backward()
            optimizer.step()
            preparation.objective.after_step(step + 1)
        preparation.objective.requires_grad_(False)
    return method.train()


def test_eight_images_are_learnt_by_heart(name: str) -> None:
    method = prepared(name)
    weights = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-3)
    whole = batch_of(method, 8)
    shares = []
    for step in range(200):
        torch.manual_seed(step)
        rows = torch.randperm(8)[:BATCH]
        views = [view[rows] for view in whole["images"].chunk(method.views)]
        batch = {key: value[rows] for key, value in whole.items() if key != "images"}
        optimizer.zero_grad()
        losses = method({**batch, "images": torch.cat(views)})
        losses["loss"].backward()
        optimizer.step()
        method.after_step(step + 1)
        shares.append(losses["of_chance"].item())
        start, end = sum(shares[:10]) / 10, sum(shares[-10:]) / 10
        if len(shares) > 20 and end < min(start, 1) / 2:
            return
    pytest.fail(f"the loss went from {start} to {end} of chance only")


def test_what_chance_costs_is_known(name: str) -> None:
    """Weights of 0 know nothing: nothing about images, and nothing of one token over another."""
    method = prepared(name).eval()
    batch = batch_of(method, BATCH)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad and parameter.ndim:
                parameter.zero_()
        losses = method(batch)
    assert losses["of_chance"].item() == pytest.approx(1, abs=1e-4)


def test_gradients_reach_what_is_trained_and_nothing_else(name: str) -> None:
    method = prepared(name)
    method.zero_grad(set_to_none=True)
    method(batch_of(method, BATCH))["loss"].backward()
    for parameter_name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
    reached = [p.grad.abs().sum() > 0 for p in method.encoder.parameters() if p.grad is not None]
    assert reached and all(reached)


def test_frozen_parameters_stay(name: str) -> None:
    method = method_of(table(name, frozen=["encoder.backbone.patch_embed"]), batch=BATCH)
    patch = method.encoder.backbone.patch_embed
    assert not any(parameter.requires_grad for parameter in patch.parameters())


def test_the_same_batch_gives_the_same_loss(name: str) -> None:
    method = prepared(name)
    other = copy.deepcopy(method)
    batch = batch_of(method, BATCH)
    losses = []
    for one in (method, other):
        torch.manual_seed(7)
        losses.append(one(batch)["loss"].item())
    assert losses[0] == losses[1]


def test_pictures_are_pictures(name: str) -> None:
    method = prepared(name).eval()
    images = batch_of(method, 3)["images"][:3]
    state = torch.get_rng_state()
    with torch.no_grad():
        found = method.pictures(images)
    assert torch.equal(torch.get_rng_state(), state), "showing must not change what is drawn next"
    if found is not None:
        assert found.dtype == torch.uint8
        assert found.shape[0] == 3 and found.shape[2:] == (3, 32, 32)


@pytest.fixture(scope="module")
def whole(shapes, tmp_path_factory):
    """Runs of every method from beginning to end, made once."""
    found: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in found:
            found[name] = tmp_path_factory.mktemp(name)
            pretrain.run(recipe(shapes, table(name)), found[name])
        return found[name]

    return run


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_killed_run_goes_on_bit_for_bit(
    name: str, whole, shapes, tmp_path: Path, monkeypatch
) -> None:
    true_step = TrainingLoop._train_step

    def step(self, batches):
        if self.step == 4:
            raise Killed
        return true_step(self, batches)

    monkeypatch.setattr(TrainingLoop, "_train_step", step)
    for _ in range(2):  # a preparation is killed once more
        with pytest.raises(Killed):
            pretrain.run(recipe(shapes, table(name)), tmp_path)
    monkeypatch.undo()
    pretrain.run(recipe(shapes, table(name)), tmp_path)
    assert log(tmp_path) == log(whole(name))
    first, _ = load_checkpoint(whole(name) / "last.safetensors")
    second, _ = load_checkpoint(tmp_path / "last.safetensors")
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_finetuning_starts_from_its_checkpoint(name: str, whole, shapes, tmp_path: Path) -> None:
    run = recipe(shapes, table(name))
    finetune.run(
        Recipe.model_validate(
            {
                "data": {"train": shapes / "captions_train.json", "captions_per_image": 1},
                "image": {"height": 32, "width": 32},
                "tokenizer": {"vocab_size": 300},
                "encoder": {**run.encoder, "weights": str(whole(name))},
                "bridge": {"name": "cross_attention", "layers": 0},
                "decoder": GPT2,
                "objective": {"name": "lm", "frozen": ["encoder"]},
                "loop": {"epochs": 1, "batch_size": 16, "workers": 0},
            }
        ),
        tmp_path,
    )
    began, _ = load_checkpoint(whole(name) / "last.safetensors")
    ended, _ = load_checkpoint(tmp_path / "last.safetensors")
    kept = {k: v for k, v in began.items() if k.startswith("average.encoder.")}
    assert kept
    for key, value in kept.items():
        assert torch.equal(ended[key.replace("average.", "objective.captioner.")], value), key
