"""`report` on what the other stages wrote, and on what they may have left out."""

import json
import math
from pathlib import Path

import numpy as np
import pretraining
import pytest
from test_loop import recipe

from trainer.data import read_examples, write_coco
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.metrics import cider
from trainer.stages import evaluate, finetune, pretrain, report
from trainer.stages._evaluated import read_evaluation
from trainer.stages._learnt import read_learnt
from trainer.stages._trained import read_trained


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory) -> Path:
    """A run on 24 drawings by two authors, and its evaluation on the 16 of dev."""
    folder = tmp_path_factory.mktemp("runs")
    rows = ["image\tcaption\tsource"]
    for number, example in enumerate(read_examples(shapes / "captions_train.json")[:24]):
        source = "synthetic" if number % 3 == 0 else "human"
        rows += [f"{example.image}\t{caption}\t{source}" for caption in example.captions]
    (folder / "train.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    data = {"train": folder / "train.tsv", "dev": shapes / "captions_dev.json"}
    finetune.run(recipe(shapes, data=data), folder / "tiny")
    evaluated(shapes, folder / "tiny")
    return folder / "tiny"


def evaluated(shapes: Path, run: Path) -> None:
    table = {
        "model": run,
        "data": shapes / "captions_dev.json",
        "neighbours": shapes / "captions_train.json",
        "generation": {"num_beams": 1, "max_new_tokens": 8},
    }
    evaluate.run(evaluate.Config.model_validate(table), run / "evaluation")


def reported(out: Path, **table) -> dict:
    report.run(report.Config.model_validate(table), out)
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def written(folder: Path, scores, images, *, source: str = "human", **changes) -> Path:
    """An evaluation's folder with such CIDEr-D."""
    folder.mkdir(parents=True)
    lines = [
        {
            "image": image.name,
            "file": str(image),
            "caption": "a dog",
            "score": -1.0,
            "cider_d": None if math.isnan(value) else float(value),
            "token_ids": [1],
            "references": ["a dog", "one dog"],
            "source": source,
        }
        for image, value in zip(images, scores, strict=True)
    ]
    body = "".join(json.dumps(line | changes) + "\n" for line in lines)
    (folder / "captions.jsonl").write_text(body)
    mean = float(np.mean(scores))
    figures = {"CIDEr-D": [mean, mean - 0.1, mean + 0.1], "distinct": [None, None, None]}
    (folder / "figures.json").write_text(json.dumps({"model": folder.name, "figures": figures}))
    return folder


def test_an_evaluation_keeps_what_a_report_needs(shapes, trained: Path) -> None:
    found = read_evaluation(trained / "evaluation")
    dev = read_examples(shapes / "captions_dev.json")
    assert found.images == [example.image.resolve() for example in dev]
    assert [row.references for row in found.rows] == [example.captions for example in dev]
    assert found.sources == {"human": 16 * 5}
    references = [example.captions for example in dev]
    captions = [row.caption for row in found.rows]
    scores = cider.score(references, captions).per_image[:, 0]
    assert found.scores == pytest.approx(scores, abs=1e-5)
    assert found.figures["CIDEr-D"].value == pytest.approx(scores.mean(), abs=1e-4)
    assert found.copied is not None
    assert found.copied_figures["CIDEr-D"].value == pytest.approx(found.copied.mean(), abs=1e-4)
    assert list(found.figures) == ["CIDEr-D", "BLEU-4", "ROUGE-L", "distinct"]


def test_a_run_records_what_it_learnt_from(shapes, trained: Path, capsys) -> None:
    found = read_learnt(trained)
    assert found is not None
    assert (found.images, found.captions) == (24, {"human": 80, "synthetic": 40})
    assert found.seconds is not None and found.seconds > 0
    before = (trained / "learnt.json").read_text()
    data = {"train": trained.parent / "train.tsv", "dev": shapes / "captions_dev.json"}
    finetune.run(recipe(shapes, data=data), trained)  # there is nothing left to do
    assert (trained / "learnt.json").read_text() == before


def test_the_page_of_a_run(trained: Path, tmp_path: Path, capsys) -> None:
    found = reported(tmp_path, run=trained, evaluation=trained / "evaluation", sheet_images=5)
    assert [step["name"] for step in found["steps"]] == ["copied captions", "tiny"]
    difference = found["steps"][1]["difference"]
    read = read_evaluation(trained / "evaluation")
    assert read.copied is not None
    gain = (read.scores - read.copied).mean()
    assert difference["interval"]["value"] == pytest.approx(gain)
    assert difference["against"] == "copied captions"
    assert found["overall"] == difference
    assert found["provenance"] == {
        "learnt": {"human": 80, "synthetic": 40},
        "images": 24,
        "test": {"human": 80},
        "test_images": 16,
    }
    assert found["warnings"] == ["16 test images are few: intervals are wide, and rough."]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<article") == 5
    assert "Trained on 24 images with 120 captions, 2 epochs (timm_vit" in page
    assert "Loss</figcaption>" in page and "CIDEr-D on held-out images" in page
    said = capsys.readouterr().out
    assert said.startswith(found["verdict"]) and "WARNING: 16 test images are few" in said


def test_a_run_alone_and_an_evaluation_alone(trained: Path, tmp_path: Path) -> None:
    found = reported(tmp_path / "run", run=trained)
    assert found["verdict"] == "The captioner was not measured."
    assert found["provenance"]["test"] == {}
    found = reported(tmp_path / "evaluation", evaluation=trained / "evaluation", name="mine")
    assert found["verdict"].startswith("The captioner reaches CIDEr-D ")
    assert [step["name"] for step in found["steps"]] == ["copied captions", "mine"]


def test_an_encoder_is_told_by_its_probe(shapes, tmp_path: Path, no_curves) -> None:
    probe = {"captioned": shapes / "captions_train.json", "dev": shapes / "captions_dev.json"}
    table = pretraining.recipe(shapes, {"name": "simclr"}, probe=probe)
    pretrain.run(table, tmp_path / "simclr")
    learnt = read_learnt(tmp_path / "simclr")
    assert learnt is not None and learnt.captions == {} and learnt.images == 48
    found = reported(tmp_path, run=tmp_path / "simclr")
    assert found["verdict"].startswith("The encoder reaches CIDEr-D of the caption probe ")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Trained on 48 images without captions, 2 epochs (timm_vit, simclr)." in page
    assert "RankMe" in page


def test_earlier_steps_are_compared_in_their_order(shapes, tmp_path: Path) -> None:
    images = [example.image.resolve() for example in read_examples(shapes / "captions_train.json")]
    base = np.random.default_rng(0).normal(1, 0.3, len(images))
    folders = {
        name: written(tmp_path / name, base + gain, images)
        for name, gain in (("one", 0.0), ("two", 0.5), ("three", 0.5))
    }
    other = written(tmp_path / "other", base[:10], images[:10])
    before = [{"name": name, "evaluation": folders[name]} for name in ("one", "two")]
    before.insert(1, {"name": "other", "evaluation": other})
    found = reported(tmp_path / "out", evaluation=folders["three"], before=before)
    one, other_step, two, three = found["steps"]
    assert one["difference"] is None and other_step["difference"] is None
    assert two["difference"]["verdict"] == "better" and two["difference"]["against"] == "one"
    assert three["difference"]["verdict"] == "no difference seen"
    assert three["difference"]["against"] == "two"
    assert found["overall"]["interval"]["value"] == pytest.approx(0.5)
    assert found["overall"]["against"] == "one"
    assert found["warnings"][0].startswith("other was evaluated on other images than the last step")


def test_the_budget_is_of_the_runs_at_several_counts(shapes, tmp_path: Path) -> None:
    images = [example.image.resolve() for example in read_examples(shapes / "captions_train.json")]
    base = np.random.default_rng(0).normal(0, 0.3, len(images))
    counts = [
        {
            "labels": labels,
            "evaluations": [
                written(tmp_path / f"{labels}-{seed}", base + math.log(labels) + seed / 50, images)
                for seed in range(2)
            ],
        }
        for labels in (25, 50, 100)
    ]
    last = counts[-1]["evaluations"][0]
    budget = {"counts": counts, "more": 40, "worthwhile": 0.1}
    found = reported(tmp_path / "out", evaluation=last, budget=budget)
    assert found["budget"]["more"] == 40
    gain = found["budget"]["gain"]
    assert 0 < gain["low"] < math.log(1.4) < gain["high"]
    assert "40 more labels: about +0." in found["verdict"]
    other = written(tmp_path / "other", base[:10], images[:10])
    counts[0]["evaluations"].append(other)
    with pytest.raises(DataError, match=r"other: of other images than .*25-0; evaluate all label"):
        reported(tmp_path / "out", evaluation=last, budget=budget)


def test_it_warns_of_figures_that_flatter(shapes, trained: Path, tmp_path: Path) -> None:
    seen = [example.image.resolve() for example in read_examples(trained.parent / "train.tsv")]
    other = tmp_path / "gone.png"
    folder = written(tmp_path / "else", np.ones(25), [*seen[:24], other], source="synthetic")
    found = reported(tmp_path / "out", run=trained, evaluation=folder)
    assert found["warnings"] == [
        f"1 of 25 pictures are no longer where they were, such as {other}.",
        "50 captions of the test images were not written by people.",
        "24 of the 25 test images were trained on: the figures flatter.",
        "The evaluation is of else, the run is tiny.",
        "25 test images are few: intervals are wide, and rough.",
    ]
    assert (tmp_path / "out/report.html").read_text(encoding="utf-8").count("<article") == 24


def test_what_a_run_holds_out_of_its_file_is_not_seen(shapes, tmp_path: Path) -> None:
    """With dev_fraction the held-out share of the same file is what was not trained on."""
    examples = read_examples(shapes / "captions_train.json")
    write_coco(examples, tmp_path / "all.json", images=shapes / "images")
    table = recipe(
        shapes,
        data={"train": tmp_path / "all.json", "images": shapes / "images", "dev_fraction": 0.3},
    )
    (tmp_path / "recipe.json").write_text(table.model_dump_json())
    count = read_trained(tmp_path).seen([example.image.resolve() for example in examples])
    assert 0.5 * len(examples) < count < 0.9 * len(examples)


def test_figures_without_a_value_are_left_out(shapes, tmp_path: Path) -> None:
    images = [example.image.resolve() for example in read_examples(shapes / "captions_dev.json")]
    first = written(tmp_path / "first", np.full(16, 1.0), images)
    last = written(tmp_path / "last", np.full(16, np.nan), images)
    figures = {"model": "last", "figures": {"CIDEr-D": [None, None, None], "BLEU-4": [0.2, 0, 0.3]}}
    (last / "figures.json").write_text(json.dumps(figures))
    before = [{"name": "first", "evaluation": first}]
    found = reported(tmp_path / "out", evaluation=last, before=before)
    assert list(found["steps"][1]["figures"]) == ["BLEU-4"]
    assert found["steps"][1]["difference"] is None and found["overall"] is None


def test_faults_are_told_in_a_line(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="nothing to report: name run, evaluation, or both"):
        reported(out)
    with pytest.raises(ConfigError, match="step 'early': name run, evaluation, or both"):
        reported(out, run=trained, before=[{"name": "early"}])
    with pytest.raises(ConfigError, match="steps called tiny, tiny: each needs a name of its own"):
        reported(out, run=trained, before=[{"name": "tiny", "run": trained}])
    with pytest.raises(CheckpointError, match=r"no training run \(.*recipe.json is missing\)"):
        reported(out, run=tmp_path)
    with pytest.raises(DataError, match=r"no evaluation \(.*figures.json is missing\)"):
        reported(out, evaluation=tmp_path)
    old = written(tmp_path / "old", [1.0, 2.0], [tmp_path / "a", tmp_path / "b"])
    line = {"image": "a", "caption": "x", "score": -1.0, "token_ids": [1]}
    (old / "captions.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"do not tell enough \('file'\); evaluate again"):
        reported(out, evaluation=old)
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a run of pretrain or finetune"):
        reported(out, run=tmp_path)
    assert not out.exists()
