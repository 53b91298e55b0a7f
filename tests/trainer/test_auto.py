"""The whole road: its plan, what it refuses, and that it ends alike, killed or not."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exports.registry import Registry
from trainer.__main__ import main
from trainer.config import read_recipe, validate
from trainer.data import read_examples
from trainer.errors import DataError, TrainerError
from trainer.intervals import Interval
from trainer.labelling.answers import Answer, Answers
from trainer.run import build_captioner, write_run
from trainer.stages import auto, label
from trainer.stages._auto_estimate import estimate
from trainer.stages._auto_pipeline import Done, Pipeline, State, Step, captions_of
from trainer.stages._auto_steps import _label, planned
from trainer.tokenizer import train_tokenizer

RECIPES = Path(__file__).parents[2] / "trainer" / "recipes"
TINY = RECIPES / "tiny" / "auto.toml"


def preset(shapes: Path, **changes: object) -> auto.Config:
    table = read_recipe(TINY)
    table |= {"images": shapes / "images", "answers": shapes / "captions_train.json", **changes}
    return validate(auto.Config, table, "tiny/auto.toml")


def picks(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    with (folder / "picks.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image"], *([name] for name in names)])


@pytest.mark.parametrize("name", ["auto.toml", "tiny/auto.toml"])
def test_a_preset_makes_a_plan_of_valid_recipes(shapes: Path, tmp_path: Path, name: str) -> None:
    table = {**read_recipe(RECIPES / name), "images": shapes / "images"}
    pipeline = Pipeline(validate(auto.Config, table, name), tmp_path)
    steps = planned(pipeline)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert names[-1] == "bundle"
    assert names.index("picks-1") < names.index("model-1") < names.index("picks-2")
    data = {"train": tmp_path}
    config = pipeline.config
    assert config.pseudo is not None
    for changes in (None, config.pseudo.filter, config.pseudo.finetune, config.scst):
        pipeline.recipe(changes, data=data)


@pytest.fixture
def start(shapes: Path, tmp_path: Path) -> Path:
    """A run of the tiny preset's captioner, that has learnt nothing."""
    recipe = Pipeline(preset(shapes), tmp_path).recipe(data={"train": tmp_path})
    body, text = train_tokenizer(["a red square"], vocab_size=300, max_length=24)
    write_run(tmp_path / "start", recipe, text, body, build_captioner(recipe, text))
    return tmp_path / "start"


def from_start(shapes: Path, **changes: object) -> auto.Config:
    table = read_recipe(RECIPES / "auto_from_start.toml")
    table |= {"images": shapes / "images", **changes}
    return validate(auto.Config, table, "auto_from_start.toml")


