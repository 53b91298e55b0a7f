"""The stage that picks images: what counts as labelled, what is written, what is refused."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from tiny_captioner import GPT2, VIT

from trainer import feature_store
from trainer.__main__ import main
from trainer.config import validate
from trainer.data import read_examples
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.run import Recipe
from trainer.stages import acquire, finetune


def config_of(images: Path, **keys: Any) -> acquire.Config:
    table = {
        "images": images,
        "encoder": VIT,
        "image": {"height": 32, "width": 32},
        "method": {"name": "kcenter"},
        "count": 5,
    }
    return validate(acquire.Config, table | keys, "recipe")


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "picks.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def picked(folder: Path) -> list[str]:
    return [row["image"] for row in rows_of(folder)]


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture
def photos(shapes: Path, tmp_path: Path) -> Path:
    """Twelve drawings in a folder and one below it, the first two with captions beside them."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, example in enumerate(read_examples(shapes / "images")[:12]):
        below = folder / "more" if number > 8 else folder
        shutil.copy(example.image, below / example.image.name)
        if number < 2:
            (folder / example.image.name).with_suffix(".txt").write_text("a drawing\n")
    return folder


@pytest.fixture(scope="module")
def model(shapes: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    table = {
        "data": {"train": shapes / "captions_train.json", "captions_per_image": 1},
        "image": {"height": 32, "width": 32},
        "tokenizer": {"vocab_size": 300},
        "encoder": VIT,
        "bridge": {"name": "cross_attention", "layers": 0},
        "decoder": {**GPT2, "max_length": 20},
        "objective": {"name": "lm"},
        "generation": {"num_beams": 2, "max_new_tokens": 6},
        "loop": {"epochs": 1, "batch_size": 16, "workers": 0},
    }
    finetune.run(validate(Recipe, table, "recipe"), folder)
    return folder


def test_the_table_and_the_sheet_say_the_same(photos: Path, tmp_path: Path) -> None:
    acquire.run(config_of(photos), tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert {row["method"] for row in rows} == {"kcenter"}
    assert all((photos / row["image"]).is_file() for row in rows)
    assert not {"00000.png", "00001.png"} & set(picked(tmp_path / "out"))
    assert all(row["reason"].startswith("the farthest from everything") for row in rows)
    assert all(row["proposal"] == "" for row in rows)
    # Another stage reads them as images without captions.
    examples = read_examples(tmp_path / "out/picks.csv", images=photos)
    assert all(one.image.is_file() and not one.captions for one in examples)
    page = (tmp_path / "out/picks.html").read_text(encoding="utf-8")
    assert re.findall(r'<p class="file">(.*?)</p>', page) == picked(tmp_path / "out")
    assert re.findall(r'<p class="reason">(.*?)</p>', page) == [row["reason"] for row in rows]
    assert not re.search(r'(?:src|href)="(?!data:)|<script', page)
    found = report(tmp_path / "out")
    assert (found["images"], found["labelled"], found["picked"]) == (12, 2, 5)
    assert 0 < found["mean_distance"] < found["mean_distance_by_chance"]
    assert found["mean_distance"] < found["largest_distance"]


def test_names_below_the_folder_keep_their_folder(photos: Path, tmp_path: Path) -> None:
    acquire.run(config_of(photos, count=10), tmp_path / "out")
    assert {name for name in picked(tmp_path / "out") if "/" in name} == {
        f"more/{number:05d}.png" for number in (9, 10, 11)
    }


def test_a_second_round_picks_others_and_encodes_nothing(
    photos: Path, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "out"
    acquire.run(config_of(photos), out)
    first = picked(out)
    labels = tmp_path / "labels.csv"
    lines = [f'{name},"a drawing, of shapes",human' for name in first]
    lines.append("00002.png,a guess,synthetic")  # what nobody has read is no label
    labels.write_text("\n".join(["image,caption,source", *lines]))
    monkeypatch.delattr(feature_store, "pooled_features")
    acquire.run(config_of(photos, labelled=[labels]), out)
    assert not set(first) & set(picked(out))
    assert report(out)["labelled"] == 7
    acquire.run(config_of(photos), out)
    assert picked(out) == first


def test_rounds_in_other_folders_may_share_features(
    photos: Path, tmp_path: Path, monkeypatch
) -> None:
    shared = tmp_path / "shared"
    acquire.run(config_of(photos, features=shared), tmp_path / "one")
    monkeypatch.delattr(feature_store, "pooled_features")
    acquire.run(config_of(photos, features=shared, method={"name": "random"}), tmp_path / "two")
    assert (tmp_path / "two" / "picks.csv").exists()
    assert not (tmp_path / "one" / "features").exists()


def test_near_duplicates_of_labelled_images_and_of_each_other_are_left_out(
    photos: Path, tmp_path: Path
) -> None:
    with Image.open(photos / "00000.png") as labelled, Image.open(photos / "00005.png") as other:
        labelled.resize((48, 48)).save(photos / "smaller.jpg", quality=90)
        other.resize((64, 64)).save(photos / "larger.png")
    acquire.run(config_of(photos, count=10), tmp_path / "out")
    names = set(picked(tmp_path / "out"))
    assert "smaller.jpg" not in names
    assert len(names & {"00005.png", "larger.png"}) == 1
    assert report(tmp_path / "out")["near_duplicates"] == 2


def test_labels_of_images_elsewhere_are_named_and_count(
    photos: Path, tmp_path: Path, capsys
) -> None:
    other = tmp_path / "other.png"
    shutil.copy(photos / "more/00010.png", other)
    labels = tmp_path / "labels.csv"
    labels.write_text(
        f"image,caption\n{other},a drawing\n00003.png,a drawing\ngone.png,a drawing\n"
    )
    acquire.run(config_of(photos, count=8, labelled=[labels]), tmp_path / "out")
    said = capsys.readouterr().out
    assert f"labels.csv: 2 of its 3 labelled images are not among {photos}, such as {other}" in said
    assert f"{photos / 'gone.png'}: no such file" in said
    names = picked(tmp_path / "out")
    assert not {"00003.png", "more/00010.png", str(other)} & set(names)
    assert report(tmp_path / "out")["images"] == 13


def test_a_data_set_in_a_file(shapes: Path, tmp_path: Path) -> None:
    """Names are relative to the folder of images; every image of it has captions."""
    with pytest.raises(DataError, match="every image is labelled"):
        acquire.run(config_of(shapes / "captions_dev.json"), tmp_path / "out")
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"{number:05d}.png" for number in range(20)))
    labels = [shapes / "captions_dev.json"]
    config = config_of(names, folder=shapes / "images", labelled=labels, count=4)
    acquire.run(config, tmp_path / "out")
    assert sorted(picked(tmp_path / "out")) == [f"{number:05d}.png" for number in range(16, 20)]


@pytest.mark.parametrize("method", ["uncertainty", "badge", "schedule"])
def test_a_captioner_is_asked_and_proposes(
    method: str, photos: Path, model: Path, tmp_path: Path
) -> None:
    table = {"name": method}
    if method == "schedule":
        table |= {"typical_until": 0, "spread_until": 0}
    config = config_of(photos, method=table, model=model, encoder=None, image=None)
    for folder in ("one", "two"):
        acquire.run(config, tmp_path / folder)
    rows = rows_of(tmp_path / "one")
    assert rows == rows_of(tmp_path / "two")
    assert {row["method"] for row in rows} == {method.replace("schedule", "badge")}
    assert all(row["proposal"] for row in rows)
    assert len({row["score"] for row in rows}) > 1
    page = (tmp_path / "one/picks.html").read_text(encoding="utf-8")
    assert page.count('<p class="proposal">') == 5


def test_the_encoder_of_a_run_is_the_run_s(photos: Path, model: Path, tmp_path: Path) -> None:
    """The same as by its weights in a table, and another than a random one."""
    table = {**VIT, "weights": str(model)}
    acquire.run(config_of(photos, encoder=model, image=None), tmp_path / "run")
    acquire.run(config_of(photos, encoder=table), tmp_path / "table")
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "table")
    (one,), (other,) = ((tmp_path / n / "features").iterdir() for n in ("run", "table"))
    assert one.name == other.name  # of the same encoder
    acquire.run(config_of(photos), tmp_path / "random")
    assert rows_of(tmp_path / "random") != rows_of(tmp_path / "run")


