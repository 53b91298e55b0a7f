"""The store: what was acknowledged is there, whatever happened to the process or to the file."""

import errno
import json
import os
import random
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from trainer.data import read_examples
from trainer.errors import DataError
from trainer.labelling.answers import Answer, Answers, cleaned


def answer(image: str, revision: int = 1, captions=("a dog",), **more) -> Answer:
    fields = {"action": "edit", "when": "2026-01-01T00:00:00+00:00", **more}
    return Answer(image=image, captions=tuple(captions), revision=revision, **fields)


def reopened(folder: Path) -> tuple[dict[str, Answer], list[str]]:
    with closing(Answers(folder)) as answers:
        return {one.image: one for one in answers.all()}, answers.notes


def test_answers_are_there_after_a_restart(tmp_path: Path) -> None:
    first = answer("a.jpg", captions=("ein Café — «naïve» 🐕",), proposal=2, seconds=1.25)
    second = answer("deep/b.jpg", captions=(), action="skip")
    with closing(Answers(tmp_path)) as answers:
        assert answers.last("a.jpg") is None
        assert answers.add(first) and answers.add(second)
        assert answers.last("a.jpg") == first
    assert reopened(tmp_path) == ({"a.jpg": first, "deep/b.jpg": second}, [])
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_bytes().splitlines()]
    assert rows[0]["source"] == "human"
    assert rows[0]["captions"] == ["ein Café — «naïve» 🐕"]


def test_only_the_next_revision_is_stored(tmp_path: Path) -> None:
    with closing(Answers(tmp_path)) as answers:
        assert not answers.add(answer("a.jpg", 2))
        assert answers.add(answer("a.jpg", 1, ["one"]))
        before = (tmp_path / "answers.jsonl").read_bytes()
        assert not answers.add(answer("a.jpg", 1, ["another tab's"]))
        assert (tmp_path / "answers.jsonl").read_bytes() == before
        assert answers.add(answer("a.jpg", 2, ["two"]))
        assert answers.last("a.jpg").captions == ("two",)
    assert reopened(tmp_path)[0]["a.jpg"].captions == ("two",)


