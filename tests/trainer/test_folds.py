"""How long to train, found on folds: the choice, what it is made of, and going on after a kill."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_loop import log, recipe

from trainer.checkpoint import load_checkpoint
from trainer.data import Example, read_examples
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.loop import TrainingLoop
from trainer.metrics import cider
from trainer.run import Recipe, Run
from trainer.stages import _folds, finetune
from trainer.stages._folds import chosen_epochs


class Script:
    """Takes the place of training: after an epoch, so many of a fold's images are captioned right.

    Args:
        right: of each fold, by epochs.
    """

    def __init__(self, right: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
        self.right, self.visits, self.trained_on = right, [], {}
        monkeypatch.setattr(_folds, "load_all", lambda examples, image: examples)
        monkeypatch.setattr(_folds, "_copied", lambda *_: ["nothing like it"] * len(_[2]))
        monkeypatch.setattr(_folds, "captions_of", lambda objective, *_: objective.said)

    def train(self, folder: Path, training: list[Example], measure, until: int) -> None:
        fold = int(folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        self.visits.append((fold, until))
        self.trained_on[fold] = training
        self.said: list[str] = []
        self.captions, self.tokenizer = True, None
        after = measure(self, self)
        start = self._done(folder)
        for epoch in range(start, until):
            held_out = after.__closure__ and self._held_out(after)
            right = self.right[fold][epoch]
            self.said = [
                example.captions[0] if number < right else "a wrong one"
                for number, example in enumerate(held_out)
            ]
            after(epoch)
            (folder / "last.safetensors").write_text(str(epoch + 1))

    @staticmethod
    def _done(folder: Path) -> int:
        path = folder / "last.safetensors"
        return int(path.read_text()) if path.exists() else 0

    @staticmethod
    def _held_out(after) -> list[Example]:
        cells = dict(zip(after.__code__.co_freevars, after.__closure__, strict=True))
        return cells["pixels"].cell_contents


def config_of(shapes: Path, epochs: int, **folds: int) -> Recipe:
    return recipe(shapes, loop={"epochs": epochs}, folds={"count": 3, "patience": 2, **folds})


@pytest.fixture(scope="module")
def labelled(shapes: Path) -> list[Example]:
    return read_examples(shapes / "captions_train.json")[:24]


def test_the_epoch_is_chosen_by_the_mean_over_all_images(
    shapes, labelled, tmp_path, monkeypatch, capsys
) -> None:
    # By the first fold epoch 2 is best, by all of them epoch 3; 6 equals it and is later.
    right = [[0, 8, 6, 5, 5, 6], [0, 1, 6, 5, 5, 6], [0, 1, 6, 5, 5, 6]]
    script = Script(right, monkeypatch)
    assert chosen_epochs(config_of(shapes, 6), labelled, tmp_path, script.train) == 3
    assert script.visits == [(fold, until) for until in (2, 4, 6) for fold in range(3)]
    report = json.loads((tmp_path / "folds.json").read_text())
    assert (report["epochs"], report["images"]) == (3, 24)
    assert [row["epochs"] for row in report["curve"]] == [1, 2, 3, 4, 5, 6]
    value, low, high = report["CIDEr-D"]
    assert low < value < high and report["curve"][2]["CIDEr-D"] == [value, low, high]
    assert sum(report["curve"][2]["folds"]) / 3 == pytest.approx(value, abs=1e-3)
    # The figure by hand: every caption against all labelled captions' document frequencies.
    held_out = {name: n for n, names in enumerate(report["folds"]) for name in names}
    by_name = {example.image.name: example for example in labelled}
    frequencies = cider.DocumentFrequencies.of([e.captions for e in labelled])
    scores = []
    for names in report["folds"]:
        said = [by_name[x].captions[0] if n < 6 else "a wrong one" for n, x in enumerate(names)]
        references = [by_name[name].captions for name in names]
        scores += list(cider.score(references, said, frequencies=frequencies).per_image[:, 0])
    assert value == pytest.approx(sum(scores) / 24, abs=1e-3)
    for fold, training in script.trained_on.items():
        assert {held_out[example.image.name] for example in training} == {0, 1, 2} - {fold}
        assert len(training) == 16
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"best after 3 epochs: {value:.2f} ({low:.2f} to {high:.2f})")
    assert line.endswith("over 24 images; nearest neighbour's caption 0.00")
    with Image.open(tmp_path / "folds.png") as picture:
        assert picture.size == (720, 420) and len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_folds_end_where_a_stretch_was_no_better(shapes, labelled, tmp_path, monkeypatch) -> None:
    right = [[1, 2, 5, 4, 4, 3, 8, 8]] * 3
    script = Script(right, monkeypatch)
    config = config_of(shapes, 8)
    assert chosen_epochs(config, labelled, tmp_path, script.train) == 3
    assert max(until for _, until in script.visits) == 6
    # Again: all is known, nothing is trained, and the later epochs' figures change no decision.
    script.visits.clear()
    assert chosen_epochs(config, labelled, tmp_path, script.train) == 3
    assert script.visits == []
    script = Script(right, monkeypatch)
    assert (
        chosen_epochs(config_of(shapes, 8, patience=4), labelled, tmp_path / "b", script.train) > 6
    )


def test_evaluations_need_not_follow_every_epoch(shapes, labelled, tmp_path, monkeypatch) -> None:
    script = Script([[1, 1, 2, 3, 4, 5, 8]] * 3, monkeypatch)
    config = recipe(
        shapes,
        loop={"epochs": 7, "evaluate_every": 3},
        folds={"count": 3, "patience": 1},
    )
    chosen_epochs(config, labelled, tmp_path, script.train)
    assert [until for fold, until in script.visits if fold == 0] == [3, 6, 7]


def test_a_fold_holds_all_copies_of_its_images(shapes, tmp_path, monkeypatch) -> None:
    """What is measured is never near to what was trained on."""
    labelled = []
    for example in read_examples(shapes / "captions_train.json")[:12]:
        with Image.open(example.image) as image:
            large, small = image.resize((96, 96)), image.resize((80, 80))
        for name, copy in (("large.png", large), ("small.jpg", small)):
            path = tmp_path / f"{example.image.stem}_{name}"
            copy.save(path)
            labelled.append(Example(path, example.captions, None))
    script = Script([[1]] * 3, monkeypatch)
    chosen_epochs(config_of(shapes, 1), labelled, tmp_path / "run", script.train)
    report = json.loads((tmp_path / "run/folds.json").read_text())
    assert sorted(len(names) for names in report["folds"]) == [8, 8, 8]
    for fold, names in enumerate(report["folds"]):
        pictures = {name.partition("_")[0] for name in names}
        trained = {e.image.name.partition("_")[0] for e in script.trained_on[fold]}
        assert len(pictures) == 4 and not pictures & trained


def test_only_captions_that_people_wrote_are_measured(
    shapes, labelled, tmp_path, monkeypatch
) -> None:
    others = [Example(e.image, ("made up",), None, "synthetic") for e in labelled]
    script = Script([[1]] * 3, monkeypatch)
    chosen_epochs(config_of(shapes, 1), [*labelled, *others], tmp_path, script.train)
    report = json.loads((tmp_path / "folds.json").read_text())
    assert report["images"] == 24
    assert sum(e.source == "synthetic" for e in script.trained_on[0]) == 16
    with pytest.raises(DataError, match="no caption that a person wrote"):
        chosen_epochs(config_of(shapes, 1), others, tmp_path / "none", script.train)


def test_folds_of_other_images_are_refused(shapes, labelled, tmp_path, monkeypatch) -> None:
    script = Script([[1]] * 3, monkeypatch)
    chosen_epochs(config_of(shapes, 1), labelled, tmp_path, script.train)
    with pytest.raises(CheckpointError, match=r"folds/0: belongs to folds of other images"):
        chosen_epochs(config_of(shapes, 1), labelled[1:], tmp_path, script.train)
    (tmp_path / "folds/0/captions.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"captions\.json: cannot be read"):
        chosen_epochs(config_of(shapes, 1), labelled, tmp_path, script.train)
    with pytest.raises(DataError, match=r"24 different images .* parted into 25 folds"):
        chosen_epochs(config_of(shapes, 1, count=25), labelled, tmp_path / "b", script.train)


def real(shapes: Path, **changes) -> Recipe:
    table = {
        "folds": {"count": 2, "patience": 1},
        "optim": {"lr": 0.01},
        "loop": {"ema": 0.0},
        "generation": {"num_beams": 1, "max_new_tokens": 8},
    }
    return recipe(shapes, **{**table, **changes})


RUNS = (".", "folds/0", "folds/1")


@pytest.fixture(scope="module")
def folded(shapes: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folded")
    finetune.run(real(shapes), folder)
    return folder


def test_the_last_run_keeps_the_folds_schedule_and_stops(folded) -> None:
    epochs = json.loads((folded / "folds.json").read_text())["epochs"]
    _, state = load_checkpoint(folded / "last.safetensors")
    assert (state["step"], state["total"]) == (6 * epochs, 12)
    rates = [row["lr"] for row in log(folded) if "lr" in row]
    of_fold = [row["lr"] for row in log(folded / "folds/0") if "lr" in row]
    assert len(rates) == 6 * epochs
    # Twice the images, twice the steps: at the same share of all epochs the same rate.
    assert rates[::2] == pytest.approx(of_fold[: 3 * epochs], rel=1e-6)
    assert Run(folded / "folds/1").captioner() and Run(folded).captioner()
    rows = [row for row in log(folded / "folds/1") if "dev/CIDEr-D" in row]
    curve = json.loads((folded / "folds.json").read_text())["curve"]
    assert [row["folds"][1] for row in curve] == [round(r["dev/CIDEr-D"], 4) for r in rows]


def test_a_run_killed_in_a_fold_and_after_them_goes_on_bit_for_bit(
    shapes, folded, tmp_path: Path, monkeypatch
) -> None:
    step, made = TrainingLoop._train_step, []
    fatal = {5, 5 + 7 + 3 + 1}  # in the second fold; in the last run: folds have 4 * 3 steps

    def killed(loop: TrainingLoop, batches: list) -> dict[str, float]:
        made.append(1)
        if len(made) in fatal:
            raise KeyboardInterrupt
        return step(loop, batches)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_train_step", killed)
        for _ in fatal:
            with pytest.raises(KeyboardInterrupt):
                finetune.run(real(shapes), tmp_path)
            assert (tmp_path / "folds.json").exists() == (len(made) > 12)
    finetune.run(real(shapes), tmp_path)
    assert (tmp_path / "folds.json").read_bytes() == (folded / "folds.json").read_bytes()
    for name in RUNS:
        assert log(tmp_path / name) == log(folded / name)
        (ours, state), (theirs, other) = (
            load_checkpoint(folder / name / "last.safetensors") for folder in (tmp_path, folded)
        )
        assert state == other and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_another_recipe_is_refused_while_there_are_folds(shapes, folded, tmp_path) -> None:
    for changed in (real(shapes, optim={"lr": 0.5}), real(shapes, loop={"evaluate_every": 2})):
        with pytest.raises(CheckpointError, match=r"a run of another recipe"):
            finetune.run(changed, folded)
    (tmp_path / "folds/0").mkdir(parents=True)
    for name in ("recipe.json", "folds/0/last.safetensors"):
        (tmp_path / name).write_bytes((folded / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"a run of another recipe .optim"):
        finetune.run(real(shapes, optim={"lr": 0.5}), tmp_path)


def test_an_objective_without_captions_has_no_folds(shapes, tmp_path) -> None:
    with pytest.raises(ConfigError, match="measures captions, which objective 'itc' does not"):
        finetune.run(real(shapes, objective={"name": "itc"}, matcher={}), tmp_path)
