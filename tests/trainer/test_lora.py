"""Updates of low rank: what they compute, what they train, and that a run hides them."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from test_loop import log, recipe
from tiny_captioner import CNN, TEXT, VIT, decoder_table
from torch import nn
from transformers.pytorch_utils import Conv1D

from exports.bundle import Bundle
from trainer import variants
from trainer.checkpoint import below, load_checkpoint
from trainer.errors import ConfigError
from trainer.loop import TrainingLoop
from trainer.lora import Lora, LowRank, adapt, merged
from trainer.objectives.lm import Config, Objective
from trainer.run import Run
from trainer.stages import export, finetune

EVERYTHING = Lora(rank=2, alpha=6, targets=("encoder", "bridge", "decoder"))


def shaken(module: nn.Module) -> nn.Module:
    """Gives every update random numbers."""
    torch.manual_seed(1)
    for part in module.modules():
        if isinstance(part, LowRank):
            nn.init.normal_(part.left, std=0.1)
            nn.init.normal_(part.right, std=0.1)
    return module


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 32, 48)).float()
    return images, torch.randint(3, TEXT.vocab_size, (2, 6))


@pytest.mark.parametrize("name", variants.names("decoders"))
def test_the_first_step_is_that_of_the_pretrained_weights(make_captioner, name: str) -> None:
    captioner = make_captioner(decoder=decoder_table(name))
    with torch.no_grad():
        before = captioner(*inputs())
        adapt(captioner, EVERYTHING)
        assert torch.equal(captioner(*inputs()), before)
        assert not torch.equal(shaken(captioner)(*inputs()), before)


@pytest.mark.parametrize(
    ("name", "encoder"), [*((name, VIT) for name in variants.names("decoders")), ("gpt2", CNN)]
)
def test_merged_weights_compute_the_same(make_captioner, name: str, encoder) -> None:
    captioner = make_captioner(decoder=decoder_table(name), encoder=encoder)
    plain = deepcopy(captioner)
    adapt(captioner, EVERYTHING)
    shaken(captioner)
    plain.load_state_dict(merged(captioner.state_dict()))
    images, token_ids = inputs()
    with torch.no_grad():
        torch.testing.assert_close(
            captioner(images, token_ids), plain(images, token_ids), rtol=0, atol=1e-6
        )
        steps = [
            one.step(token_ids[:, 0], 0, one.empty_cache(2), one.memory(images))[0]
            for one in (captioner, plain)
        ]
        torch.testing.assert_close(*steps, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "inputs_in_rows"),
    [(nn.Linear(5, 3), False), (Conv1D(3, 5), True), (nn.Conv2d(5, 3, 1), False)],
)
def test_an_update_is_the_paper_s(layer: nn.Module, inputs_in_rows: bool) -> None:
    holder = nn.ModuleDict({"part": deepcopy(layer)})
    adapt(holder, Lora(rank=2, alpha=6, targets=("part",)))
    update = shaken(holder)["part"].parametrizations.weight[0]
    # B (3, 2) and A (2, 5), whichever way round the layer keeps its weight.
    first, second = update.left, update.right
    b, a = (second.T, first.T) if inputs_in_rows else (first, second)
    assert (b.shape, a.shape) == ((3, 2), (2, 5))
    torch.manual_seed(3)
    x = torch.randn(4, 5)
    image = x[:, :, None, None] if isinstance(layer, nn.Conv2d) else x
    expected = layer(image).flatten(1) + 3 * (x @ a.T) @ b.T
    torch.testing.assert_close(holder["part"](image).flatten(1), expected)


def test_one_side_begins_at_zero_and_the_other_as_large_as_its_inputs() -> None:
    holder = nn.ModuleDict({"linear": nn.Linear(400, 9), "conv1d": Conv1D(9, 400)})
    adapt(holder, Lora(rank=16, targets=("linear", "conv1d")))
    linear, conv1d = (holder[n].parametrizations.weight[0] for n in ("linear", "conv1d"))
    assert not linear.left.any() and not conv1d.right.any()
    assert linear.right.std().item() == pytest.approx(0.05, rel=0.05)
    assert conv1d.left.std().item() == pytest.approx(0.05, rel=0.05)


def test_only_updates_and_what_is_no_target_learn(make_captioner) -> None:
    captioner = make_captioner()
    adapt(captioner, Lora(rank=2, targets=("encoder", "decoder")))
    objective = Objective(Config(), captioner, None)  # type: ignore[arg-type]
    objective.before_epoch(0)
    images, token_ids = inputs()
    batch = {"images": images, "token_ids": token_ids, "lengths": torch.tensor([6, 6])}
    shaken(objective.train())(batch)["loss"].backward()
    learning = {name for name, p in captioner.named_parameters() if p.grad is not None}
    assert learning == {
        name
        for name, _ in captioner.named_parameters()
        if name.startswith("bridge.") or name.endswith((".0.left", ".0.right"))
    }
    assert any(name.startswith("encoder.") for name in learning)
    assert any(name.startswith("decoder.") for name in learning)
    # Shared with the word embeddings: an update would part them.
    assert not any("lm_head" in name for name in learning)
    assert captioner.decoder.model.lm_head.weight is captioner.decoder.model.transformer.wte.weight


def test_an_encoder_s_updates_have_dropout_in_training_alone(make_captioner) -> None:
    captioner = make_captioner()
    adapt(captioner, Lora(rank=2, dropout=0.5))
    objective = Objective(Config(), captioner, None)  # type: ignore[arg-type]
    shaken(captioner)
    layer = captioner.encoder.backbone.blocks[0].attn.qkv
    whole = layer.weight - layer.parametrizations.weight.original
    objective.train()
    torch.manual_seed(0)
    part = layer.weight - layer.parametrizations.weight.original
    kept = part.abs().sum(0) > 0
    assert 5 < kept.sum() < 27  # of 32 inputs
    torch.testing.assert_close(part[:, kept], 2 * whole[:, kept])
    objective.eval()
    assert torch.equal(layer.weight - layer.parametrizations.weight.original, whole)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("encodr",), r"lora\.targets = 'encodr' names no parameter; they begin with"),
        (("bridge.norm",), r"lora\.targets = 'bridge\.norm': there is no linear layer"),
    ],
)
def test_a_target_without_a_matrix_is_refused(make_captioner, targets, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapt(make_captioner(), Lora(targets=targets))


LORA = {"lora": {"rank": 2, "targets": ["encoder", "decoder"], "dropout": 0.1}}


@pytest.fixture(scope="module")
def adapted(shapes: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    finetune.run(recipe(shapes, **LORA, optim={"lr": 0.01}), folder)
    return folder


def test_a_killed_run_goes_on_bit_for_bit(shapes, adapted, tmp_path, monkeypatch) -> None:
    step = TrainingLoop._train_step

    def killed(loop: TrainingLoop, batches: list) -> dict[str, float]:
        if loop.step == 7:
            raise KeyboardInterrupt
        return step(loop, batches)

    config = recipe(shapes, **LORA, optim={"lr": 0.01})
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune.run(config, tmp_path)
    finetune.run(config, tmp_path)
    assert log(tmp_path) == log(adapted)
    first, second = (load_checkpoint(f / "last.safetensors")[0] for f in (adapted, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_reads_back_merged_and_averaged(shapes, adapted, tmp_path) -> None:
    captioner = Run(adapted).captioner()
    assert not any("parametrizations" in name for name, _ in captioner.named_parameters())
    average = below(load_checkpoint(adapted / "last.safetensors")[0], "average.captioner.")
    name = "encoder.backbone.blocks.1.mlp.fc1"
    left, right = (average[f"{name}.parametrizations.weight.0.{s}"] for s in ("left", "right"))
    base = average[f"{name}.parametrizations.weight.original"]
    weight = captioner.get_parameter(f"{name}.weight")
    torch.testing.assert_close(weight, base + 8 * left @ right)
    assert not torch.allclose(weight, base, atol=1e-4)
    # Embedding and head, one weight and frozen, stay one.
    assert torch.equal(
        captioner.decoder.model.lm_head.weight, captioner.decoder.model.transformer.wte.weight
    )
    # Another run, with updates of its own, begins where this one ended; so does an encoder.
    config = recipe(shapes, start=adapted, **LORA, loop={"epochs": 1}, optim={"lr": 1e-9})
    finetune.run(config, tmp_path / "on")
    torch.testing.assert_close(
        Run(tmp_path / "on").captioner().get_parameter(f"{name}.weight"), weight
    )
    module, table = variants.parse("encoders", {**VIT, "weights": str(adapted)})
    again = module.Encoder(table, (32, 32))
    assert torch.equal(again.get_parameter(name.removeprefix("encoder.") + ".weight"), weight)


@pytest.mark.slow
def test_a_run_with_updates_is_exported_like_any_other(shapes, tmp_path) -> None:
    # Trained until some pictures have a clear best caption, which go into the bundle.
    config = recipe(shapes, lora={"rank": 2}, loop={"epochs": 20}, optim={"lr": 0.01})
    finetune.run(config, tmp_path)
    card = {"description": "d", "data": "d", "licence": "l", "failures": "f"}
    data = shapes / "captions_dev.json"
    table = {"run": tmp_path, "name": "adapted", "data": data, "card": card}
    export.run(export.Config.model_validate(table), tmp_path)
    assert Bundle.open(tmp_path / "bundle").manifest.name == "adapted"
