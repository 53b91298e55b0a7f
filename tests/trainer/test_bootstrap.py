"""Bootstrapping captions: where the filter cuts, what is written, and going on after a crash."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from objectives.test_pairs import pairs_recipe

from trainer.data import read_examples, write_coco
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.stages import _candidates, bootstrap, finetune
from trainer.stages._threshold import choose_threshold


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def filter_run(shapes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    finetune.run(pairs_recipe(shapes, "blip", loop={"epochs": 1, "ema": 0.0}), folder)
    return folder


def config_of(shapes: Path, run: Path, **changes) -> bootstrap.Config:
    """The drawings of dev are what people labelled; the others are to be captioned."""
    table = {
        "captioner": run,
        "labelled": {"data": shapes / "captions_dev.json"},
        "unlabelled": {"data": shapes / "images"},
        "web": {"data": shapes / "captions_train.json"},
        "threshold": 0.5,
        "batch_size": 20,
        "captions_per_image": 2,
    }
    return bootstrap.Config.model_validate(table | changes)


def test_the_threshold_is_the_lowest_that_is_precise_enough() -> None:
    true, false = np.array([0.9, 0.8, 0.7, 0.4]), np.array([0.75, 0.5, 0.3, 0.1])
    found = choose_threshold(true, false, precision=0.75, wrong=0.5)
    assert (found.value, found.precision, found.recall) == (0.7, 0.75, 0.75)
    # Were wrong captions rare, less of what passes would be wrong: 0.9 / (0.9 + 0.1 * 2 / 4).
    found = choose_threshold(true, false, precision=0.75, wrong=0.1)
    assert found.value == 0.4
    assert found.precision == pytest.approx(0.9 / 0.95)
    assert found.recall == 1
    with pytest.raises(DataError, match=r"no threshold reaches a precision of 0.9: the best is 0"):
        choose_threshold(false, true, precision=0.9, wrong=0.5)


def test_every_row_says_who_wrote_it_and_finetune_reads_them(
    shapes, filter_run, tmp_path: Path
) -> None:
    bootstrap.run(config_of(shapes, filter_run), tmp_path)
    kept, dropped = rows_of(tmp_path / "captions.csv"), rows_of(tmp_path / "dropped.csv")
    labelled = read_examples(shapes / "captions_dev.json")
    human = [row for row in kept if row["source"] == "human"]
    assert [row["caption"] for row in human] == [c for e in labelled for c in e.captions]
    assert {row["source"] for row in dropped} <= {"web", "synthetic"}
    assert all(float(row["match"]) < 0.5 for row in dropped)
    assert all(float(row["match"]) >= 0.5 for row in kept if row["source"] != "human")
    scored = [row for row in (*kept, *dropped) if row["source"] != "human"]
    people = {str(example.image.resolve()) for example in labelled}
    for source in ("web", "synthetic"):
        images = {row["image"] for row in scored if row["source"] == source}
        assert len(images) == 48 and not images & people
    assert sum(row["source"] == "web" for row in scored) == 48 * 5
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kept"]["human"] == 80
    assert sum(report["dropped"].values()) == len(dropped)
    assert (tmp_path / "dropped.html").exists() == bool(dropped)
    examples = read_examples(tmp_path / "captions.csv")
    assert {example.source for example in examples} == {row["source"] for row in kept}
    assert all(example.image.is_file() for example in examples)
    data = {"train": tmp_path / "captions.csv"}
    finetune.run(pairs_recipe(shapes, "mlm", data=data, loop={"epochs": 1}), tmp_path / "retrained")


def test_only_the_part_that_is_labelled_is_read(shapes, filter_run, tmp_path: Path) -> None:
    labelled = {"data": shapes / "captions_dev.json", "only": {"first": 2}}
    config = config_of(shapes, filter_run, labelled=labelled, web=None)
    assert len(config.labelled.read()) == 2
    bootstrap.run(config, tmp_path)
    human = [row for row in rows_of(tmp_path / "captions.csv") if row["source"] == "human"]
    people = {example.image.name for example in config.labelled.read()}
    assert {Path(row["image"]).name for row in human} == people


def test_a_killed_run_goes_on_and_ends_the_same(
    shapes, filter_run, tmp_path: Path, monkeypatch
) -> None:
    config = config_of(shapes, filter_run, web=None)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    bootstrap.run(config, whole)
    scored = (whole / bootstrap.SCORED).read_text()
    assert scored.count("\n") == 3
    killed.mkdir()
    (killed / "recipe.json").write_text((whole / "recipe.json").read_text())
    first, second, _ = scored.splitlines(keepends=True)
    (killed / bootstrap.SCORED).write_text(first + second[:50])
    drawn, draw = [], _candidates.Writer.captions

    def counted(self, examples, number):
        drawn.append(number)
        return draw(self, examples, number)

    monkeypatch.setattr(_candidates.Writer, "captions", counted)
    bootstrap.run(config, killed)
    assert drawn == [1, 2]
    for name in (bootstrap.SCORED, "captions.csv", "dropped.csv", "report.json"):
        assert (killed / name).read_text() == (whole / name).read_text(), name
    # A threshold may be changed afterwards; what was drawn may not.
    bootstrap.run(config.model_copy(update={"threshold": 0.0}), killed)
    assert drawn == [1, 2]
    assert not rows_of(killed / "dropped.csv")
    assert not (killed / "dropped.html").exists()
    with pytest.raises(CheckpointError, match=r"another recipe \(top_p: 0.9, here 0.5\)"):
        bootstrap.run(config.model_copy(update={"top_p": 0.5}), killed)


def test_other_images_do_not_go_on_from_what_is_there(shapes, filter_run, tmp_path: Path) -> None:
    source = tmp_path / "web.json"
    examples = read_examples(shapes / "captions_train.json")[:20]
    write_coco(examples, source, images=shapes / "images")
    web = {"data": source, "images": shapes / "images"}
    config = config_of(shapes, filter_run, web=web, unlabelled=None)
    bootstrap.run(config, tmp_path / "out")
    write_coco(examples[::-1], source, images=shapes / "images")
    with pytest.raises(CheckpointError, match="of other images or texts"):
        bootstrap.run(config, tmp_path / "out")


def test_a_filter_judged_by_what_it_learnt_is_warned_of(
    shapes, filter_run, tmp_path: Path, capsys
) -> None:
    labelled = {"data": shapes / "captions_train.json"}
    web = {"data": shapes / "captions_dev.json"}
    config = config_of(shapes, filter_run, labelled=labelled, web=web, unlabelled=None)
    bootstrap.run(config, tmp_path)
    assert "trained on 48 of the 48 images" in capsys.readouterr().out


def test_what_cannot_be_is_refused(shapes, filter_run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"name \[unlabelled\] images, \[web\] texts"):
        bootstrap.run(config_of(shapes, filter_run, web=None, unlabelled=None), tmp_path / "a")
    finetune.run(
        pairs_recipe(shapes, "lm", loop={"epochs": 1}).model_copy(update={"matcher": None}),
        tmp_path / "lm",
    )
    with pytest.raises(ConfigError, match=r"lm cannot filter: it has no \[matcher\]"):
        bootstrap.run(config_of(shapes, filter_run, filter=tmp_path / "lm"), tmp_path / "b")
