"""Bulk captioning of a folder: what is on disk after runs that end well, badly, or twice."""

import json
import os
import signal
import subprocess
import sys
import threading
from hashlib import sha256

import pytest
from filelock import FileLock
from live import expected, until

from exports.registry import Registry
from serving import bulk
from serving.__main__ import main
from serving.bulk_files import Asked, Line, Log
from trainer.data import read_examples


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_bundles):
    root = tmp_path_factory.mktemp("registry")
    for bundle in (tiny_bundles.one, tiny_bundles.two):
        Registry(root).publish(bundle)
    return root


@pytest.fixture
def folder(tmp_path, photos):
    """Three photographs, one of them deeper, and things that are none."""
    folder = tmp_path / "photos"
    (folder / "b" / "c").mkdir(parents=True)
    (folder / ".trash").mkdir()
    for name, photo in zip(("a.png", "b/c/d.JPG", "e.png"), photos, strict=False):
        (folder / name).write_bytes(photo)
    (folder / ".trash" / "f.png").write_bytes(photos[3])
    (folder / "notes.md").write_text("not a photograph")
    return folder


@pytest.fixture
def run(root, folder, tmp_path, capsys):
    """Runs `caption` on the folder; returns exit code, stdout, stderr and the file's rows."""
    out = tmp_path / "captions.jsonl"

    def run(*arguments, model="tiny@1", photos=folder, out=out):
        shared = ("--registry", str(root), "--model", model, "--threads", "1")
        code = main(["caption", *shared, str(photos), "--out", str(out), *arguments])
        return code, *capsys.readouterr(), rows(out)

    run.out = out
    return run


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


NAMES = ["a.png", "b/c/d.JPG", "e.png"]


def test_a_folder_becomes_a_file_of_captions(run, folder, tiny_captioner, photos):
    code, out, err, found = run("--num-beams", "3", "--num-captions", "2")
    assert (code, out) == (0, "")
    assert "3 photographs: 3 captioned" in err
    assert [row["image"] for row in found] == NAMES
    for row, photo in zip(found, photos, strict=False):
        wanted = expected(tiny_captioner, photo, num_beams=3, num_captions=2)
        assert row["captions"] == [one["text"] for one in wanted]
        assert row["scores"] == pytest.approx([one["score"] for one in wanted])
        assert row["sha256"] == sha256(photo).hexdigest()
        assert (row["model"], row["version"], row["source"]) == ("tiny", "1", "tiny@1")
        assert row["params"]["num_beams"] == 3
    assert sorted(path.name for path in folder.rglob("*.txt")) == []


def test_the_trainer_reads_the_file_and_the_sidecars(run, folder):
    found = run("--sidecar")[3]
    texts = [tuple(row["captions"]) for row in found]
    examples = read_examples(run.out, images=folder)
    assert [example.captions for example in examples] == texts
    assert {example.source for example in examples} == {"tiny@1"}  # nobody takes it for a person
    assert [example.captions for example in read_examples(folder)] == texts


def test_a_second_run_does_nothing_but_what_is_new(run, folder, photos, monkeypatch):
    first = run()[3]
    captioned = []
    inner = bulk.Captioner.caption_batch

    def counted(self, pixels, params):
        captioned.append(len(pixels))
        return inner(self, pixels, params)

    monkeypatch.setattr(bulk.Captioner, "caption_batch", counted)
    code, _, err, found = run()
    assert (code, found, captioned) == (0, first, [])
    assert "0 captioned" in err and "3 known already" in err

    (folder / "e.png").write_bytes(photos[4])  # another photograph under an old name
    (folder / "new.webp").write_bytes(photos[5])
    code, _, _, found = run()
    assert found[:3] == first
    assert [row["image"] for row in found[3:]] == ["e.png", "new.webp"]
    assert captioned == [2]

    found = run("--num-beams", "2")[3]  # asked in another way
    assert [row["image"] for row in found[5:]] == [*NAMES, "new.webp"]
    found = run("--num-beams", "2", model="tiny@2")[3]  # another version
    assert [row["version"] for row in found[9:]] == ["2"] * 4
    assert captioned == [2, 4, 4]
    assert run("--num-beams", "2", model="tiny@2")[3] == found


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_half_a_line_is_mended(run, kept):
    whole = run()[3]
    content = run.out.read_bytes()
    last = content[:-1].rpartition(b"\n")[2] + b"\n"
    run.out.write_bytes(content[: -len(last)] + last[:kept])
    code, _, err, found = run()
    assert (code, found) == (0, whole)
    assert "half a line" in err
    assert "1 captioned" in err


