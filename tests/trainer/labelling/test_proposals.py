"""Captions computed ahead: in the order of need, kept, and forgotten with their model."""

import threading
from pathlib import Path

from trainer.errors import DataError
from trainer.labelling.proposals import Proposals, distinct

PATHS = [Path(f"{number}.jpg") for number in range(4)]
PATIENCE_S = 30


def test_of_texts_that_differ_in_case_the_first_is_kept() -> None:
    assert distinct(["A dog", "", "a cat", "a dog", "A CAT", "a bird"]) == [
        *("A dog", "a cat", "a bird")
    ]


def test_they_are_found_in_the_order_of_need_and_kept() -> None:
    asked: list[str] = []
    done = threading.Event()

    def caption(path: Path) -> list[str]:
        asked.append(path.stem)
        if len(asked) == 4:
            done.set()
        return [f"{path.stem} {n}" for n in "aabcd"]

    proposals = Proposals(PATHS, {2: ["given"]})
    assert proposals.of(2) == ["given"] and proposals.of(0) == []  # there is no model
    proposals.use(caption)
    assert proposals.of(0) is None
    proposals.start(lambda: iter([2, 0, 2, 1, 3]))
    assert done.wait(PATIENCE_S)
    proposals.stop()
    assert asked == ["2", "0", "1", "3"]
    assert proposals.of(0) == ["0 a", "0 b", "0 c"]
    assert proposals.of(2) == ["given", "2 a", "2 b"]


def test_a_new_model_replaces_what_the_old_one_said_and_is_saying() -> None:
    began, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def old(path: Path) -> list[str]:
        began.set()
        assert go_on.wait(PATIENCE_S)
        return ["old"]

    def new(path: Path) -> list[str]:
        if path.stem == "1":
            done.set()
        return ["new"]

    proposals = Proposals(PATHS)
    proposals.use(old)
    proposals.start(lambda: iter([0, 1]))
    assert began.wait(PATIENCE_S)
    proposals.use(new)
    go_on.set()
    assert done.wait(PATIENCE_S)
    proposals.stop()
    assert (proposals.of(0), proposals.of(1)) == (["new"], ["new"])


def test_a_photograph_that_a_model_fails_on_has_none_and_the_others_go_on(caplog) -> None:
    done = threading.Event()

    def caption(path: Path) -> list[str]:
        if path.stem == "0":
            raise DataError("0.jpg: truncated")
        if path.stem == "1":
            raise RuntimeError("of the library")
        done.set()
        return ["fine"]

    proposals = Proposals(PATHS)
    proposals.use(caption)
    proposals.start(lambda: iter([0, 1, 2]))
    assert done.wait(PATIENCE_S)
    proposals.stop()
    assert [proposals.of(number) for number in range(3)] == [[], [], ["fine"]]
    assert "no proposals for 1.jpg" in caplog.text
