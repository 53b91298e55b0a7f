"""Two workers learn what one learns from the same batches."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pretraining import CNN, VIT, recipe

from trainer.stages import pretrain

RUNS = {
    "simclr in chunks": ({"name": "simclr", "hidden": 64, "chunk": 8}, VIT),
    "simclr on BatchNorm": ({"name": "simclr", "hidden": 64}, CNN),
    "moco v2": ({"name": "moco", "variant": "v2", "hidden": 64}, VIT),
    "moco v3": ({"name": "moco", "variant": "v3", "hidden": 64}, VIT),
    "clip": ({"name": "clip", "text": {"width": 32, "layers": 1}}, VIT),
}
WORKER = """
import json, pathlib, sys, torch, torch.distributed as dist
import trainer
from trainer.run import PretrainRecipe
from trainer.stages import pretrain
torch.set_num_threads(1)
pretrain.plot_log = lambda folder: None  # takes longer than all else
rank, store, recipes, out = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
for name, recipe in json.loads(recipes).items():
    pretrain.run(PretrainRecipe.model_validate(recipe), pathlib.Path(out) / name)
dist.destroy_process_group()
"""


def steps(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def recipes(shapes: Path) -> dict[str, pretrain.Config]:
    # Adam makes a step of a gradient that is nothing but rounding; LARS's are in proportion.
    changes = {"optim": {"name": "lars", "lr": 0.3}, "loop": {"epochs": 1}}
    return {
        name: recipe(shapes, method, **changes).model_copy(update={"encoder": encoder})
        for name, (method, encoder) in RUNS.items()
    }


@pytest.mark.slow
@pytest.mark.ray
def test_ray_train_starts_the_workers(shapes: Path, tmp_path: Path) -> None:
    table = recipes(shapes)["simclr on BatchNorm"].model_dump(mode="json", exclude_none=True)
    keys = ("data", "image", "encoder", "method", "optim", "loop", "probe")
    path = tmp_path / "recipe.toml"
    path.write_text("".join(f"{key} = {toml(table[key])}\n" for key in keys), encoding="utf-8")
    for workers in ("1", "2"):
        command = [sys.executable, "-m", "trainer", "pretrain", str(path), "--workers", workers]
        command += ["--out", str(tmp_path / workers)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, found = steps(tmp_path / "1"), steps(tmp_path / "2")
    assert found[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-5)
    assert found[-1]["loss"] == pytest.approx(alone[-1]["loss"], rel=1e-3)


def toml(value: Any) -> str:
    """A value as TOML; tables in a line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


@pytest.fixture(scope="module")
def together(shapes, tmp_path_factory) -> Path:
    """All runs by two workers, one after the other."""
    folder = tmp_path_factory.mktemp("two")
    tables = {
        name: one.model_dump(mode="json", exclude_none=True)
        for name, one in recipes(shapes).items()
    }
    command = [sys.executable, "-c", WORKER]
    given = [str(folder / "store"), json.dumps(tables), str(folder)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), *given],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        said, _ = worker.communicate(timeout=240)
        assert worker.returncode == 0, said
    return folder


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("name", RUNS)
def test_two_workers_learn_what_one_does(name: str, together, shapes, tmp_path: Path) -> None:
    pretrain.run(recipes(shapes)[name], tmp_path)
    alone, found = steps(tmp_path), steps(together / name)
    assert len(alone) == len(found) == 3
    for first, second in zip(alone, found, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
        assert second["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-4)
