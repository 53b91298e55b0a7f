"""A reward that is gamed ends the run, and its best state is in its folder again."""

import json
from pathlib import Path

import pytest
import torch
from test_loop import log, recipe

from trainer.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from trainer.errors import RewardHackingError
from trainer.objectives._captioning import Budget
from trainer.run import Run
from trainer.stages import _evaluation, finetune
from trainer.stages._hacking import BEST, HackingWatch


class Folder:
    """A run's folder that is evaluated again and again."""

    def __init__(self, path: Path, budget: Budget, images: int = 100) -> None:
        self.path, self.budget, self.images, self.step = path, budget, images, 0

    def evaluated(self, cider: float = 1.0, **changed: float) -> None:
        """One evaluation, by a watch that knows nothing but the folder."""
        figures = {"dev/CIDEr-D": cider, "dev/repetition": 0.01, "dev/bad endings": 0.02}
        figures |= {"dev/length": 10.0} | {
            f"dev/{k.replace('_', ' ')}": v for k, v in changed.items()
        }
        watch = HackingWatch(self.path, self.budget, self.images)
        watch.check(figures)
        with (self.path / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step, **figures}) + "\n")
        save_checkpoint(self.path / CHECKPOINT, {"w": torch.zeros(1)}, {"step": self.step})
        watch.keep()
        self.step += 10

    def kept(self, name: str = CHECKPOINT) -> int:
        return int(load_checkpoint(self.path / name)[1]["step"])


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path, Budget(repetition=0.1, bad_endings=0.1, length=0.2))


@pytest.mark.parametrize(
    ("figure", "fine", "bad", "said"),
    [
        ("repetition", 0.13, 0.14, r"repetition of .* is 0.14, .* was 0.01, .* allows 0.13"),
        ("bad_endings", 0.14, 0.15, r"bad endings of .* is 0.15, .* was 0.02, .* allows 0.14"),
        ("length", 12.0, 12.1, r"length of .* is 12.1, .* was 10, .* allows 12"),
        ("length", 8.0, 7.9, r"length of .* is 7.9, .* was 10, .* allows 8"),
    ],
)
def test_the_budget_is_over_the_state_before_the_first_step(
    folder: Folder, figure: str, fine: float, bad: float, said: str
) -> None:
    folder.evaluated()
    folder.evaluated(**{figure: fine})
    folder.evaluated(**{figure: fine})  # over the first, not over the last
    with pytest.raises(RewardHackingError, match=said) as raised:
        folder.evaluated(**{figure: bad})
    assert "\n" not in str(raised.value)
    cure = {"length": "lower optim.lr"}.get(figure, f'give "{figure}" a weight below 0')
    assert cure in str(raised.value)


def test_captions_that_were_bad_before_are_no_alarm(folder: Folder) -> None:
    for _ in range(3):
        folder.evaluated(repetition=0.9, bad_endings=0.8, length=3.0)


def test_two_captions_of_a_few_are_chance(tmp_path: Path) -> None:
    folder = Folder(tmp_path, Budget(), images=10)
    folder.evaluated(repetition=0.0)
    folder.evaluated(repetition=0.2)
    with pytest.raises(RewardHackingError):
        folder.evaluated(repetition=0.3)


def test_the_best_state_is_kept(folder: Folder) -> None:
    for cider in (1.0, 1.5, 1.2):
        folder.evaluated(cider)
    assert (folder.kept(), folder.kept(BEST)) == (20, 10)
    with pytest.raises(RewardHackingError, match=r"after step 10 \(CIDEr-D 1.500\)"):
        folder.evaluated(9.0, bad_endings=1.0)
    assert (folder.kept(), folder.kept(BEST)) == (10, 10)
    save_checkpoint(folder.path / CHECKPOINT, {"w": torch.zeros(1)}, {"step": 99})
    assert folder.kept(BEST) == 10, "what is saved later leaves it alone"


def test_a_run_that_is_gamed_ends_with_its_best_state(
    shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The captions of its third evaluation are made to break off."""
    config = recipe(
        shapes,
        data={"dev": shapes / "captions_dev.json", "dev_images": 8},
        objective={
            "name": "scst",
            "max_new_tokens": 4,
            "budget": {"repetition": 1.0, "length": 99.0},
        },
        loop={"epochs": 4, "ema": 0.0},
        generation={"num_beams": 1, "max_new_tokens": 6},
    )
    calls = []

    def spoilt(references, captions):
        calls.append(len(captions))
        ends = " in a" if len(calls) > 3 else " dog"
        return real(references, [caption + ends for caption in captions])

    real = _evaluation.bad_endings.score
    monkeypatch.setattr(_evaluation.bad_endings, "score", spoilt)
    folder = tmp_path / "run"
    with pytest.raises(RewardHackingError, match="bad endings of the captions of 8 images is 1"):
        finetune.run(config, folder)
    rows = [row for row in log(folder) if "dev/CIDEr-D" in row]
    assert [row["step"] for row in rows] == [0, 6, 12]
    best = max(rows, key=lambda row: (row["dev/CIDEr-D"], row["step"]))
    assert load_checkpoint(folder / CHECKPOINT)[1]["step"] == best["step"]
    Run(folder).captioner()
    for name in ("repetition", "bad endings", "length", "distinct"):
        assert all(f"dev/{name}" in row for row in rows)
