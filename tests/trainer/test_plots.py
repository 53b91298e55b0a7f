"""Curves of a run: a picture that opens, whatever the log holds; and a run that draws its own."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_captioner import VIT

from trainer.plots import plot_log
from trainer.run import PretrainRecipe
from trainer.runlog import RunLog, read_log
from trainer.stages import pretrain


def write(folder: Path, steps: int, *, every: int = 50) -> None:
    with RunLog(folder, total=steps) as log:
        for step in range(steps + 1):
            if step:
                values = {"loss": 5 / step + math.sin(step) / 20, "accuracy": 1 - 1 / step}
                log.scalars(step, {**values, "lr": 1e-3, "gradient_norm": 2.0})
            if step % every == 0:
                cider = 0.1 + step / 1e4
                bounds = {"probe/caption_low": cider - 0.02, "probe/caption_high": cider + 0.03}
                log.scalars(step, {"probe/rankme": 9.0, "probe/caption_cider": cider, **bounds})


def size(folder: Path) -> tuple[int, int]:
    with Image.open(folder / "curves.png") as image:
        image.load()
        assert image.format == "PNG"
        return image.size


@pytest.mark.parametrize("steps", [1, 60, 700])
def test_the_picture_opens_and_has_a_panel_for_each_figure(tmp_path: Path, steps: int) -> None:
    write(tmp_path, steps)
    plot_log(tmp_path)
    assert size(tmp_path) == (1320, 480)  # two rows of three; bounds have no panel of their own
    with Image.open(tmp_path / "curves.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    for row in range(2):
        for column in range(3):
            panel = pixels[row * 240 : row * 240 + 240, column * 440 : column * 440 + 440]
            assert (panel != 255).any(-1).mean() > 0.01
    assert list(tmp_path.glob("*.partial")) == []


def test_a_loss_alone_makes_one_panel(tmp_path: Path) -> None:
    with RunLog(tmp_path, total=3) as log:
        for step in (1, 2, 3):
            log.scalars(step, {"loss": 1 / step})
    plot_log(tmp_path)
    assert size(tmp_path) == (440, 240)


def test_what_is_not_a_number_leaves_a_gap(tmp_path: Path) -> None:
    with RunLog(tmp_path, total=300) as log:
        log.scalars(0, {"probe/spread": math.nan, "probe/rankme": math.nan})
        for step in range(1, 301):
            log.scalars(step, {"loss": math.nan if step == 7 else 1.0})
        log.scalars(300, {"probe/spread": math.nan, "probe/rankme": 3.0})
    plot_log(tmp_path)
    assert size(tmp_path) == (1320, 240)


def test_an_empty_log_draws_nothing(tmp_path: Path) -> None:
    plot_log(tmp_path)
    assert list(tmp_path.iterdir()) == []


def recipe(shapes: Path, **changes) -> PretrainRecipe:
    table = {
        "data": {"train": shapes / "captions_train.json", "images": shapes / "images"},
        "image": {"height": 32, "width": 32},
        "encoder": {**VIT, "depth": 1},
        "method": {"name": "simclr", "hidden": 32, "width": 16},
        "augment": {"crop": {"area": 0.7}, "flip": {}},
        "loop": {"epochs": 2, "batch_size": 16, "workers": 0, "save_every": 2},
        "probe": {
            "captioned": shapes / "captions_train.json",
            "dev": shapes / "captions_dev.json",
            "images": shapes / "images",
        },
        **changes,
    }
    return PretrainRecipe.model_validate(table)


def test_pretraining_measures_its_start_and_draws_its_curves(shapes, tmp_path: Path) -> None:
    pretrain.run(recipe(shapes), tmp_path)
    rows = read_log(tmp_path)
    measured = [row for row in rows if "probe/caption_cider" in row]
    assert [row["step"] for row in measured] == [0, 3, 6] and rows[0] == measured[0]
    assert size(tmp_path) == (1320, 720)  # loss, lr, gradient norm; four probes and the caption's
    drawn = (tmp_path / "curves.png").read_bytes()
    plot_log(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() == drawn  # the last epoch is in it


def test_pretraining_says_when_an_encoder_has_collapsed(
    shapes, tmp_path: Path, monkeypatch, capsys
) -> None:
    """The start itself is no alarm: random features may be of one kind."""
    measured = iter([(0.001, 40.0), (0.01, 40.0), (0.8, 9.0)])

    def measure(self, encoder) -> dict[str, float]:
        spread, rank = next(measured)
        other = {"probe/alignment": 0.1, "probe/uniformity": -2.0}
        return {"probe/rankme": rank, "probe/spread": spread, **other}

    monkeypatch.setattr(pretrain.Probes, "measure", measure)
    pretrain.run(recipe(shapes), tmp_path)
    said = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(said) == 2
    assert "epoch 1: all images have nearly the same features" in said[0]
    assert "epoch 2: the features differ in ever fewer directions" in said[1]


def test_a_run_that_goes_on_compares_with_its_start(
    shapes, tmp_path: Path, monkeypatch, capsys
) -> None:
    """RankMe falls to a quarter, which only the step 0 of the log can tell."""
    other = {"probe/spread": 0.8, "probe/alignment": 0.1, "probe/uniformity": -2.0}
    ranks = iter([40.0, 39.0, None, 9.0])

    def measure(self, encoder) -> dict[str, float]:
        rank = next(ranks)
        if rank is None:
            raise KeyboardInterrupt
        return {**other, "probe/rankme": rank}

    monkeypatch.setattr(pretrain.Probes, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(recipe(shapes), tmp_path)
    assert "WARNING" not in capsys.readouterr().out
    pretrain.run(recipe(shapes), tmp_path)
    assert "WARNING, epoch 2: the features differ in ever fewer" in capsys.readouterr().out
    body = (tmp_path / "log.jsonl").read_text()
    assert json.loads(body.splitlines()[0]) == {"step": 0, **other, "probe/rankme": 40.0}
