"""The comparison stage: merging, going on after a kill, and what it refuses."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_captioner import VIT

from trainer.config import validate
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.loop import TrainingLoop
from trainer.photos import usable_examples
from trainer.probes import Probes
from trainer.run import PretrainRecipe
from trainer.runlog import RunLog
from trainer.stages import _arms, _encoder_arms, compare, pretrain
from trainer.stages._encoder_arms import Arm, pretrain_recipe
from trainer.transforms import Augment, Crop, Flip, Grey

pytestmark = pytest.mark.usefixtures("no_curves")
SIMCLR = {"name": "simclr", "hidden": 32, "width": 16}
FROZEN = {"encoder": VIT}
TRAINED = {"encoder": VIT, "method": SIMCLR}


def recipe(shapes: Path, **changes: Any) -> compare.Config:
    table = {
        "seeds": [0, 1],
        "data": {"train": shapes / "captions_train.json"},
        "image": {"height": 32, "width": 32},
        "probe": {
            "captioned": shapes / "captions_train.json",
            "dev": shapes / "captions_dev.json",
        },
        "augment": {"crop": {"area": 0.5}, "flip": {}},
        "loop": {"epochs": 2, "batch_size": 16, "ema": 0.5, "workers": 0},
        "arms": {"frozen": FROZEN, "simclr": TRAINED},
    }
    for key, value in changes.items():
        merged = isinstance(value, dict) and key != "arms"
        table[key] = {**table.get(key, {}), **value} if merged else value
    return validate(compare.Config, table, "recipe")


@pytest.fixture(scope="module")
def folder(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that is done."""
    folder = tmp_path_factory.mktemp("comparison")
    compare.run(recipe(shapes), folder)
    return folder


def numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compare.json").read_text(encoding="utf-8"))


def test_every_arm_is_measured_before_and_after(folder: Path) -> None:
    found = numbers(folder)
    assert found["verdict"].startswith("Keep ") and found["baseline"] == "frozen"
    frozen, trained = found["arms"]["frozen"], found["arms"]["simclr"]
    assert [run["seed"] for run in frozen["runs"]] == [0, 1]
    for before, run in zip(frozen["runs"], trained["runs"], strict=True):
        assert before["budget"] is None and before["before"] == before["after"]
        assert run["before"] == before["before"]  # the same encoder, from the same seed
        assert run["after"] != run["before"]
        assert run["budget"].pop("seconds") > 0
        assert run["budget"] == {"images": 48, "epochs": 2, "batch_size": 16, "steps": 6}
        assert [epoch for epoch, _ in run["curve"]] == [0, 1, 2]
        assert len(run["cider_d_per_image"]) == 16
    page = (folder / "compare.html").read_text(encoding="utf-8")
    assert f"<title>{found['verdict'].replace('<', '&lt;')}" in page


def test_what_is_measured_is_the_encoder_that_the_run_kept(folder: Path) -> None:
    for seed, run in enumerate(numbers(folder)["arms"]["simclr"]["runs"]):
        lines = (folder / f"simclr/{seed}/log.jsonl").read_text().splitlines()
        logged = json.loads(lines[-1])
        for name in ("probe/rankme", "probe/caption_cider"):
            assert run["after"][name] == pytest.approx(logged[name], rel=1e-4)
        assert run["cider_d"] == pytest.approx(run["after"]["probe/caption_cider"])


