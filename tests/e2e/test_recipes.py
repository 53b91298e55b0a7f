"""The shipped model's recipes on a few drawings: the real sizes, the real stages."""

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from exports.bundle import Bundle
from exports.manifest import Generation
from serving.captioner import Captioner as Served
from serving.params import Params
from trainer.checkpoint import load_checkpoint
from trainer.compression import round_weights
from trainer.config import read_recipe, validate
from trainer.decoding import TorchSteps, beam_search
from trainer.run import Run
from trainer.stages import export, finetune, shapecaps

RECIPES = Path("trainer/recipes")


def load(stage, path: str, *overrides: str):
    return validate(stage.Config, read_recipe(RECIPES / path, overrides), path)


@pytest.mark.slow
def test_the_shipped_model_s_recipes_end_in_a_bundle_that_serves(tmp_path: Path) -> None:
    shapes = tmp_path / "shapes"
    shapecaps.run(shapecaps.Config(images=72, side=192, dev=8), shapes)
    train, dev = shapes / "captions_train.json", shapes / "captions_dev.json"
    data = (f"data.train={train}", f"data.dev={dev}", "data.dev_images=8")
    data += ("loop.epochs=2", "loop.batch_size=32")
    finetune.run(load(finetune, "flickr8k/base.toml", *data), tmp_path / "base")
    # After so few steps captions are nonsense, and other nonsense is no reward gamed.
    nonsense = ("objective.budget.length=100", "objective.budget.repetition=1")
    second = (*data, *nonsense, f"start={tmp_path / 'base'}", "loop.epochs=1")
    finetune.run(load(finetune, "flickr8k/scst.toml", *second), tmp_path / "scst")
    run = (f"run={tmp_path / 'scst'}", f"data={dev}", "parity_images=8", "golden=[]", "blend=0.6")
    # Eight drawings say nothing of quality: the budget is for thousands.
    integers = (f"int8.data={train}", "int8.calibration_images=16", "int8.budget=10")
    recipe = load(export, "flickr8k/export.toml", *run, *integers)
    export.run(recipe, tmp_path / "int8")
    whole = Bundle.open(tmp_path / "int8/bundle")
    assert sum(len(body) for body in whole.files().values()) < 16.5e6
    assert "int8 - float32" in whole.manifest.metrics
    Served.load(tmp_path / "int8/bundle", threads=2)  # captions its golden pictures as promised
    export.run(recipe.model_copy(update={"int8": None}), tmp_path / "scst")

    bundle = Bundle.open(tmp_path / "scst/bundle")
    assert sum(len(body) for body in bundle.files().values()) < 23e6
    assert bundle.manifest.provenance["recipe"]["start"]["objective"]["name"] == "lm"
    served = Served.load(tmp_path / "scst/bundle", threads=2)
    reference = TorchSteps(round_weights(export.blended(Run(tmp_path / "scst"), recipe.blend)))
    spec = bundle.manifest.image
    size = (16, spec.height, spec.width, 3)
    pixels = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    generation = Generation(num_captions=4)
    ours = beam_search(reference, pixels, generation)
    theirs = served.caption_batch(pixels, [Params.of(generation)] * len(pixels))
    assert [[h.token_ids for h in one] for one in ours] == [
        [c.token_ids for c in one] for one in theirs
    ]


@pytest.mark.slow
def test_a_run_survives_being_killed_again_and_again(tmp_path: Path) -> None:
    shapecaps.run(shapecaps.Config(images=96, side=32, dev=16), tmp_path)
    overrides = [
        f"data.train={tmp_path / 'captions_train.json'}",
        f"data.dev={tmp_path / 'captions_dev.json'}",
        *("image.height=32", "image.width=32", "loop.save_every=2", "loop.epochs=12"),
    ]
    command = [sys.executable, "-m", "trainer", "finetune", str(RECIPES / "tiny/gpt2.toml")]
    subprocess.run([*command, *overrides, "--out", str(tmp_path / "whole")], check=True)
    draw, steps = random.Random(0), _steps(tmp_path / "whole")
    target, kills = 0, 0
    while (target := target + draw.randint(2, 6)) < steps:
        process = subprocess.Popen([*command, *overrides, "--out", str(tmp_path / "killed")])
        while process.poll() is None and _steps(tmp_path / "killed") < target:
            time.sleep(0.002)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 3
    subprocess.run([*command, *overrides, "--out", str(tmp_path / "killed")], check=True)
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    whole, killed = (
        load_checkpoint(tmp_path / name / "last.safetensors")[0] for name in ("whole", "killed")
    )
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def _steps(folder: Path) -> int:
    log = folder / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0