def test_text_is_escaped(photos: Path, tmp_path: Path) -> None:
    nasty = photos / "<b>&.png"
    (photos / "00004.png").rename(nasty)
    acquire.run(config_of(photos, count=10, sheet_images=10), tmp_path / "out")
    page = (tmp_path / "out/picks.html").read_text(encoding="utf-8")
    assert '<p class="file">&lt;b&gt;&amp;.png</p>' in page and "<b>" not in page
    assert nasty.name in picked(tmp_path / "out")


def test_the_sheet_may_show_fewer(photos: Path, tmp_path: Path) -> None:
    acquire.run(config_of(photos, sheet_images=2), tmp_path / "out")
    page = (tmp_path / "out/picks.html").read_text(encoding="utf-8")
    assert page.count("<article") == 2 and "the first 2 of 5 images" in page


def test_what_cannot_be_is_refused_in_one_line(photos: Path, tmp_path: Path) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    no_captions = tmp_path / "labels.csv"
    no_captions.write_text("image,caption\n00002.png,\n")
    for error, message, config in (
        (DataError, "holds no images", config_of(empty)),
        (ConfigError, "11 images to pick, but 10 are left", config_of(photos, count=11)),
        (ConfigError, "no encoder to compare images by", config_of(photos, encoder=None)),
        (ConfigError, r"goes with \[image\] height and width", config_of(photos, image=None)),
        (CheckpointError, "no run with an encoder", config_of(photos, encoder=empty)),
        (CheckpointError, "no training run", config_of(photos, model=empty)),
        (ConfigError, "no acquisition called", config_of(photos, method={"name": "best"})),
        (ConfigError, "badge asks a captioner", config_of(photos, method={"name": "badge"})),
        (DataError, "none of its images has a caption", config_of(photos, labelled=[no_captions])),
    ):
        with pytest.raises(error, match=message):
            acquire.run(config, out)
    assert not (out / "picks.csv").exists()
    with FileLock(out / ".lock"), pytest.raises(CheckpointError, match="another process"):
        acquire.run(config_of(photos), out)


def test_the_recipe_runs_as_it_stands(shapes: Path, tmp_path: Path, capsys) -> None:
    images = f"images={shapes / 'images'}"
    labels = f'labelled=["{shapes / "captions_dev.json"}"]'
    command = ["acquire", "trainer/recipes/tiny/acquire.toml", images, labels, "count=6"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert [row["method"] for row in rows] == ["typiclust"] * 6
    assert not {f"{number:05d}.png" for number in range(16)} & {row["image"] for row in rows}
    assert np.all(np.array([float(row["typicality"]) for row in rows]) > 0)
    assert "with as many by chance" in capsys.readouterr().out