def test_of_many_threads_one_wins_each_revision(tmp_path: Path) -> None:
    won: list[tuple[int, int]] = []
    with closing(Answers(tmp_path)) as answers:

        def work(who: int) -> None:
            won.extend(
                (revision, who)
                for revision in range(1, 11)
                if answers.add(answer("a.jpg", revision, [f"by {who}"]))
            )

        threads = [threading.Thread(target=work, args=(who,)) for who in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    revisions = [revision for revision, _ in won]
    assert sorted(revisions) == sorted(set(revisions))
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    stored = [json.loads(line) for line in lines]
    assert [row["revision"] for row in stored] == sorted(revisions)
    assert {(row["revision"], row["captions"][0]) for row in stored} == {
        (revision, f"by {who}") for revision, who in won
    }


# PyTorch takes seconds to import, has no part in this, and comes in with the package itself.
LIGHT = """
import sys, types
sys.modules["trainer"] = types.ModuleType("trainer")
sys.modules["trainer"].__path__ = ["trainer"]
from pathlib import Path
"""
WRITER = f"""{LIGHT}
from trainer.labelling.answers import Answer, Answers
answers = Answers(Path(sys.argv[1]))
number = int(sys.argv[2])
while True:
    caption = "é" * (number % 3000)
    answers.add(Answer(image=str(number), captions=(caption,), action="edit", revision=1, when=""))
    print(number, flush=True)
    number += 1
"""
OWNER = f"""{LIGHT}
from trainer.labelling.answers import Answers
Answers(Path(sys.argv[1]))
"""


def test_a_killed_process_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    draw, done = random.Random(0), 0
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(done)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(draw.randint(5, 60)):
                done = int(process.stdout.readline()) + 1
            process.kill()
            rest = process.stdout.read().split()  # acknowledged before the kill came through
            done = max([done, *(int(line) + 1 for line in rest)])
        found, _ = reopened(tmp_path)
        assert {str(number) for number in range(done)} <= found.keys()
        assert all(len(one.captions[0]) == int(one.image) % 3000 for one in found.values())
        done = len(found)  # the last one may be on disk without having been acknowledged
    assert done > 15


@pytest.mark.parametrize("cut", [1, 20, 61, 75, 76, 77, 78])
def test_half_a_line_is_mended_wherever_it_was_cut(tmp_path: Path, cut: int) -> None:
    with closing(Answers(tmp_path)) as answers:
        answers.add(answer("a.jpg", captions=["one"]))
    path = tmp_path / "answers.jsonl"
    whole = path.read_bytes()
    torn = answer("b.jpg", captions=["ééééé"]).model_dump_json().encode()[:cut]
    path.write_bytes(whole + torn)
    [example] = read_examples_of(path)  # before it is mended, too
    assert example.captions == ("one",)
    with closing(Answers(tmp_path)) as answers:
        [note] = answers.notes
        assert "answers.jsonl:2: half a line" in note
        assert path.read_bytes() == whole
        assert answers.add(answer("c.jpg"))
    found, notes = reopened(tmp_path)
    assert (list(found), notes) == (["a.jpg", "c.jpg"], [])
    assert (tmp_path / "answers.jsonl.torn").read_bytes() == torn + b"\n"


def read_examples_of(path: Path):
    (path.parent / "a.jpg").touch()
    return read_examples(path)


def test_a_whole_line_without_its_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(answer("a.jpg").model_dump_json())
    found, [note] = reopened(tmp_path)
    assert list(found) == ["a.jpg"]
    assert "jsonl:1: the last line had no end" in note
    with closing(Answers(tmp_path)) as answers:
        answers.add(answer("b.jpg"))
    assert list(reopened(tmp_path)[0]) == ["a.jpg", "b.jpg"]


def test_faulty_lines_are_named_and_stay(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    good = answer("a.jpg").model_dump_json().encode()
    lines = [
        good,
        b'{"image": "b.jpg", "captions": ["caf\xe9"]}',
        b"not json",
        b'{"image": "c.jpg", "captions": ["x"], "action": "dance", "revision": 1, "when": ""}',
        b'{"image": "d.jpg", "image": "e.jpg"}',
        answer("a.jpg", captions=["of another machine"]).model_dump_json().encode(),
    ]
    body = b"\n".join(lines) + b"\n"
    path.write_bytes(body)
    found, notes = reopened(tmp_path)
    assert path.read_bytes() == body
    assert found["a.jpg"].captions == ("of another machine",)
    assert found["a.jpg"].revision == 2
    expected = [
        ":2: byte 0xe9 is not UTF-8",
        ":3: not JSON",
        ":4: no answer: action:",
        ":5: the key 'image' is there twice",
        ":6: a.jpg has revision 1, which does not follow 1 of line 1",
    ]
    assert len(notes) == len(expected)
    assert all(want in note for want, note in zip(expected, notes, strict=True))


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "answers.jsonl"
    with closing(Answers(tmp_path)) as answers:
        answers.add(answer("a.jpg"))
        before = path.read_bytes()
        write, calls = os.write, []

        def full(file: int, body: bytes) -> int:
            calls.append(body)
            if len(calls) > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(file, body[:10])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match="No space left"):
                answers.add(answer("b.jpg"))
        assert len(calls) == 2
        assert path.read_bytes() == before
        assert answers.last("b.jpg") is None
        assert answers.add(answer("b.jpg"))
    assert list(reopened(tmp_path)[0]) == ["a.jpg", "b.jpg"]


def test_half_a_line_that_cannot_be_taken_back_does_not_spoil_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Answers(tmp_path)) as answers:
        answers.add(answer("a.jpg"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fails)
            patch.setattr(os, "ftruncate", fails)
            with pytest.raises(OSError, match="Input/output"):
                answers.add(answer("b.jpg"))
        with (tmp_path / "answers.jsonl").open("ab") as file:
            file.write(b'{"image": "half')
        assert answers.add(answer("c.jpg"))
    found, notes = reopened(tmp_path)
    assert "c.jpg" in found and len(notes) == 1 and ":3: not JSON" in notes[0]


def fails(*_: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_a_file_that_was_replaced_gets_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with closing(Answers(tmp_path)) as answers:
        answers.add(answer("a.jpg"))
        path.rename(tmp_path / "moved.jsonl")
        for content in (None, "{}\n"):
            if content:
                path.write_text(content)
            with pytest.raises(OSError, match=r"was moved, removed or replaced"):
                answers.add(answer("b.jpg"))
        (tmp_path / "moved.jsonl").replace(path)
        assert answers.add(answer("b.jpg"))
    assert list(reopened(tmp_path)[0]) == ["a.jpg", "b.jpg"]


def test_two_processes_cannot_own_it(tmp_path: Path) -> None:
    with closing(Answers(tmp_path)):
        command = [sys.executable, "-c", OWNER, str(tmp_path)]
        other = subprocess.run(command, capture_output=True, text=True, check=False)
        assert other.returncode == 1
        assert "another `python -m trainer label` writes there" in other.stderr
        with pytest.raises(DataError, match="another"):
            Answers(tmp_path)
    Answers(tmp_path).close()


def test_after_closing_nothing_is_written(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    answers.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        answers.add(answer("a.jpg"))


def test_captions_are_kept_in_one_line() -> None:
    assert cleaned("  a\tdog\x00 \n runs\u2028fast  ") == "a dog runs fast"
    family = "👩\u200d👧 \u0645\u06cc\u200c\u062e\u0648"
    assert cleaned(family) == family