def test_a_plan_from_a_start_begins_every_model_with_it(
    shapes: Path, start: Path, tmp_path: Path
) -> None:
    pipeline = Pipeline(from_start(shapes, start=start), tmp_path)
    steps = planned(pipeline)
    names = [step.name for step in steps]
    assert names.index("test-labels") + 1 == names.index("start") < names.index("picks-1")
    assert steps[names.index("start")].work(tmp_path / "out") == start
    assert not any(step.trusted for step in steps)  # kept only where they gain
    recipe = pipeline.recipe(data={"train": tmp_path})
    assert recipe.start == start
    assert (recipe.image.height, recipe.decoder["name"]) == (64, "bert")  # as the start is built
    assert pipeline.encoder() == {"encoder": start}
    assert estimate(pipeline, steps).count("ask the captioner at the start") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": Path("nowhere")}, "nowhere: no training run"),
        ({"pretrain": {}}, "leave [pretrain] out of it"),
        ({"pseudo": {"filter": {}}}, "leave [pseudo], whose filter has a matcher out of it"),
        ({"finetune": {"encoder": {}, "decoder": {}}}, "[finetune.encoder], [finetune.decoder]"),
    ],
)
def test_a_preset_of_another_captioner_than_the_start_is_refused(
    shapes: Path, start: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(TrainerError, match=re.escape(words)):
        auto.run(from_start(shapes, **{"start": start, **changes}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_changes_lie_over_tables_and_false_takes_one_out(shapes: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(preset(shapes), tmp_path)
    changes = {"loop": {"epochs": 3}, "objective": {"name": "scst"}, "generation": False}
    recipe = pipeline.recipe(changes, data={"train": tmp_path})
    assert (recipe.loop.epochs, recipe.loop.batch_size) == (3, 16)
    assert recipe.objective == {"name": "scst"}  # another variant: none of the old one's keys
    assert recipe.generation.max_new_tokens != 20
    assert recipe.data.captions_per_image == 3


def test_the_plan_tells_how_long_it_takes_and_what_is_done(shapes: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(preset(shapes, answers=None), tmp_path)
    steps = planned(pipeline)
    words = estimate(pipeline, steps)
    assert words.count("\n") == len(steps) + 1
    assert re.search(r"in all about .* of this machine and 2.1 h of yours", words)
    pipeline.state = State(done={step.name: Done(seconds=1) for step in steps[:-1]})
    assert estimate(pipeline, steps).count("done") == len(steps) - 1


def test_answers_come_from_a_file_best_pick_first(shapes: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(preset(shapes), tmp_path)
    known = {e.image.name: e for e in read_examples(shapes / "captions_train.json")}
    named = sorted(known)[:4]
    unknown = next(p.name for p in (shapes / "images").iterdir() if p.name not in known)
    picks(tmp_path / "test-images", named[0], unknown, *named[1:])
    step = next(step for step in planned(pipeline) if step.name == "test-labels")
    for _ in range(2):  # what is answered is not answered, or counted, again
        with pytest.raises(DataError, match="captions for 4 of 40 images that were picked"):
            step.work(tmp_path / step.name)
    answers = Answers(tmp_path / "labels")
    try:
        last = {name: answers.last(name) for name in (*named, unknown)}
    finally:
        answers.close()
    assert all(last[name].captions == known[name].captions[:3] for name in named)
    assert (last[unknown].action, last[unknown].captions) == ("skip", ())
    pipeline.keep_test()
    table = pipeline.test.read_text(encoding="utf-8")
    assert len(table.splitlines()) == 1 + 3 * len(named)
    # What is labelled later is learnt from, and never tested on.
    later = sorted(known)[4]
    picks(tmp_path / "more", later)
    with pytest.raises(DataError, match="captions for 5 of 40"):
        _label(pipeline, "more", 40)
    pipeline.keep_test()
    assert pipeline.test.read_text(encoding="utf-8") == table
    assert {e.image.name for e in read_examples(pipeline.train())} == {later}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": Path("nowhere")}, "nowhere: no folder"),
        ({"test_share": 0.01, "labels": 20}, "at least 2 images are tested on"),
        ({"rounds": 90}, "rounds = 90"),
    ],
)
def test_what_makes_no_plan_is_refused(
    shapes: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(Exception, match=re.escape(words)):
        auto.run(preset(shapes, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("trusted", "gain", "kept"),
    [
        (True, Interval(-0.1, -0.3, 0.1), True),  # more labels, and no harm shown
        (True, Interval(-0.2, -0.3, -0.1), False),
        (False, Interval(-0.1, -0.3, 0.1), False),
        (False, Interval(0.1, -0.1, 0.3), True),
    ],
)
def test_what_a_step_made_is_kept_by_its_gain(trusted: bool, gain: Interval, kept: bool) -> None:
    assert Step("s", "words", lambda _: None, trusted=trusted).keeps(gain) == kept


def test_what_bought_nothing_is_told(shapes: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(preset(shapes), tmp_path)
    pipeline.state = State(
        done={
            "model-1": Done(seconds=1, run=tmp_path),
            "pseudo-captions": Done(seconds=1, skipped="no threshold reaches 0.8"),
            "scst": Done(seconds=1, run=tmp_path, gain=(-0.1, -0.3, 0.1), kept=False),
        }
    )
    assert pipeline.not_kept() == [
        "pseudo-captions was left out: no threshold reaches 0.8.",
        "scst was tried and not kept: it changed CIDEr-D by -0.1 (-0.3 to 0.1).",
    ]


def test_a_page_that_is_left_early_is_gone_on_with(
    shapes: Path, tmp_path: Path, monkeypatch
) -> None:
    """Skipped images are answered, but not labelled."""
    pipeline = Pipeline(preset(shapes, answers=None), tmp_path)
    picks(tmp_path / "test-images", *sorted(p.name for p in (shapes / "images").iterdir()))
    answers = Answers(tmp_path / "labels")
    for number in range(45):
        captions = ("a red square",) * (number < 5)
        answers.add(
            Answer(
                image=f"{number:05d}.png",
                captions=captions,
                action="edit" if captions else "skip",
                revision=1,
                when="2026-01-01T00:00:00Z",
            )
        )
    answers.close()
    monkeypatch.setattr(label, "_serve", lambda *_, **__: None)  # the person leaves at once
    step = next(step for step in planned(pipeline) if step.name == "test-labels")
    with pytest.raises(TrainerError, match="5 of 40 images are labelled; give the same command"):
        step.work(tmp_path / step.name)
    assert not pipeline.test.exists()


def test_a_folder_of_other_labels_is_left_alone(shapes: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "auto.json").write_text(State().model_dump_json())
    resolved = preset(shapes, labels=50).model_dump_json()
    (tmp_path / "recipe.json").write_text(resolved)
    answers = f"answers={shapes / 'captions_train.json'}"
    command = ["auto", str(shapes / "images"), "--preset", str(TINY), "--out", str(tmp_path)]
    assert main([*command, "--labels", "60", answers]) == 1
    assert "holds a run of another recipe (labels: 50, here 60)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawings")
    assert main(["shapecaps", str(RECIPES / "tiny" / "shapecaps.toml"), "--out", str(folder)]) == 0
    return folder


def road(drawings: Path, folder: Path) -> list[str]:
    return [
        *("auto", str(drawings / "images"), "--preset", str(TINY), "--name", "cutline-shapes"),
        *("--answers", str(drawings / "captions_train.json")),
        *("--registry", str(folder / "registry"), "--out", str(folder / "auto")),
    ]


@pytest.mark.slow
def test_the_whole_road_and_what_it_bought(drawings: Path, tmp_path: Path) -> None:
    begun = time.process_time()
    assert main(road(drawings, tmp_path)) == 0
    assert time.process_time() - begun < 300  # on a core that does nothing else
    folder = tmp_path / "auto"
    state = State.model_validate_json((folder / "auto.json").read_text())
    gain = state.done["model-2"].gain
    assert gain is not None
    assert gain[0] > 0  # with twice the labels
    assert Registry(tmp_path / "registry").resolve("cutline-shapes").version == "1"
    report = json.loads((folder / "report.json").read_text())
    assert "CIDEr-D" in json.dumps(report)
    assert "labels" in (folder / "report.html").read_text()
    # Nobody but people wrote what is tested on, and nothing tested on is learnt from.
    test = {e.image: e for e in read_examples(folder / "test.csv")}
    assert {e.source for e in test.values()} == {"human"}
    assert [path.parent for path in folder.rglob("features")] == [folder]  # encoded once for all
    learnt = read_examples(folder / "pseudo-captions" / "captions.csv")
    assert not test.keys() & {example.image for example in learnt}
    # Who has only the bundle goes on from it, and it says what it said.
    again, base = tmp_path / "again", str(tmp_path / "base")
    bundle = Registry(tmp_path / "registry").resolve("cutline-shapes").path
    assert main(["import", str(bundle), "--out", base]) == 0
    on = [*road(drawings, tmp_path), "--preset", str(RECIPES / "auto_from_start.toml")]
    on += ["--out", str(again), "--start", base, "labels=80", "test_share=0.5", "rounds=1"]
    on += ["finetune.loop.epochs=2", "export.parity_images=20", "captions_per_image=3"]
    assert main(on) == 0
    assert Registry(tmp_path / "registry").resolve("cutline-shapes").version == "2"
    state_again = State.model_validate_json((again / "auto.json").read_text())
    assert state_again.done["start"].run == Path(base)
    # Weights in a bundle are rounded, which may turn one caption in forty.
    before = captions_of(folder / str(state.model) / "evaluation")
    after = captions_of(again / "start" / "evaluation")
    assert sum(a == b for a, b in zip(before, after, strict=True)) >= 39
    model = state_again.done[str(state_again.model)].run
    assert model is not None
    assert f">{model.name}<" in (again / "report.html").read_text()


@pytest.mark.chaos
def test_a_killed_road_loses_no_label_and_ends_alike(drawings: Path, tmp_path: Path) -> None:
    short = ["pretrain.loop.epochs=1", "finetune.loop.epochs=4", "labels=24", "rounds=1"]
    short += ["pseudo=false", "scst.loop.epochs=1", "pretrain.loop.evaluate_every=1"]
    outcomes = []
    for name, kills in (("whole", ()), ("killed", ("encoder", "scst"))):
        arguments = [*road(drawings, tmp_path / name), *short]
        for place in kills:
            _kill_in(arguments, tmp_path / name / "auto" / place)
        assert main(arguments) == 0
        folder = tmp_path / name / "auto"
        lines = (folder / "labels/answers.jsonl").read_text().splitlines()
        labels = [json.loads(line) for line in lines]
        captions = (folder / "scst" / "evaluation" / "captions.jsonl").read_text()
        outcomes.append(([(row["image"], row["captions"]) for row in labels], captions))
    assert outcomes[0] == outcomes[1]


def _kill_in(arguments: list[str], folder: Path) -> None:
    """Kills the command as soon as a step has made a checkpoint or a log in its folder."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 240
    while not (folder / "log.jsonl").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
