"""Pretraining as a stage: what it refuses, what it keeps, what it shows."""

import json
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pretraining import CNN, recipe
from pydantic import ValidationError

from trainer import variants
from trainer.__main__ import main
from trainer.checkpoint import load_checkpoint
from trainer.errors import CheckpointError, ConfigError, DataError, DivergenceError
from trainer.methods.simclr import Method
from trainer.runlog import read_log
from trainer.stages import pretrain

PROBED = (("captioned", "train"), ("dev", "dev"))
SIMCLR = {"name": "simclr", "hidden": 32, "width": 16}


def test_an_empty_folder_is_named(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        pretrain.run(recipe(shapes, SIMCLR, data={"train": tmp_path / "empty"}), tmp_path / "run")


def test_one_image_is_too_few(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "one" / "a.png")
    with pytest.raises(DataError, match="1 image; learning needs at least 2"):
        pretrain.run(recipe(shapes, SIMCLR, data={"train": tmp_path / "one"}), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loop": {"batch_size": 64}}, ConfigError, "batch_size = 64, but there are 48 images"),
        ({"loop": {"batch_size": 1}}, ConfigError, "a batch needs at least 2 images"),
        ({"loop": {"accumulate": 2}}, ConfigError, "set method.chunk"),
        ({"method": {"name": "mae", "mask_ratio": 0.0}}, ConfigError, "mask_ratio"),
        ({"method": {"name": "mae", "mask_ratio": 1.0}}, ConfigError, "mask_ratio"),
        ({"method": {"name": "moco", "queue": 99}}, ConfigError, "but there are 48 images"),
        (
            {"method": {"name": "byol"}},
            ConfigError,
            f"there are {', '.join(variants.names('methods'))}",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, Any], error: type[Exception], message: str, shapes: Path, tmp_path: Path
) -> None:
    method = changes.pop("method", SIMCLR)
    with pytest.raises(error, match=message):
        pretrain.run(recipe(shapes, method, **changes), tmp_path)


def test_a_cnn_hides_no_patches(shapes: Path, tmp_path: Path) -> None:
    made = recipe(shapes, {"name": "mae"}).model_copy(update={"encoder": CNN})
    with pytest.raises(ConfigError, match='take \\[encoder\\] name = "timm_vit"'):
        pretrain.run(made, tmp_path)


def test_clip_needs_captions(shapes: Path, tmp_path: Path) -> None:
    made = recipe(shapes, {"name": "clip"}, data={"train": shapes / "images"})
    with pytest.raises(DataError, match="no image has a caption"):
        pretrain.run(made, tmp_path)


def test_a_recipe_s_typing_error_names_the_keys(shapes: Path) -> None:
    with pytest.raises(ValidationError, match="epoch"):
        recipe(shapes, SIMCLR, loop={"epoch": 3})


def test_a_loss_that_is_no_number_names_the_step_and_keeps_the_checkpoint(
    shapes: Path, tmp_path: Path, monkeypatch
) -> None:
    forward, calls = Method.forward, []

    def broken(self, batch):
        calls.append(1)
        losses = forward(self, batch)
        return {"loss": losses["loss"] * float("nan")} if len(calls) == 4 else losses

    monkeypatch.setattr(Method, "forward", broken)
    message = "the loss of step 4 is not a number.*last.safetensors holds a good state"
    with pytest.raises(DivergenceError, match=message):
        pretrain.run(recipe(shapes, SIMCLR), tmp_path)
    tensors, state = load_checkpoint(tmp_path / "last.safetensors")
    assert state["step"] == 3
    assert all(torch.isfinite(value).all() for value in tensors.values())
    monkeypatch.undo()
    pretrain.run(recipe(shapes, SIMCLR), tmp_path)  # and goes on from it
    assert load_checkpoint(tmp_path / "last.safetensors")[1]["step"] == 6


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(
    shapes: Path, tmp_path: Path, monkeypatch
) -> None:
    import trainer.checkpoint as module

    save, calls = module.save_file, []

    def full(tensors, path, metadata):
        calls.append(1)
        if len(calls) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        pretrain.run(recipe(shapes, SIMCLR), tmp_path)
    assert load_checkpoint(tmp_path / "last.safetensors")[1]["step"] == 2
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_disk_that_fills_up_elsewhere_names_the_folder(
    shapes: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def full(folder: Path) -> None:
        raise OSError(ENOSPC, "No space left on device")  # as `write` says it: without a file

    monkeypatch.setattr(pretrain, "plot_log", full)
    train = f"data.train={shapes / 'captions_train.json'}"
    probe = [f"probe.{key}={shapes / f'captions_{part}.json'}" for key, part in PROBED]
    small = ["image.height=32", "image.width=32", "loop.batch_size=16", "loop.epochs=1"]
    command = ["pretrain", "trainer/recipes/tiny/simclr.toml", "--out", str(tmp_path / "run")]
    assert main([*command, train, *probe, *small]) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert said == (
        f"error: {tmp_path / 'run'}: no space left; make room and give the same command again"
    )


def test_another_recipe_s_run_is_refused(shapes: Path, tmp_path: Path) -> None:
    pretrain.run(recipe(shapes, SIMCLR), tmp_path)
    with pytest.raises(CheckpointError, match="holds a run of another recipe"):
        pretrain.run(recipe(shapes, SIMCLR, optim={"lr": 0.5}), tmp_path)


def test_a_run_shows_where_it_began_and_what_it_sees(shapes: Path, tmp_path: Path) -> None:
    pretrain.run(recipe(shapes, SMALL_MAE), tmp_path)
    rows = [row for row in read_log(tmp_path) if "probe/rankme" in row]
    assert [row["step"] for row in rows] == [0, 3, 6]
    with Image.open(tmp_path / "pictures.png") as sheet:
        assert sheet.size == (3 * 192, 8 * 192)
    with Image.open(tmp_path / "curves.png") as curves:
        assert min(curves.size) > 400


SMALL_MAE = {"name": "mae", "decoder_width": 16, "decoder_layers": 1, "decoder_heads": 2}
BEIT = {"name": "beit", "tokenizer": {"name": "dvae", "vocab_size": 512, "width": 8, "epochs": 1}}


@pytest.mark.parametrize(
    ("method", "lr", "remedy"),
    [
        ({**SIMCLR, "temperature": 50.0}, 1e-3, "method.temperature"),  # all pairs alike
        (SMALL_MAE, 1e-9, "a lower method.mask_ratio"),
        (BEIT, 1e-9, "fewer ids"),
        (SIMCLR, 3e-3, None),
        (SMALL_MAE, 1e-2, None),
        (BEIT, 3e-3, None),
    ],
)
def test_a_loss_that_stays_at_chance_is_told(
    method: dict[str, Any],
    lr: float,
    remedy: str | None,
    shapes: Path,
    tmp_path: Path,
    monkeypatch,
    capsys,
) -> None:
    monkeypatch.setattr(pretrain, "plot_log", lambda folder: None)
    loop = {"epochs": 8, "ema": 0.0, "save_every": 100, "evaluate_every": 4}
    optim = {"lr": lr, "warmup": 0.3}
    pretrain.run(recipe(shapes, method, loop=loop, optim=optim), tmp_path)
    told = [line for line in capsys.readouterr().out.splitlines() if "nothing is learnt" in line]
    assert [line.partition(": the loss is ")[0] for line in told] == (
        ["WARNING, epoch 8"] if remedy else []  # the fourth is hardly warm
    )
    assert all(f"{remedy}" in line for line in told)


@pytest.mark.parametrize("table", [SMALL_MAE, BEIT])
def test_features_that_become_the_same_for_all_images_are_told(
    table: dict[str, Any], shapes: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    @torch.no_grad()
    def collapse(self, step: int) -> None:
        self.encoder.backbone.norm.weight.zero_()
        self.encoder.backbone.norm.bias.fill_(0.3)

    monkeypatch.setattr(variants.load("methods", table["name"]).Method, "after_step", collapse)
    pretrain.run(recipe(shapes, table, loop={"epochs": 1, "ema": 0.0}), tmp_path)
    said = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(said) == 1
    assert said[0].startswith("WARNING, epoch 1: all images have nearly the same features (spread")


def test_only_the_first_worker_measures(shapes: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pretrain, "rank", lambda: 1)
    monkeypatch.setattr(pretrain, "Probes", None)  # building them would fail
    pretrain.run(recipe(shapes, SIMCLR), tmp_path)
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("stage", "workers", "message"),
    [
        ("shapecaps", "2", "only pretrain is shared by several processes"),
        ("pretrain", "0", "at least one is needed"),
    ],
)
def test_workers_that_cannot_be_are_refused(
    stage: str, workers: str, message: str, tmp_path: Path, capsys
) -> None:
    recipe = {"shapecaps": "shapecaps", "pretrain": "simclr"}[stage]
    command = [stage, f"trainer/recipes/tiny/{recipe}.toml", "--workers", workers]
    assert main([*command, "--out", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_line_says_one_line(shapes: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'data = {{ train = "{shapes / "captions_train.json"}" }}\n'
        "image = { height = 32, width = 32 }\n"
        'encoder = { name = "timm_vit", patch_size = 8, embed_dim = 32, depth = 1 }\n'
        'method = { name = "simclr" }\n'
        "loop = { epochs = 1, batch_size = 100 }\n"
    )
    assert main(["pretrain", str(path), "--out", str(tmp_path / "run"), "loop.workers=0"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == ["error: loop.batch_size = 100, but there are 48 images; take 48"]
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["loop"]["workers"] == 0
