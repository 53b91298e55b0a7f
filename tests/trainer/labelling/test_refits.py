"""Training beside the page: when a round begins, how it ends, and that a failure harms nobody."""

import sys
import time
from pathlib import Path

from trainer.errors import DataError
from trainer.labelling.refits import Refits, State, Step, read_rounds

PATIENCE_S = 30


def step(folder: Path, code: str, then=lambda: None, name: str = "training") -> Step:
    return Step(name, [sys.executable, "-c", code], folder / f"{name}.log", then)


def ended(refits: Refits) -> State:
    end = time.monotonic() + PATIENCE_S
    while refits.state.state == "running":
        assert time.monotonic() < end
        time.sleep(0.005)
    return refits.state


def test_a_round_begins_after_so_many_labels_and_never_twice_at_once(tmp_path: Path) -> None:
    rounds: list[int] = []
    gate = tmp_path / "gate"
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(gate)!r}).exists(): time.sleep(.01)"

    def steps(labels: int) -> list[Step]:
        rounds.append(labels)
        return [step(tmp_path, wait)]

    refits = Refits(tmp_path, 20, steps)
    refits.consider(19)
    assert (rounds, refits.state) == ([], State())
    refits.consider(20)
    refits.consider(45)
    gate.touch()
    assert ended(refits) == State("done", 20, "learnt from 20 labels")
    refits.consider(39)
    assert rounds == [20]
    refits.consider(45)
    assert ended(refits).labels == 45
    assert rounds == [20, 45]
    assert [one.labels for one in read_rounds(tmp_path)] == [20, 45]
    again = Refits(tmp_path, 20, steps)
    again.consider(64)
    assert rounds == [20, 45]  # a restart does not begin from nothing


def test_a_failure_is_told_and_the_steps_after_it_are_left_out(tmp_path: Path) -> None:
    called: list[str] = []

    def steps(labels: int) -> list[Step]:
        bad = "print('loading'); print('error: the recipe is wrong'); print(); raise SystemExit(1)"
        return [
            step(tmp_path, "", lambda: called.append("first"), "first"),
            step(tmp_path, bad, lambda: called.append("second"), "second"),
            step(tmp_path, "", lambda: called.append("third"), "third"),
        ]

    refits = Refits(tmp_path, 1, steps)
    refits.consider(5)
    assert ended(refits) == State("failed", 5, "second: error: the recipe is wrong")
    assert called == ["first"]
    assert "loading" in (tmp_path / "second.log").read_text()


def test_what_cannot_be_started_or_used_afterwards_is_a_failure_too(tmp_path: Path) -> None:
    def unusable() -> None:
        raise DataError("the model is damaged")

    def broken() -> None:
        raise ZeroDivisionError

    cases = [
        (Step("a", ["/no/such/program"], tmp_path / "a.log", unusable), "No such file"),
        (step(tmp_path, "", unusable), "training: the model is damaged"),
        (step(tmp_path, "", broken), "training: ZeroDivisionError"),
        (step(tmp_path, "import os; os.kill(os.getpid(), 9)"), "training: ended with -9"),
    ]
    for number, (one, message) in enumerate(cases, start=1):
        refits = Refits(tmp_path, 1, lambda labels, one=one: [one])
        refits.consider(number)
        state = ended(refits)
        assert state.state == "failed" and message in state.message, message


def test_stopping_ends_the_command_and_leaves_the_round_to_be_begun_again(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))"
    refits = Refits(tmp_path, 1, lambda labels: [step(tmp_path, f"{code}; time.sleep(60)")])
    refits.consider(3)
    end = time.monotonic() + PATIENCE_S
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < end
        time.sleep(0.005)
    began = time.monotonic()
    refits.stop()
    assert time.monotonic() - began < 20
    assert not Path(f"/proc/{pid.read_text()}").exists()
    assert read_rounds(tmp_path) == []
    refits.consider(10)
    assert refits.state.state != "running"


def test_a_damaged_line_of_the_log_is_passed_over(tmp_path: Path, caplog) -> None:
    line = b'{"state": "done", "labels": 20, "message": "x"}\n'
    (tmp_path / "refits.jsonl").write_bytes(line + b'{"state": "do')
    assert read_rounds(tmp_path) == [State("done", 20, "x")]
    assert "damaged" in caplog.text