@pytest.mark.parametrize(
    "content",
    ["Dear diary", "Dear diary\n", '{"image": "a.png", "captions": ["mine"]}\n', "[1]\n", "\n"],
)
def test_a_file_of_somebody_else_is_left_alone(run, root, folder, capsys, content):
    run.out.write_text(content)
    shared = ("--registry", str(root), "--model", "tiny@1", "--threads", "1")
    assert main(["caption", str(folder), "--out", str(run.out), "--sidecar", *shared]) == 1
    assert "not written by this command" in capsys.readouterr().err
    assert run.out.read_text() == content
    assert not list(folder.rglob("*.txt"))


def test_what_fails_is_named_and_recorded_and_the_rest_goes_on(run, folder, photos):
    (folder / "b" / "broken.png").write_bytes(photos[0][:60])
    (folder / "b" / "letter.jpg").write_text("Dear reader")
    os.mkfifo(folder / "b" / "pipe.png")  # not a file: passed over
    code, _, err, found = run("--sidecar")
    assert code == 1
    assert "2 failed" in err and "3 captioned" in err
    assert f"error: {folder}/b/broken.png: " in err
    failed = {row["image"]: row for row in found if "error" in row}
    assert failed.keys() == {"b/broken.png", "b/letter.jpg"}
    assert failed["b/letter.jpg"]["captions"] == []
    assert failed["b/letter.jpg"]["sha256"] == sha256(b"Dear reader").hexdigest()
    assert not (folder / "b" / "letter.txt").exists()
    assert len(found) == 5

    code, _, err, again = run()  # it fails again, and says so, but its row stands there already
    assert (code, again) == (1, found)
    assert "2 failed" in err and "3 known" in err
    (folder / "b" / "letter.jpg").write_bytes(photos[5])
    (folder / "b" / "broken.png").unlink()
    code, _, _, found = run()
    assert code == 0
    assert found[-1]["image"] == "b/letter.jpg" and "error" not in found[-1]


def test_a_model_without_an_answer_fails_that_photograph_alone(run, folder, black_photo):
    (folder / "b.png").write_bytes(black_photo)
    code, _, err, found = run()
    assert code == 1
    assert "b.png: tiny@1 gave numbers" in err
    assert [row["image"] for row in found if "error" not in row] == NAMES


def test_sidecars_are_written_and_those_of_others_are_not_touched(run, folder):
    (folder / "e.txt").write_text("my own words\n")
    code, _, err, found = run("--sidecar")
    assert code == 0
    assert (folder / "a.txt").read_text() == found[0]["captions"][0] + "\n"
    assert (folder / "b" / "c" / "d.txt").read_text() == found[1]["captions"][0] + "\n"
    assert (folder / "e.txt").read_text() == "my own words\n"
    assert "1 sidecars are somebody else's" in err

    (folder / "b" / "c" / "d.txt").write_text("corrected\n")  # now it is theirs
    (folder / "a.txt").unlink()
    run("--sidecar")
    assert (folder / "a.txt").exists()  # known already, but what is missing is put back
    found = run("--sidecar", model="tiny@2")[3][3:]
    assert (folder / "a.txt").read_text() == found[0]["captions"][0] + "\n"  # ours: follows
    assert (folder / "b" / "c" / "d.txt").read_text() == "corrected\n"

    assert run("--sidecar", "--overwrite", model="tiny@2")[0] == 0
    assert (folder / "b" / "c" / "d.txt").read_text() == found[1]["captions"][0] + "\n"
    assert (folder / "e.txt").read_text() == found[2]["captions"][0] + "\n"
    assert not list(folder.rglob("*.partial"))


def test_two_photographs_of_one_name_do_not_fight_for_the_sidecar(run, folder, photos):
    (folder / "a.jpg").write_bytes(photos[6])
    _, _, err, found = run("--sidecar")
    assert (folder / "a.txt").read_text() == found[0]["captions"][0] + "\n"  # a.jpg came first
    assert "1 sidecars" in err
    run("--sidecar")
    assert (folder / "a.txt").read_text() == found[0]["captions"][0] + "\n"


def test_a_sidecar_that_cannot_be_written_is_named(run, folder):
    (folder / "a.txt").mkdir()
    code, _, err, found = run("--sidecar")
    assert code == 1
    assert "a.txt: Is a directory" in err
    assert len(found) == 3


def test_captions_of_several_lines_stand_in_one_sidecar(run, folder):
    found = run("--sidecar", "--num-captions", "3")[3]
    assert (folder / "a.txt").read_text().splitlines() == found[0]["captions"]
    assert len(found[0]["captions"]) == 3


def test_a_name_that_is_no_text_is_recorded(run, folder, photos):
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(photos[0])
    code, _, _, found = run()
    assert code == 0
    assert "caf\\udce9.png" in {row["image"] for row in found}


