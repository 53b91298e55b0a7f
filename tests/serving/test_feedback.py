"""Corrections: what is on disk after them, and that the trainer reads it."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import pytest
from chromium import chromium
from filelock import FileLock
from live import as_base64, check_problem, running
from PIL import Image
from tiny_bundle import picture

from exports.registry import Registry
from serving import feedback_store
from serving.errors import StorageFull
from serving.feedback_store import FeedbackStore, Note
from trainer.data import read_examples
from trainer.labelling.answers import Answers


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_bundles):
    root = tmp_path_factory.mktemp("registry")
    Registry(root).publish(tiny_bundles.one)
    return root


@pytest.fixture(scope="module")
def serving(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("feedback") / "kept"
    with running(root, feedback_dir=folder, max_body_bytes=2_000_000) as live:
        yield live, folder


@pytest.fixture
def live(serving):
    return serving[0]


@pytest.fixture
def kept(serving):
    return serving[1]


def correct(live, photo, correction="", **fields):
    if correction:
        fields["correction"] = correction
    return live.client.post("/v1/feedback", files={"image": ("mine.png", photo)}, data=fields)


def rows(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def note(correction="", caption="a cat", rating=None):
    return Note(caption, correction, rating, "", "tiny@1")


def test_the_trainer_reads_what_the_server_wrote(live, kept, photos):
    captions = ["a dog in the snow", "ein Hund im Schnee, 犬"]
    for photo, caption in zip(photos, captions, strict=False):
        answer = correct(live, photo, caption, caption="a cat", model="tiny@1")
        assert answer.status_code == 201, answer.text
        assert answer.json()["image"] == f"{sha256(photo).hexdigest()}.png"
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
    found = read_examples(kept / "answers.jsonl")[:2]
    assert [example.captions for example in found] == [(caption,) for caption in captions]
    assert [example.image.read_bytes() for example in found] == photos[:2]
    assert {example.source for example in found} == {"human"}
    with Image.open(found[0].image) as image:
        assert image.size == (64, 48)


def test_the_labelling_page_takes_the_file_for_its_own(live, kept, photos):
    photo = photos[2]
    for correction, fields in (
        ("", {"caption": "a cat", "rating": 1}),
        ("a dog", {"caption": "a cat"}),
        ("a dog", {"caption": "a dog"}),
        ("", {"rating": 5}),  # takes no caption away
    ):
        assert correct(live, photo, correction, **fields).status_code == 201
    answers = Answers(kept)
    assert answers.notes == []
    last = answers.last(f"{sha256(photo).hexdigest()}.png")
    answers.close()
    assert (last.revision, last.captions, last.action) == (4, ("a dog",), "skip")
    mine = [row for row in rows(kept) if row["image"] == last.image]
    assert [row["action"] for row in mine] == ["skip", "edit", "accept", "skip"]
    assert [row["captions"] for row in mine] == [[], ["a dog"], ["a dog"], ["a dog"]]
    assert mine[0]["rating"] == 1 and mine[0]["proposals"] == ["a cat"]
    assert mine[2]["proposal"] == 1


def test_json_is_taken_too(live, kept, photos):
    [image] = as_base64(photos[3])
    body = {"image": image, "correction": "  a\tred\n ball\u0007 ", "rating": 2, "request_id": "r1"}
    assert live.client.post("/v1/feedback", json=body).status_code == 201
    assert rows(kept)[-1]["captions"] == ["a red ball"]
    assert (rows(kept)[-1]["rating"], rows(kept)[-1]["request_id"]) == (2, "r1")


def test_every_type_of_image_gets_its_suffix(live, kept):
    for kind, suffix in (("JPEG", ".jpg"), ("WEBP", ".webp"), ("GIF", ".gif"), ("TIFF", ".tif")):
        name = correct(live, picture(9, format=kind), "a ball").json()["image"]
        assert name.endswith(suffix)
        assert (kept / "images" / name).is_file()


WRONG = {
    "no photograph": (422, lambda photo: {"json": {"correction": "a dog", "request_id": "r1"}}),
    "no photograph in a form": (422, lambda photo: {"files": {"correction": (None, "a dog")}}),
    "two photographs": (
        422,
        lambda photo: {"files": [("image", ("a", photo)), ("image", ("b", photo))]},
    ),
    "nothing said": (422, lambda photo: {"json": {"image": as_base64(photo)[0]}}),
    "blanks": (422, lambda photo: {"json": {"image": as_base64(photo)[0], "correction": " \n"}}),
    "rating 6": (422, lambda photo: {"json": {"image": as_base64(photo)[0], "rating": 6}}),
    "rating as text": (422, lambda photo: {"json": {"image": as_base64(photo)[0], "rating": "5"}}),
    "too long": (
        422,
        lambda photo: {"json": {"image": as_base64(photo)[0], "correction": "a" * 501}},
    ),
    "half a surrogate": (
        422,
        lambda photo: {
            "content": json.dumps({"image": as_base64(photo)[0], "correction": "\ud800"}),
            "headers": {"content-type": "application/json"},
        },
    ),
    "unknown": (422, lambda photo: {"json": {"image": as_base64(photo)[0], "stars": 5}}),
    "no image": (415, lambda photo: {"json": {"image": as_base64(b"text")[0], "rating": 5}}),
    "half an image": (
        400,
        lambda photo: {"json": {"image": as_base64(photo[:60])[0], "rating": 5}},
    ),
    "no base64": (400, lambda photo: {"json": {"image": "?", "rating": 5}}),
    "an image alone": (
        415,
        lambda photo: {"content": photo, "headers": {"content-type": "image/png"}},
    ),
    "too many bytes": (413, lambda photo: {"json": {"image": "x" * 2_000_000}}),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_and_nothing_is_kept(live, kept, photos, name):
    assert correct(live, photos[0], "a dog").status_code == 201
    before = sorted(kept.rglob("*")), rows(kept)
    status, request = WRONG[name]
    check_problem(live.client.post("/v1/feedback", **request(photos[7])), status)
    assert (sorted(kept.rglob("*")), rows(kept)) == before


def test_a_server_that_was_not_asked_to_keeps_nothing(root, photos):
    with running(root) as live:
        problem = check_problem(correct(live, photos[0], "a dog"), 404)
        assert "feedback_dir" in problem["detail"]
        assert "data-feedback" not in live.client.get("/").text
        assert live.metrics()["cutline_requests_total", "404", "feedback"] == 1


def test_no_more_than_the_budget_is_kept(root, tmp_path, photos):
    with running(root, feedback_dir=tmp_path, feedback_bytes=3 * 4096 + 2000) as live:
        codes = [correct(live, photo, "a dog").status_code for photo in photos]
        assert codes[0] == 201
        assert set(codes) == {201, 507}
        refused = photos[codes.index(507)]
        problem = check_problem(correct(live, refused, "a dog"), 507)
        assert "nothing was kept" in problem["detail"]
        sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
        assert sum(sizes) <= 3 * 4096 + 2000
        assert len(rows(tmp_path)) == codes.count(201)
    with running(root, feedback_dir=tmp_path, feedback_bytes=3 * 4096 + 2000) as live:
        assert correct(live, refused, "a dog").status_code == 507  # it counts what is there


def test_a_full_disk_is_said_and_leaves_whole_lines(tmp_path, photos, monkeypatch):
    store = FeedbackStore(tmp_path, 10**6)
    store.add(photos[0], ".png", note("a dog"))

    def short(descriptor, content):
        real(descriptor, content[:10])
        raise OSError(28, "No space left on device")

    real = os.write
    monkeypatch.setattr(os, "write", short)
    with pytest.raises(StorageFull):
        store.add(photos[1], ".png", note("a cow"))
    monkeypatch.undo()
    assert len(rows(tmp_path)) == 1
    store.add(photos[1], ".png", note("a cow"))
    assert [row["captions"] for row in rows(tmp_path)] == [["a dog"], ["a cow"]]


def test_half_a_line_of_a_server_that_was_killed_is_taken_off(tmp_path, photos):
    FeedbackStore(tmp_path, 10**6).add(photos[0], ".png", note("a dog"))
    with (tmp_path / "answers.jsonl").open("ab") as file:
        file.write(b'{"image": "half')
    assert FeedbackStore(tmp_path, 10**6).add(photos[0], ".png", note("a cow"))[1] == 2
    assert [row["captions"] for row in rows(tmp_path)] == [["a dog"], ["a cow"]]


def test_several_servers_share_a_folder(tmp_path, photos):
    stores = [FeedbackStore(tmp_path, 10**6) for _ in range(3)]
    with ThreadPoolExecutor(6) as pool:
        jobs = [
            pool.submit(stores[at % 3].add, photos[at % 2], ".png", note(f"number {at}"))
            for at in range(30)
        ]
        revisions = sorted(job.result() for job in jobs)
    names = sorted(f"{sha256(photo).hexdigest()}.png" for photo in photos[:2])
    assert revisions == [(name, at) for name in names for at in range(1, 16)]
    answers = Answers(tmp_path)
    assert answers.notes == []
    answers.close()
    (tmp_path / "answers.jsonl").rename(tmp_path / "taken.jsonl")  # an operator took them away
    assert stores[0].add(photos[0], ".png", note("again"))[1] == 1


def test_nobody_waits_for_a_file_that_another_program_holds(root, tmp_path, photos, monkeypatch):
    monkeypatch.setattr(feedback_store, "_LOCK_S", 1.0)
    with running(root, feedback_dir=tmp_path) as live:
        assert correct(live, photos[0], "a dog").status_code == 201
        with FileLock(tmp_path / ".answers.jsonl.lock"):
            codes = []
            waiting = threading.Thread(
                target=lambda: codes.append(correct(live, photos[1], "a cow").status_code)
            )
            waiting.start()
            start = time.monotonic()
            assert live.client.get("/healthz").status_code == 200
            assert time.monotonic() - start < 0.9
            waiting.join()
            assert codes == [503]
        assert correct(live, photos[1], "a cow").status_code == 201


def test_only_so_many_wait_for_the_disk(root, tmp_path, photos):
    with running(root, feedback_dir=tmp_path) as live, ThreadPoolExecutor(24) as pool:
        with FileLock(tmp_path / ".answers.jsonl.lock"):
            jobs = [pool.submit(correct, live, photos[0], f"a {at}") for at in range(24)]
            time.sleep(1)
        answers = [job.result() for job in jobs]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) >= 8
        assert all(answer.headers["retry-after"] for answer in refused)
        taken = [answer for answer in answers if answer.status_code == 201]
        assert taken
        assert len(rows(tmp_path)) == len(taken)


@pytest.mark.browser
def test_a_caption_is_corrected_on_the_page_by_keyboard(serving, tmp_path):
    live, kept = serving
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(picture(33, size=(640, 480), format="JPEG"))
    with chromium(tmp_path / "profile") as page:
        page.open(str(live.client.base_url.join("/")))
        hidden = "document.querySelector('#correct').offsetParent === null"
        assert page.evaluate(hidden)
        assert page.evaluate("document.querySelector('#kept').hidden") is False
        page.choose(photo, "#file")
        page.until(f"!({hidden})")
        said = page.evaluate("document.querySelector('#better').value")
        assert said == page.evaluate("document.querySelector('#captions p').textContent")
        # What the keyboard reaches: a label that names the field, a button that Tab comes to.
        assert page.evaluate("document.querySelector('#better').labels[0].textContent")
        page.evaluate("document.querySelector('#better').focus()")
        page.evaluate("document.querySelector('#better').select()")
        page.call("Input.insertText", text="a boat <b>at</b> sea")
        for kind in ("keyDown", "keyUp"):
            page.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key="Enter",
                code="Enter",
                text="\r" if kind == "keyDown" else "",
                windowsVirtualKeyCode=13,
            )
        page.until("document.querySelector('#thanks').textContent.startsWith('Thank you')")
        assert page.errors == []
    row = rows(kept)[-1]
    assert row["captions"] == ["a boat <b>at</b> sea"]
    assert row["proposals"] == [said]
    assert row["model"] == "tiny@1"
    assert (kept / "images" / row["image"]).read_bytes() == photo.read_bytes()
