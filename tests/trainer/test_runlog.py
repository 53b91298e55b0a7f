"""The log of a run: what survives a resume, and what is measured before the first step."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.dataset import TrainingData
from trainer.loop import Loop, TrainingLoop
from trainer.objective import Objective
from trainer.optim import Optim
from trainer.runlog import RunLog, read_log


def test_figures_read_back_as_they_were_written(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
    with RunLog(tmp_path, total=9) as log:
        log.scalars(0, {"probe/rankme": 0.1 + 0.2})
        log.scalars(1, {"loss": math.nan, "lr": 1e-7})
    first, second = read_log(tmp_path)
    assert first == {"step": 0, "probe/rankme": 0.1 + 0.2}
    assert math.isnan(second["loss"]) and second["lr"] == 1e-7


def test_a_resume_keeps_the_start_and_drops_what_was_not_saved(tmp_path: Path) -> None:
    with RunLog(tmp_path, total=9) as log:
        for step in range(5):
            log.scalars(step, {"loss": float(step)})
    body = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(body + '{"step": 5, "lo')
    with RunLog(tmp_path, total=9, start=3):
        assert (tmp_path / "log.jsonl").read_text() == "".join(body.splitlines(True)[:4])


def test_a_run_that_saved_nothing_begins_a_new_log(tmp_path: Path) -> None:
    with RunLog(tmp_path, total=9) as log:
        log.scalars(0, {"probe/rankme": 3.0})
    with RunLog(tmp_path, total=9, start=0):
        assert read_log(tmp_path) == []


class Numbers(TrainingData):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return {"image": torch.full((3, 2, 2), float(key[1]))}

    def collate(self, items: Any) -> dict[str, Tensor]:
        return {"images": torch.stack([item["image"] for item in items])}


class Distance(Objective):
    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.zeros(3))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"loss": (batch["images"].mean((2, 3)) - self.point).square().mean()}


class Killed(Exception):
    pass


def loop(folder: Path, asked: list[tuple[int, bool]], *, stop: int = 99) -> TrainingLoop:
    """Returns a loop of 3 epochs that is killed when epoch `stop` is evaluated."""
    folder.mkdir(exist_ok=True)
    objective = Distance()

    def evaluate(epoch: int) -> dict[str, float]:
        if epoch == stop:
            raise Killed
        asked.append((epoch, objective.training))
        return {"probe/point": objective.point[0].item()}

    def after() -> None:
        rows = read_log(folder)
        assert rows[-1]["probe/point"] == objective.point[0].item()  # the average, as measured
        asked.append((len(rows), objective.training))

    return TrainingLoop(
        objective,
        Numbers(),
        config=Loop(epochs=3, batch_size=4, workers=0, save_every=1, device="cpu", ema=0.5),
        optim=Optim(lr=0.1),
        seed=0,
        folder=folder,
        evaluate=evaluate,
        evaluate_first=True,
        after_evaluation=after,
    )


def test_the_start_is_measured_once_and_survives_a_kill(tmp_path: Path) -> None:
    asked: list[tuple[int, bool]] = []
    loop(tmp_path / "whole", asked).run()
    # Epoch -1, then 1 line; epoch 0, then 1 + 2 steps + 1 lines; and so on. Never in training mode.
    assert asked == [(n, False) for n in (-1, 1, 0, 4, 1, 7, 2, 10)]
    whole = read_log(tmp_path / "whole")
    assert whole[0] == {"step": 0, "probe/point": 0.0}
    with pytest.raises(Killed):
        loop(tmp_path / "killed", asked, stop=1).run()
    asked.clear()
    loop(tmp_path / "killed", asked).run()
    assert -1 not in [epoch for epoch, _ in asked]
    assert read_log(tmp_path / "killed") == whole


def test_a_run_killed_before_its_first_save_has_one_start(tmp_path: Path) -> None:
    asked: list[tuple[int, bool]] = []
    running = loop(tmp_path, asked)
    running._train_step = lambda batches: (_ for _ in ()).throw(Killed)  # type: ignore[method-assign]
    with pytest.raises(Killed):
        running.run()
    assert [row["step"] for row in read_log(tmp_path)] == [0]
    loop(tmp_path, asked).run()
    assert [row["step"] for row in read_log(tmp_path)].count(0) == 1
