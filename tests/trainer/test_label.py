"""`python -m trainer label`: what it prints, what it leaves, and that finetune reads it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from PIL import Image

from trainer.config import validate
from trainer.data import read_examples
from trainer.errors import CheckpointError, DataError
from trainer.labelling.answers import Answers
from trainer.labelling.photo_list import read_photos
from trainer.labelling.proposals import Proposals
from trainer.labelling.refits import read_rounds
from trainer.labelling.session import Session
from trainer.stages import label
from trainer.stages._rounds import Rounds, newest_run

PATIENCE_S = 300
GPT2 = Path("trainer/recipes/tiny/gpt2.toml")


@pytest.fixture
def label_with(monkeypatch: pytest.MonkeyPatch):
    """Returns a function that runs the stage while `work(client)` labels and then ends the page."""
    serve = label._serve

    def run(
        config: dict, out: Path, work, ends_with: signal.Signals | None = signal.SIGINT
    ) -> None:
        errors: list[BaseException] = []

        def person(url: str) -> None:
            origin = {"Origin": url.rstrip("/")}
            try:
                with httpx.Client(base_url=url, headers=origin, verify=False, timeout=60) as client:
                    assert client.get("/").status_code == 200
                    work(client)
            except BaseException as error:
                errors.append(error)
            if ends_with is not None:
                os.kill(os.getpid(), ends_with)

        def served(server, enough, **options) -> None:
            thread = threading.Thread(target=person, args=(server.url,))
            thread.start()
            serve(server, enough, **options)
            thread.join()

        monkeypatch.setattr(label, "_serve", served)
        label.run(validate(label.Config, config, "label"), out)
        if errors:
            raise errors[0]

    return run


def answer(client, number: int, *captions: str, revision: int = 0, action: str = "edit") -> None:
    body = {"tab": "t", "revision": revision, "action": action, "captions": captions}
    response = client.post(f"/api/photos/{number}", json=body)
    assert response.status_code == 200, response.text


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.png", "b.png", "deep/c.png", "d.png"):
        Image.new("RGB", (48, 32), (200, len(name), 90)).save(folder / name)
    return folder


@pytest.mark.parametrize("ends_with", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_it_says_how_far_one_came_and_what_comes_next(
    label_with, photos: Path, tmp_path: Path, capsys, ends_with: signal.Signals
) -> None:
    out = tmp_path / "out"

    def work(client) -> None:
        answer(client, 0, "a red square", "a square")
        answer(client, 1, "wrong")
        answer(client, 1, "right", revision=1)
        answer(client, 2, action="skip")

    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    label_with({"images": photos}, out, work, ends_with)
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    text = capsys.readouterr().out
    assert re.search(r"the page is at http://127\.0\.0\.1:\d+/", text)
    assert f"2 of 4 images are labelled, 0 begun, 1 skipped: {out}/answers.jsonl" in text
    command = f"finetune RECIPE data.train={out}/answers.jsonl data.images={photos} --out"
    assert f"next: python -m trainer {command}" in text
    examples = read_examples(out / "answers.jsonl", images=photos)
    assert [(one.image.relative_to(photos).as_posix(), one.captions) for one in examples] == [
        ("a.png", ("a red square", "a square")),
        ("b.png", ("right",)),
        ("d.png", ()),
    ]
    assert {one.source for one in examples} == {"human"}


def test_the_same_command_goes_on_and_foreign_answers_are_named(
    label_with, photos: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    label_with({"images": photos}, out, lambda client: answer(client, 3, "a drawing"))
    (photos / "deep" / "c.png").unlink()

    def work(client) -> None:
        state = client.get("/api/next", params={"tab": "t"}).json()
        assert (state["photo"]["name"], state["progress"]["labelled"]) == ("a.png", 0)

    label_with({"images": photos}, out, work)
    text = capsys.readouterr().out
    assert "answers.jsonl: deep/c.png was answered, but is not among the images to label" in text
    assert "next: the same command goes on" in text
    assert "a drawing" in (out / "answers.jsonl").read_text()


def test_labels_come_in_and_go_out(label_with, photos: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "old.csv").write_text(
        "image,caption,source\na.png,a red square,human\nb.png,a machine's,synthetic\nz.png,x,\n"
    )
    picks = tmp_path / "picks.csv"
    picks.write_text("image,rank\ndeep/c.png,1\nz.png,2\n")
    coco, studio = tmp_path / "x" / "coco.json", tmp_path / "studio.json"
    config = {
        "images": photos,
        "labels": [tmp_path / "old.csv"],
        "picks": picks,
        "export": {"coco": coco, "label_studio": studio},
    }

    def work(client) -> None:
        assert coco.exists() and studio.exists()
        first = client.get("/api/next", params={"tab": "t"}).json()["photo"]
        assert first["name"] == "deep/c.png"
        other = client.get("/api/photos/1", params={"tab": "t"}).json()["photo"]
        assert (other["name"], other["proposals"]) == ("b.png", ["a machine's"])
        answer(client, first["number"], "a pick")

    label_with(config, tmp_path / "out", work)
    text = capsys.readouterr().out
    assert "old.csv: 1 labels taken over" in text
    assert "old.csv:4: z.png is not in" in text
    assert "picks.csv:3: z.png is not among the images to label" in text
    assert f"wrote {coco}" in text
    found = {one.image.name: one.captions for one in read_examples(coco, images=photos)}
    assert found == {"a.png": ("a red square",), "c.png": ("a pick",)}
    assert len(json.loads(studio.read_text())) == 4


def test_what_is_wrong_is_one_line(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = [
        ({"images": tmp_path / "empty"}, DataError, "holds no images"),
        ({"images": tmp_path / "none"}, DataError, "no such file or folder"),
        ({"images": photos, "model": tmp_path}, CheckpointError, "no training run"),
        ({"images": photos, "labels": [tmp_path / "x.csv"]}, DataError, "x.csv: no such file"),
        ({"images": photos, "picks": tmp_path / "x.csv"}, DataError, "x.csv: no such file"),
    ]
    for table, kind, message in cases:
        with pytest.raises(kind, match=message):
            label.run(validate(label.Config, table, "label"), tmp_path / "out")


def test_a_round_is_two_commands_whose_results_are_taken_up(photos: Path, tmp_path: Path) -> None:
    with closing(Answers(tmp_path / "out")) as answers:
        listed, folder, _ = read_photos(photos, None)
        session = Session(listed, answers, Proposals([one.path for one in listed]))
        rounds = Rounds(session, photos, folder, tmp_path / "out", GPT2, Path("order.toml"))
        training, order = rounds.steps(20)
        run = tmp_path / "out" / "refits" / "0020"
        after = training.words[training.words.index("trainer") + 1 :]
        assert after == [
            *("finetune", str(GPT2), f'data.train="{answers.path}"', f'data.images="{photos}"'),
            *("--out", str(run)),
        ]
        after = order.words[order.words.index("trainer") + 1 :]
        assert after == [
            *("acquire", "order.toml", f'images="{photos}"', f'labelled=["{answers.path}"]'),
            *(f'model="{run}"', "--out", str(tmp_path / "out" / "order")),
        ]
        (tmp_path / "out" / "order").mkdir()
        (tmp_path / "out" / "order" / "picks.csv").write_text("image,rank\nd.png,1\n")
        order.then()
        assert session.shown(session.next_number("t", beyond=False))["name"] == "d.png"
        with pytest.raises(CheckpointError):
            training.then()  # nothing was trained
        assert newest_run(tmp_path / "out") is None


@pytest.mark.slow
def test_the_model_learns_beside_the_page_and_proposes(
    label_with, shapes: Path, tmp_path: Path
) -> None:
    """The real commands: `acquire`'s recipe is none, so that step fails and the model stays."""
    examples = read_examples(shapes / "captions_train.json")
    captions = {one.image.name: one.captions[0] for one in examples}
    names = tmp_path / "train.txt"
    names.write_text("\n".join(captions))
    recipe = tmp_path / "refit.toml"
    body = re.sub(r"(?m)^dev = .*$", "", GPT2.read_text())
    recipe.write_text(re.sub(r"epochs = \d+", "epochs = 2", body))
    out = tmp_path / "out"
    config = {"images": names, "folder": shapes / "images", "refit": recipe, "refit_every": 10}

    def work(client) -> None:
        for number in range(10):
            shown = client.get(f"/api/photos/{number}", params={"tab": "t"}).json()["photo"]
            assert shown["proposals"] == []
            answer(client, number, captions[shown["name"]])
        end = time.monotonic() + PATIENCE_S
        query = {"tab": "t", "number": 12}
        while not (state := client.get("/api/status", params=query).json())["photo"]["proposals"]:
            assert state["refit"]["state"] in ("running", "done"), state["refit"]
            assert time.monotonic() < end
            time.sleep(0.1)
        assert len(state["photo"]["proposals"]) == 3

    label_with(config, out, work)
    assert [one.state for one in read_rounds(out)] == ["done"]
    assert newest_run(out) == out / "refits" / "0010"

    def again(client) -> None:
        assert client.get("/api/photos/12", params={"tab": "t"}).json()["photo"]["proposals"] != []

    label_with(config, out, again)  # the model that has learnt speaks, not none


@pytest.mark.slow
def test_a_page_that_is_killed_keeps_every_answer_it_took(photos: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "label.toml"
    recipe.write_text(f'images = "{photos}"\n')
    out = tmp_path / "out"
    command = [sys.executable, "-m", "trainer", "label", str(recipe), "--out", str(out)]
    for take in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            url = next(m[0] for line in process.stdout if (m := re.search(r"http://\S+/", line)))
            origin = {"Origin": url.rstrip("/")}
            with httpx.Client(base_url=url, headers=origin, verify=False, timeout=60) as client:
                for number in range(4):
                    answer(client, number, f"take {take}", revision=take)
            process.kill()
        rows = [json.loads(line) for line in (out / "answers.jsonl").read_bytes().splitlines()]
        assert len(rows) == 4 * (take + 1)
        assert {row["captions"][0] for row in rows[-4:]} == {f"take {take}"}


def test_the_page_ends_by_itself_when_there_are_enough_labels(
    label_with, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = {"images": photos, "until": 1}
    label_with(config, out, lambda client: answer(client, 0, "a red bus"), ends_with=None)
    assert "a red bus" in (out / "answers.jsonl").read_text()
