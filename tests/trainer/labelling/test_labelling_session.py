"""Which photograph comes next, for whom, and how much is left."""

import threading
from pathlib import Path

import pytest
from desk import desk

from trainer.labelling.session import LEASE_S


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_two_tabs_get_different_photographs_while_there_are_any(tmp_path: Path) -> None:
    clock = Clock()
    with desk(tmp_path, count=3, clock=clock) as session:
        assert session.next_number("one", beyond=False) == 0
        assert session.next_number("two", beyond=False) == 1
        assert session.next_number("one", beyond=False) == 0  # the same until it is answered
        session.answer(0, "edit", ["a"], revision=0)
        assert session.next_number("one", beyond=False) == 2
        session.answer(2, "skip", [], revision=0)
        assert session.next_number("one", beyond=False) == 1  # there is no other
        session.answer(1, "edit", ["b"], revision=0)
        assert session.next_number("two", beyond=False) is None


def test_a_tab_that_is_gone_gives_its_photograph_back(tmp_path: Path) -> None:
    clock = Clock()
    with desk(tmp_path, count=3, clock=clock) as session:
        assert session.next_number("one", beyond=False) == 0
        assert session.next_number("two", beyond=False) == 1
        session.release("one")
        assert session.next_number("three", beyond=False) == 0
        clock.now += LEASE_S / 2
        session.hold("two", 1)  # a sign of life
        clock.now += LEASE_S / 2 + 1
        assert session.next_number("four", beyond=False) == 0
        assert session.next_number("five", beyond=False) == 2


def test_picks_come_first_and_others_when_they_are_asked_for(tmp_path: Path) -> None:
    with desk(tmp_path, picks=["p2.png", "stranger.png", "p0.png"]) as session:
        assert session.next_number("one", beyond=False) == 2
        assert session.ahead(2) == 0
        assert list(session.upcoming()) == [2, 2, 0, 1, 3]
        progress = session.progress()
        assert (progress.left, progress.others) == (2, 2)
        session.answer(2, "edit", ["a"], revision=0)
        session.answer(0, "skip", [], revision=0)
        assert session.next_number("one", beyond=False) is None
        assert session.next_number("one", beyond=True) == 1
        session.prefer(["p2.png", "p3.png"])  # what is done does not come back
        assert session.next_number("one", beyond=False) == 3


def test_with_several_captions_a_photograph_is_done_when_it_has_them(tmp_path: Path) -> None:
    with desk(tmp_path, count=2, captions_per_image=2) as session:
        session.answer(0, "accept", ["a"], revision=0, proposal=1)
        assert not session.is_done(0)
        assert (session.progress().begun, session.progress().labelled) == (1, 0)
        session.answer(0, "edit", ["a", "b"], revision=1)
        assert session.is_done(0)
        session.answer(1, "edit", ["only one"], revision=0)
        session.answer(1, "skip", ["only one"], revision=1)  # no further caption
        progress = session.progress()
        assert (progress.labelled, progress.begun, progress.skipped) == (2, 0, 0)
        session.answer(1, "clear", [], revision=2)
        assert session.next_number("one", beyond=False) == 1


def test_a_stale_answer_changes_nothing(tmp_path: Path) -> None:
    with desk(tmp_path) as session:
        assert session.answer(0, "edit", ["mine"], revision=0)
        assert not session.answer(0, "edit", ["yours"], revision=0)
        assert session.shown(0)["captions"] == ["mine"]
        assert session.shown(0)["revision"] == 1
        assert session.answer(0, "edit", ["yours"], revision=1)


def test_the_pace_of_the_last_answers_tells_the_time_left(tmp_path: Path) -> None:
    with desk(tmp_path, count=10) as session:
        assert session.progress().seconds_left is None
        session.answer(9, "import", ["from elsewhere"], revision=0)
        assert session.progress().seconds_left is None
        for number, seconds in enumerate((4.0, 5.0, 600.0)):  # a break is not the pace
            session.answer(number, "edit", ["a"], revision=0, seconds=seconds)
        assert session.progress().seconds_left == pytest.approx(5.0 * 6)
        assert session.recent() == [9, 0, 1, 2]
        session.answer(0, "edit", ["b"], revision=1)
        assert session.recent() == [9, 1, 2, 0]


def test_many_tabs_at_once_do_each_photograph_once(tmp_path: Path) -> None:
    refused: list[int] = []
    with desk(tmp_path, count=40) as session:

        def work(tab: str) -> None:
            while (number := session.next_number(tab, beyond=False)) is not None:
                revision = session.shown(number)["revision"]
                if session.is_done(number):
                    continue  # another tab was at the same last one
                if not session.answer(number, "edit", [tab], revision=revision):
                    refused.append(number)

        threads = [threading.Thread(target=work, args=(f"tab-{n}",)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert session.progress().labelled == 40
        lines = session.answers.path.read_bytes().count(b"\n")
        assert lines == 40 + sum(one.revision - 1 for one in session.answers.all())