def test_a_killed_comparison_goes_on_where_it_was(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    begun: list[Path] = []

    def killed_at_the_second(config: PretrainRecipe, out_dir: Path, *, probes: Probes) -> None:
        begun.append(out_dir)
        if len(begun) == 2:
            raise KeyboardInterrupt
        train(config, out_dir, probes=probes)

    train = pretrain.run
    monkeypatch.setattr(pretrain, "run", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        compare.run(recipe(shapes), tmp_path)
    assert not (tmp_path / "compare.json").exists()
    done = [tmp_path / "simclr/0" / name for name in ("last.safetensors", "log.jsonl")]
    result = json.loads((tmp_path / "simclr/0/result.json").read_text())
    times = [path.stat().st_mtime_ns for path in done]
    capsys.readouterr()
    compare.run(recipe(shapes), tmp_path)
    assert begun[2:] == [tmp_path / "simclr/1"]
    assert [path.stat().st_mtime_ns for path in done] == times
    first, second = numbers(tmp_path)["arms"]["simclr"]["runs"]
    assert first["budget"]["seconds"] == result["seconds"] != second["budget"]["seconds"]
    said = capsys.readouterr().out
    assert re.findall(r"run \d of \d: .*", said)[::3] == [
        "run 1 of 4: frozen, seed 0",
        f"run 4 of 4: simclr, seed 1, {result['seconds']:.0f} s left",
    ]


def test_the_time_of_a_run_that_was_killed_is_that_of_its_last_part(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, config = TrainingLoop._finish_epoch, recipe(shapes, seeds=[0])

    def killed(loop: TrainingLoop, epoch: int, log: RunLog) -> None:
        finish(loop, epoch, log)
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingLoop, "_finish_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        compare.run(config, tmp_path)
    monkeypatch.setattr(TrainingLoop, "_finish_epoch", finish)
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(_arms, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    compare.run(config, tmp_path)
    (run,) = numbers(tmp_path)["arms"]["simclr"]["runs"]
    assert run["budget"]["seconds"] == 20  # one epoch of two took ten

    (tmp_path / "simclr/0/result.json").unlink()  # killed between the last step and its result
    monkeypatch.setattr(_arms, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    compare.run(config, tmp_path)
    (same,) = numbers(tmp_path)["arms"]["simclr"]["runs"]
    assert same["budget"].pop("seconds") is None
    assert same["cider_d_per_image"] == run["cider_d_per_image"]


def test_the_same_arm_twice_is_no_difference_and_is_measured_once_an_epoch(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = {"one": TRAINED, "same": TRAINED, "frozen": FROZEN}
    measure, made = Probes.measure, set()
    calls = []

    def counted(probes: Probes, encoder: Any) -> dict[str, float]:
        calls.append(encoder)
        made.add(probes)
        return measure(probes, encoder)

    monkeypatch.setattr(Probes, "measure", counted)
    compare.run(recipe(shapes, seeds=[0], baseline="one", arms=arms), tmp_path)
    assert len(calls) == 3 + 3 + 1 and len(made) == 1
    found = numbers(tmp_path)
    assert found["arms"]["same"]["difference"] == {"value": 0, "low": 0, "high": 0}
    assert found["arms"]["same"]["p_value"] == 1


def test_an_arm_lays_its_keys_over_the_shared_tables(shapes: Path) -> None:
    changes = {
        "augment": {"crop": {"area": 0.8}},
        "second_view": {"grey": {"probability": 1.0}},
        "optim": {"lr": 0.5},
    }
    arm = {"encoder": VIT, "method": SIMCLR, **changes, "loop": {"batch_size": 8}}
    tables = recipe(shapes, optim={"warmup": 0.25}, arms={"own": arm}).model_dump()
    config = validate(_encoder_arms.Config, tables, "recipe")
    made = pretrain_recipe(config, "own", validate(Arm, arm, "own"), 7)
    assert (made.seed, made.loop.epochs, made.loop.batch_size) == (7, 2, 8)
    assert made.augment == Augment(crop=Crop(area=0.8), flip=Flip())
    assert (made.optim.lr, made.optim.warmup) == (0.5, 0.25)
    assert made.second_view == Augment(grey=Grey(probability=1.0))
    assert (made.method, made.encoder, made.probe) == (SIMCLR, VIT, config.probe)


def test_a_run_of_another_recipe_or_of_other_images_is_not_taken_over(
    shapes: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"simclr/0: holds a run of another recipe \(loop"):
        compare.run(recipe(shapes, loop={"epochs": 3}), folder)
    monkeypatch.setattr(_encoder_arms, "usable_examples", lambda found: usable_examples(found)[:-1])
    with pytest.raises(CheckpointError, match=r"simclr/0: learnt from 48 images, now .* 47"):
        compare.run(recipe(shapes), folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {}}, r"0 arm\(s\); a comparison needs two"),
        ({"arms": {"frozen": FROZEN}}, r"1 arm\(s\); a comparison needs two"),
        ({"arms": {"frozen": FROZEN, "../a": TRAINED}}, r"arm '\.\./a': its runs get a folder"),
        ({"arms": {"frozen": FROZEN, "a.b": TRAINED}}, r"arm 'a\.b': its runs get a folder"),
        ({"arms": {"frozen": FROZEN, "": TRAINED}}, r"arm '': its runs get a folder"),
        ({"arms": {"a": TRAINED, "b": TRAINED}}, "0 of the arms have no method; set baseline"),
        (
            {"arms": {"a": FROZEN, "b": FROZEN}},
            "2 of the arms have no method; set baseline .* a, b",
        ),
        ({"baseline": "frosen"}, "baseline = 'frosen'; the arms are frozen, simclr"),
        ({"seeds": [1, 1]}, r"seeds = \[1, 1\]: one is there twice"),
        ({"seeds": []}, "seeds: .*at least 1 item"),
        ({"probe": {"captioned": None}}, "name probe.captioned, .* and probe.dev"),
        ({"probe": {"dev": None}}, "name probe.captioned, .* and probe.dev"),
    ],
)
def test_a_recipe_that_compares_nothing_is_refused(
    shapes: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare.run(recipe(shapes, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"method": SIMCLR}, "arms.arm: encoder: field required"),
        ({**TRAINED, "epochs": 3}, "arms.arm: unknown key 'epochs'; the keys are augment, enc"),
        ({**TRAINED, "image": {"height": 64}}, "arms.arm: unknown key 'image'"),
        ({**TRAINED, "loop": {"epoch": 3}}, r"arms.arm: unknown key 'loop.epoch'; the keys are"),
        ({**TRAINED, "second_view": {"x": 3}}, r"arms.arm: unknown key 'second_view.x'"),
        ({**TRAINED, "method": {"name": "simcrl"}}, "no methods called 'simcrl'"),
        ({**TRAINED, "encoder": {**VIT, "widht": 3}}, "encoders/timm_vit: unknown key 'widht'"),
        (
            {**FROZEN, "optim": {"lr": 0.1}},
            r"arms.arm: without a method .* \['optim'\] mean nothing",
        ),
    ],
)
def test_a_wrong_arm_is_refused_before_any_is_trained(
    shapes: Path, tmp_path: Path, arm: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare.run(recipe(shapes, arms={"first": TRAINED, "arm": arm}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_methods_that_read_captions_may_not_have_read_dev_s(shapes: Path, tmp_path: Path) -> None:
    data = {"train": shapes / "captions_dev.json"}
    arms = {"frozen": FROZEN, "clip": {"encoder": VIT, "method": {"name": "clip"}}}
    with pytest.raises(DataError, match=r"16 images are in both data\.train with captions and"):
        compare.run(recipe(shapes, data=data, arms=arms), tmp_path)


def test_pixels_of_dev_may_be_learnt_from_but_the_page_says_so(
    shapes: Path, tmp_path: Path
) -> None:
    compare.run(recipe(shapes, data={"train": shapes / "captions_dev.json"}, seeds=[0]), tmp_path)
    assert any(note.startswith("16 images of dev are also") for note in numbers(tmp_path)["notes"])


def test_captions_that_say_nothing_of_an_image_decide_nothing(shapes: Path, tmp_path: Path) -> None:
    dev = tmp_path / "dev.csv"
    image = next((shapes / "images").iterdir())
    dev.write_text(f"image,caption\n{image},a red circle\n")
    with pytest.raises(DataError, match=r"dev\.csv: CIDEr-D says nothing of its 1 captioned image"):
        compare.run(recipe(shapes, probe={"dev": dev}), tmp_path / "out")