def test_many_batches_keep_their_order(root, tmp_path, photos, capsys, monkeypatch):
    monkeypatch.setattr(bulk, "SLOTS", 3)
    folder = tmp_path / "many"
    folder.mkdir()
    for at in range(20):
        (folder / f"{at:02}.png").write_bytes(photos[at % 8] if at != 7 else b"broken")
    out = tmp_path / "out.jsonl"
    shared = ("--registry", str(root), "--model", "tiny@1", "--threads", "1", "--out", str(out))
    assert main(["caption", str(folder), *shared]) == 1
    found = rows(out)
    assert [row["image"] for row in found] == [f"{at:02}.png" for at in range(20)]
    by_photo = {}
    for row in found:
        if "error" not in row:
            assert by_photo.setdefault(row["sha256"], row["captions"]) == row["captions"]
    assert len(by_photo) == 8


WRONG = {
    "json": (("--out", "x.jsonl", "--json"), "--out takes one folder"),
    "overwrite": (("--out", "x.jsonl", "--overwrite"), "add --sidecar"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_contradict_each_other(folder, capsys, name):
    arguments, words = WRONG[name]
    assert main(["caption", str(folder), *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert len(err.splitlines()) == 1


def test_out_takes_one_folder(folder, capsys):
    for photos in ([folder, folder], [folder / "a.png"]):
        assert main(["caption", *map(str, photos), "--out", "x.jsonl"]) == 1
        assert "--out takes one folder" in capsys.readouterr().err


def test_a_sidecar_needs_the_file_that_tells_whose_it_is(root, folder, capsys):
    shared = ("--registry", str(root), "--model", "tiny@1")
    assert main(["caption", str(folder), "--sidecar", *shared]) == 1
    assert "--sidecar needs --out" in capsys.readouterr().err


def test_an_empty_folder_and_a_file_that_cannot_be_written_are_errors(run, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err, _ = run(photos=tmp_path / "empty")
    assert (code, "holds no photographs" in err) == (1, True)
    code, _, err, _ = run(out=tmp_path)
    assert (code, err) == (1, f"error: {tmp_path}: Is a directory\n")
    assert run(out=tmp_path / "new" / "captions.jsonl")[0] == 0


def test_a_folder_without_out_is_printed(root, folder, capsys):
    shared = ("--registry", str(root), "--model", "tiny@1", "--threads", "1")
    assert main(["caption", str(folder), *shared]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{folder}/{name}" for name in NAMES]


def test_one_run_at_a_time(run):
    with FileLock(run.out.with_name(".captions.jsonl.lock")):
        code, _, err, _ = run()
    assert (code, "another run writes to it" in err) == (1, True)
    assert run()[0] == 0


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    log = Log(tmp_path / "log", Asked("m", "1", {}))
    log.append([Line("a", "1", ("a",), (0.0,))])
    real = os.write

    def short(descriptor, content):
        real(descriptor, content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(OSError, match="No space"):
        log.append([Line("b", "2", ("b",), (0.0,))])
    monkeypatch.undo()
    log.append([Line("c", "3", ("c",), (0.0,))])
    log.close()
    assert [row["image"] for row in rows(tmp_path / "log")] == ["a", "c"]


def start(root, folder, out):
    # Slow, so that it is in the middle when it is told to end; which a shell's background job, and
    # what such a job starts, would not hear.
    code = (
        "import signal, sys, time, serving.bulk as bulk; bulk.SLOTS = 2\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "real = bulk._caption_batch\n"
        "bulk._caption_batch = lambda *given: (time.sleep(0.02), real(*given))[1]\n"
        "from serving.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    shared = ("--registry", str(root), "--model", "tiny@1", "--threads", "1", "--out", str(out))
    command = [sys.executable, "-c", code, "caption", str(folder), "--sidecar", *shared]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


MANY = 300


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_goes_on_where_it_stopped(root, tmp_path, photos, run, number):
    folder = tmp_path / "many"
    folder.mkdir()
    for at in range(MANY):
        (folder / f"{at:03}.png").write_bytes(photos[at % 8] + bytes([at % 256, at // 256]))
    with start(root, folder, run.out) as process:
        watchdog = threading.Timer(100, process.kill)
        watchdog.start()
        try:
            until(lambda: len(run.out.read_bytes() if run.out.exists() else b"") > 4000)
            process.send_signal(number)
            err = process.communicate()[1]
        finally:
            watchdog.cancel()
            process.kill()
    before = run.out.read_bytes()
    done = before.count(b"\n")
    assert 0 < done < MANY
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "goes on from here" in err
        assert before.endswith(b"\n")
    code, _, err, found = run("--sidecar", photos=folder)
    assert code == 0
    assert f"{done} known already" in err
    assert [row["image"] for row in found] == [f"{at:03}.png" for at in range(MANY)]
    assert len(list(folder.glob("*.txt"))) == MANY
    assert not list(folder.glob(".*.partial"))
