"""The loop: resuming, averaging, schedules, and refusing what does not belong to a run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tiny_captioner import VIT

from trainer import loop
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.optim import MovingAverage, Optim, build_optimizer, learning_rate
from trainer.run import Recipe, Run
from trainer.stages import evaluate, finetune
from trainer.transforms import Augment


def recipe(shapes: Path, **changes) -> Recipe:
    table = {
        "data": {"train": shapes / "captions_train.json", "captions_per_image": 2},
        "image": {"height": 32, "width": 32},
        "tokenizer": {"vocab_size": 300},
        "encoder": VIT,
        "bridge": {"name": "cross_attention", "layers": 0},
        "decoder": {"name": "gpt2", "width": 32, "layers": 1, "heads": 2, "max_length": 24},
        "objective": {"name": "lm"},
        "augment": {"crop": {"area": 0.7}, "flip": {}, "jitter": {"brightness": 0.2, "hue": 0.1}},
        "loop": {"epochs": 2, "batch_size": 8, "ema": 0.9, "workers": 0, "save_every": 4},
    }
    for key, value in changes.items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
    return Recipe.model_validate(table)


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole_run(shapes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    finetune.run(recipe(shapes), folder)
    return folder


def test_a_killed_run_goes_on_bit_for_bit(shapes, whole_run, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    dumped = recipe(shapes).model_dump_json(exclude_none=True)
    code = (
        "import sys, pathlib, torch; torch.set_num_threads(1)\n"
        "from trainer.run import Recipe; from trainer.stages import finetune\n"
        "recipe = Recipe.model_validate_json(sys.argv[1])\n"
        "finetune.run(recipe, pathlib.Path(sys.argv[2]))"
    )
    folder = tmp_path / "killed"
    with path.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code, dumped, str(folder)], stdout=output, stderr=output
        )
        deadline = time.monotonic() + 120
        while not (folder / "log.jsonl").exists() or len(log_lines(folder)) < 7:
            assert time.monotonic() < deadline and process.poll() is None, path.read_text()
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert len(log_lines(folder)) < len(log(whole_run)), "it was killed too late to show anything"
    finetune.run(recipe(shapes), folder)
    assert log(folder) == log(whole_run)
    first, _ = load_checkpoint(whole_run / "last.safetensors")
    second, _ = load_checkpoint(folder / "last.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def log_lines(folder: Path) -> list[str]:
    return (folder / "log.jsonl").read_text().splitlines()


def test_workers_do_not_change_the_losses(shapes, whole_run, tmp_path: Path) -> None:
    finetune.run(recipe(shapes, loop={"workers": 2}), tmp_path)
    assert log(tmp_path) == log(whole_run)


def test_a_run_tells_tensorboard_too(whole_run) -> None:
    assert list((whole_run / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_half_precision_stays_near_full(
    shapes, whole_run, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "has_bf16", lambda: True)
    finetune.run(recipe(shapes, loop={"autocast": mode}), tmp_path)
    for half, full in zip(log(tmp_path), log(whole_run), strict=True):
        assert half["loss"] == pytest.approx(full["loss"], abs=0.05)
    assert [one["loss"] for one in log(tmp_path)] != [one["loss"] for one in log(whole_run)]


def test_a_processor_without_bf16_trains_in_float32_and_says_so(
    shapes, whole_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(loop, "has_bf16", lambda: False)
    finetune.run(recipe(shapes, loop={"autocast": "bf16"}), tmp_path)
    assert log(tmp_path) == log(whole_run)
    assert "bf16 would be slower on this processor" in capsys.readouterr().out


def test_accumulated_batches_equal_one_large_batch(shapes, tmp_path: Path) -> None:
    # Every caption of a drawing has another length, so batches of equal weight need equal tokens:
    # one caption an image, cut to the same few tokens by a short decoder.
    still = {
        "augment": Augment(),
        "decoder": {"max_length": 6, "dropout": 0.0},
        "data": {"captions_per_image": 1},
    }
    finetune.run(recipe(shapes, **still, loop={"batch_size": 16, "epochs": 1}), tmp_path / "large")
    finetune.run(
        recipe(shapes, **still, loop={"batch_size": 8, "accumulate": 2, "epochs": 1}),
        tmp_path / "small",
    )
    large, small = log(tmp_path / "large"), log(tmp_path / "small")
    assert len(large) == len(small) == 3
    for first, second in zip(large, small, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-4)


@pytest.mark.parametrize("change", [{"loop": {"epochs": 3}}, {"optim": {"lr": 0.5}}, {"seed": 1}])
def test_another_recipe_s_run_is_refused_and_left_alone(shapes, whole_run, change) -> None:
    before = {path.name: path.read_bytes() for path in whole_run.iterdir() if path.is_file()}
    with pytest.raises(CheckpointError, match=f"another recipe .{next(iter(change))}"):
        finetune.run(recipe(shapes, **change), whole_run)
    assert before == {p.name: p.read_bytes() for p in whole_run.iterdir() if p.is_file()}


def test_a_data_set_that_shrank_is_refused(shapes, tmp_path: Path) -> None:
    source = tmp_path / "train.json"
    data = json.loads((shapes / "captions_train.json").read_text())
    source.write_text(json.dumps(data))
    table = {"train": source, "images": shapes / "images"}
    finetune.run(recipe(shapes, data=table), tmp_path / "run")
    kept = {row["id"] for row in data["images"][:16]}
    rows = [row for row in data["annotations"] if row["image_id"] in kept]
    source.write_text(json.dumps({"images": data["images"][:16], "annotations": rows}))
    with pytest.raises(CheckpointError, match="a run of 12 steps, this recipe makes 4"):
        finetune.run(recipe(shapes, data=table), tmp_path / "run")


def test_what_moves_no_loss_may_change_while_a_run_is_under_way(shapes, tmp_path: Path) -> None:
    finetune.run(recipe(shapes), tmp_path)
    dev = {"dev": shapes / "captions_dev.json"}
    finetune.run(recipe(shapes, loop={"save_every": 3}, data=dev), tmp_path)
    assert Run(tmp_path).recipe.loop.save_every == 3


def test_a_share_of_one_file_is_held_out(shapes, tmp_path: Path) -> None:
    finetune.run(recipe(shapes, data={"dev_fraction": 0.3}), tmp_path)
    rows = log(tmp_path)
    assert len([row for row in rows if "dev/CIDEr-D" in row]) == 2
    assert len(rows) - 2 < 12  # fewer images, fewer steps than with all of them


def test_training_images_are_not_held_out_too(shapes, tmp_path: Path) -> None:
    both = {"dev": shapes / "captions_train.json"}
    with pytest.raises(DataError, match=r"48 images are in both data\.train and data\.dev"):
        finetune.run(recipe(shapes, data=both), tmp_path)


def test_more_batches_than_an_epoch_has_cannot_accumulate(shapes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loop\.accumulate = 7, but an epoch has 6 batches"):
        finetune.run(recipe(shapes, loop={"accumulate": 7}), tmp_path)


def test_two_cannot_train_in_one_folder(shapes, tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(CheckpointError, match="another process is training there"),
    ):
        finetune.run(recipe(shapes), tmp_path)


def test_a_run_reads_back_as_the_moving_average(whole_run) -> None:
    tensors, _ = load_checkpoint(whole_run / "last.safetensors")
    weight = Run(whole_run).captioner().bridge.project[1].weight
    name = "captioner.bridge.project.1.weight"
    assert torch.equal(weight, tensors[f"average.{name}"])
    assert not torch.equal(weight, tensors[f"objective.{name}"])
    # Embedding and head are one weight, of which the average knows one name.
    head = Run(whole_run).captioner().decoder.model.lm_head.weight
    name = "captioner.decoder.model.transformer.wte.weight"
    assert torch.equal(head, tensors[f"average.{name}"])
    assert not torch.equal(head, tensors[f"objective.{name}"])


def test_a_run_does_not_fit_another_architecture(shapes, whole_run, tmp_path: Path) -> None:
    changed = recipe(shapes, start=whole_run, decoder={"width": 48})
    with pytest.raises(CheckpointError, match=r"last\.safetensors: of another architecture: "):
        finetune.run(changed, tmp_path)


def test_a_folder_that_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no training run \(.*recipe.json is missing\)"):
        Run(tmp_path)


def test_a_damaged_checkpoint_names_itself(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, {"w": torch.arange(64.0)}, {"step": 3})
    tensors, state = load_checkpoint(path)
    assert state == {"step": 3} and torch.equal(tensors["w"], torch.arange(64.0))
    body = bytearray(path.read_bytes())
    body[-5] ^= 1
    path.write_bytes(body)
    with pytest.raises(CheckpointError, match=r"last\.safetensors: tensor w is damaged"):
        load_checkpoint(path)
    path.write_bytes(body[: len(body) // 2])
    with pytest.raises(CheckpointError, match=r"last\.safetensors: cannot read"):
        load_checkpoint(path)


def test_a_disk_that_refuses_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, {"w": torch.zeros(4)}, {"step": 1})
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(path, {"w": torch.ones(4)}, {"step": 2})
    assert load_checkpoint(path)[1] == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def _full(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_the_schedule_rises_and_falls() -> None:
    config = Optim(lr=1.0, warmup=0.1, final=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5, abs=0.01)
    assert rates[99] == pytest.approx(0.1, abs=0.001)
    assert max(rates) <= 1.0 and rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, 5, config) == 1.0  # a warm-up shorter than a step


def test_the_average_has_its_closed_form() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    average = MovingAverage(module, decay=0.5)
    expected = 0.0
    for step in range(1, 9):
        torch.nn.init.constant_(module.weight, float(step))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert average.shadow["weight"].item() == pytest.approx(expected, rel=1e-6)
    average.swap()
    assert module.weight.item() == pytest.approx(expected, rel=1e-6)
    average.swap()
    assert module.weight.item() == 8.0


def test_rates_and_decay_follow_the_parameter() -> None:
    module = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    optimizer = build_optimizer(module, Optim(weight_decay=0.1, scales={"encoder": 0.5}))
    found = {
        id(p): (group["scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found[id(module["encoder"].weight)] == (0.5, 0.1)
    assert found[id(module["encoder"].bias)] == (0.5, 0.0)
    assert found[id(module["head"].weight)] == (1.0, 0.1)


def test_it_overfits_eight_images(shapes, tmp_path: Path) -> None:
    data = json.loads((shapes / "captions_train.json").read_text())
    kept = {row["id"] for row in data["images"][:8]}
    first = {}
    for row in data["annotations"]:
        if row["image_id"] in kept:
            first.setdefault(row["image_id"], row)
    small = {
        **data,
        "images": [row for row in data["images"] if row["id"] in kept],
        "annotations": list(first.values()),
    }
    source = tmp_path / "eight.json"
    source.write_text(json.dumps(small))
    config = recipe(
        shapes,
        data={"train": source, "images": shapes / "images", "captions_per_image": 1},
        augment=Augment(),
        decoder={"width": 64, "heads": 4, "dropout": 0.0},
        objective={"label_smoothing": 0.0},
        optim=Optim(lr=3e-3, weight_decay=0.0),
        loop={"epochs": 80, "ema": 0.0, "evaluate_every": 1000, "save_every": 1000},
    )
    finetune.run(config, tmp_path / "run")
    table = {"model": tmp_path / "run", "data": source, "images": shapes / "images"}
    evaluate.run(evaluate.Config.model_validate(table), tmp_path)
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert figures["CIDEr-D"][0] == pytest.approx(10.0)


def test_a_frozen_encoder_may_look_once_at_each_view(shapes, tmp_path: Path) -> None:
    """Both have the same two views of every image in two epochs; the third repeats the first."""
    changes = {
        "objective": {"frozen": ["encoder"]},
        "loop": {"epochs": 3},
        "optim": {"lr": 0.02, "warmup": 0.0},
    }
    finetune.run(recipe(shapes, **changes), tmp_path / "anew")
    finetune.run(recipe(shapes, data={"encoded_views": 2}, **changes), tmp_path / "once")
    anew, once = ([row["loss"] for row in log(tmp_path / name)] for name in ("anew", "once"))
    steps = len(anew) // 3
    apart = [abs(first - second) for first, second in zip(anew, once, strict=True)]
    assert max(apart[: 2 * steps]) < 1e-5 < 1e-3 < max(apart[2 * steps :]), apart
    # The run's captioner looks at images as ever.
    captioner = Run(tmp_path / "once").captioner()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert captioner(images, torch.ones(2, 3, dtype=torch.long)).isfinite().all()


def test_an_encoder_that_is_trained_must_look_anew(shapes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="encoded_views = 2, but the encoder is trained"):
        finetune.run(recipe(shapes, data={"encoded_views": 2}), tmp_path)
