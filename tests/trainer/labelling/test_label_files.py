"""Labels of other tools: taken over line by line, handed on, and the same after a round trip."""

import json
from pathlib import Path

import pytest
from desk import desk, photographs

from trainer.data import read_examples
from trainer.errors import DataError
from trainer.labelling.label_files import export_coco, read_labels, take_over
from trainer.labelling.label_studio import export_label_studio
from trainer.labelling.photo_list import read_photos, read_picks


def read(folder: Path, name: str, body: str | bytes):
    path = folder / name
    path.write_bytes(body.encode() if isinstance(body, str) else body)
    photos = photographs(folder / "photos")
    return read_labels(path, photos, folder / "photos")


def test_a_fault_of_one_line_is_named_and_the_others_are_taken(tmp_path: Path) -> None:
    (tmp_path / "outside.png").touch()
    (tmp_path / "photos" / "new").mkdir(parents=True)
    (tmp_path / "photos" / "new" / "late.png").touch()
    body = b"\n".join(
        [
            b"image,caption",
            b"p0.png,a dog",
            b"p1.png,a caf\xe9",
            b"p1.png,one, two",
            b'p1.png,"three" x',
            b"gone.png,a cat",
            b"../outside.png,a cat",
            b"/etc/passwd,a cat",
            b"new/late.png,a cat",
            b",a cat",
            b"p0.png,a  brown dog",
            b"p2.png,",
            b"p3.png,a bird",
        ]
    )
    labels = read(tmp_path, "labels.csv", body)
    assert labels.captions == {0: ["a dog", "a brown dog"], 3: ["a bird"]}
    expected = [
        "labels.csv:3: byte 0xe9 is not UTF-8",
        "labels.csv:4: 3 columns, but the header has 2",
        "labels.csv:5: ",
        "labels.csv:6: gone.png is not in ",
        "labels.csv:7: ../outside.png lies outside ",
        "labels.csv:8: /etc/passwd lies outside ",
        "labels.csv:9: new/late.png is not among the images to label",
        "labels.csv:10: image is ''",
        "labels.csv:11: p0.png is at ",
    ]
    notes = sorted(labels.notes, key=lambda note: int(note.split("labels.csv:")[1].split(":")[0]))
    assert len(notes) == len(expected)
    assert all(want in note for want, note in zip(expected, notes, strict=True))
    assert notes[-1].endswith("labels.csv:2 too; both are kept")
    assert (tmp_path / "labels.csv").read_bytes() == body


def test_jsonl_too(tmp_path: Path) -> None:
    lines = [
        b'{"image": "p0.png", "caption": "a dog", "caption": "a cat"}',
        b'{"image": "p1.png", "captions": ["a", "b"]}',
        b'{"image": "p2.png", "caption": "\xff"}',
        b"{",
        b'{"image": "p3.png", "caption": 3}',
    ]
    labels = read(tmp_path, "labels.jsonl", b"\n".join(lines))
    assert labels.captions == {1: ["a", "b"]}
    assert "jsonl:1: the key 'caption' is there twice" in labels.notes[0]
    assert [note.split("jsonl:")[1][0] for note in labels.notes] == ["1", "3", "4", "5"]


def test_zero_labels_are_a_note_and_no_file_an_error(tmp_path: Path) -> None:
    labels = read(tmp_path, "labels.csv", "image,caption\np0.png,\n")
    assert labels.captions == {}
    assert labels.notes == [
        f"{tmp_path}/labels.csv: no caption that a person wrote of an image here"
    ]
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        read_labels(tmp_path / "none.csv", photographs(tmp_path / "photos"), tmp_path / "photos")


def test_what_a_model_wrote_is_proposed_and_not_believed(tmp_path: Path) -> None:
    body = "image,caption,source\np0.png,a dog,human\np0.png,a hound,synthetic\np1.png,sale!,web\n"
    labels = read(tmp_path, "labels.csv", body)
    assert labels.captions == {0: ["a dog"]}
    assert labels.proposals == {0: ["a hound"], 1: ["sale!"]}


def test_names_may_start_from_the_photographs_or_from_the_file(tmp_path: Path) -> None:
    inside = tmp_path / "photos" / "p2.png"
    body = f"image,caption\np0.png,a\nphotos/p1.png,b\n{inside},c\n./x/../p3.png,d\n"
    labels = read(tmp_path, "labels.csv", body)
    assert labels.captions == {0: ["a"], 1: ["b"], 2: ["c"], 3: ["d"]}


def studio(image: str, *texts: str, **more) -> dict:
    value = {"text": list(texts)}
    result = [{"from_name": "c", "to_name": "i", "type": "textarea", "value": value}]
    return {"data": {"image": image}, "annotations": [{"result": result}], **more}


def test_label_studio_s_tasks_are_taken_over(tmp_path: Path) -> None:
    told = {"predictions": studio("", "a hound")["annotations"]}
    tasks = [
        studio("/data/local-files/?d=photos%2Fp0.png", "a dog", "a brown  dog", **told),
        studio("/data/upload/3/0a1b2c3d-p1.png", "a cat"),
        {"data": {"image": "https://host/bucket/p2.png"}, "annotations": [{"was_cancelled": True}]},
        {
            "data": {"image": "s3://bucket/deep/p3.png"},
            "completions": studio("", "x")["annotations"],
        },
        {"data": {"image": "p9.png"}, "annotations": []},
        {"data": {"text": "no image"}, "annotations": []},
        {"data": {"image": "p3.png"}, "annotations": "broken"},
    ]
    rating = {"type": "rating", "value": {"rating": 4}}
    tasks[1]["annotations"][0]["result"].append(rating)
    labels = read(tmp_path, "tasks.json", json.dumps(tasks))
    assert labels.captions == {0: ["a dog", "a brown dog"], 1: ["a cat"], 3: ["x"]}
    assert labels.skipped == {2}
    assert labels.proposals[0] == ["a hound"]
    expected = ["task 4: p9.png is not in", "task 5: data names no image", "task 6: annotations is"]
    assert all(any(want in note for note in labels.notes) for want in expected)


def test_what_is_answered_here_stays(tmp_path: Path) -> None:
    with desk(tmp_path) as session:
        session.answer(0, "edit", ["mine"], revision=0)
        session.answer(1, "edit", ["the same"], revision=0)
        body = "image,caption\np0.png,theirs\np1.png,the same\np2.png,new\n"
        labels = read(tmp_path, "labels.csv", body)
        count, [note] = take_over(labels, session)
        assert count == 1
        assert "p0.png: has been answered here otherwise" in note
        assert session.shown(0)["captions"] == ["mine"]
        assert (session.shown(2)["action"], session.shown(2)["captions"]) == ("import", ["new"])
        assert take_over(labels, session)[0] == 0  # once is enough


@pytest.mark.parametrize("kind", ["coco", "label_studio"])
def test_labels_survive_a_round_trip(tmp_path: Path, kind: str) -> None:
    captions = {0: ["a dog", 'a "brown" dog, at a café 🐕'], 2: ["two <people>"]}
    proposals = {1: ["a cat"], 2: ["people"]}
    path = tmp_path / "exported" / "labels.json"
    with desk(tmp_path / "one", given=proposals) as session:
        for number, texts in captions.items():
            session.answer(number, "edit", texts, revision=0)
        session.answer(3, "skip", [], revision=0)
        session.answer(1, "edit", ["wrong"], revision=0)
        session.answer(1, "clear", [], revision=1)
        folder = session.photos[0].path.parent
        if kind == "coco":
            export_coco(path, session.answers, folder)
        else:
            export_label_studio(path, session)
        labels = read_labels(path, session.photos, folder)
    assert labels.captions == captions
    assert labels.notes == []
    examples = [one for one in read_examples(path, images=folder) if one.captions]
    assert [list(one.captions) for one in examples] == list(captions.values())
    if kind == "label_studio":
        assert labels.skipped == {3}
        assert {number: texts for number, texts in labels.proposals.items() if texts} == proposals
        tasks = json.loads(path.read_text(encoding="utf-8"))
        assert tasks[0]["data"]["image"] == "/data/local-files/?d=p0.png"
        assert tasks[1]["annotations"] == []


def test_answers_about_other_images_are_handed_on_too(tmp_path: Path) -> None:
    with desk(tmp_path, count=3) as session:
        session.answer(2, "edit", ["a dog"], revision=0)
    with desk(tmp_path, count=2) as session:
        path = tmp_path / "tasks.json"
        export_label_studio(path, session)
        [task] = [one for one in json.loads(path.read_text()) if one["annotations"]]
        assert task["data"]["image"].endswith("p2.png")


def test_photographs_to_label_are_those_without_captions(tmp_path: Path) -> None:
    photographs(tmp_path / "photos")
    body = "image,caption\np0.png,\np1.png,a dog\ngone.png,\np2.png,\n../outside.png,\n"
    (tmp_path / "outside.png").touch()
    (tmp_path / "list.csv").write_text(body)
    photos, root, notes = read_photos(tmp_path / "list.csv", tmp_path / "photos")
    assert [photo.name for photo in photos] == ["p0.png", "p2.png"]
    assert root == tmp_path / "photos"
    assert "list.csv:4: 'gone.png' is not in" in notes[0]
    assert "list.csv:6: '../outside.png' lies outside" in notes[1]
    assert "1 images have captions there already" in notes[2]
    (tmp_path / "done.csv").write_text("image,caption\np0.png,a dog\n")
    with pytest.raises(DataError, match=r"done\.csv: none of its 1 images is left to label; the"):
        read_photos(tmp_path / "done.csv", tmp_path / "photos")


def test_the_folder_of_photographs_is_found_beside_the_list(tmp_path: Path) -> None:
    photographs(tmp_path / "images", 2)
    (tmp_path / "raw.txt").write_text("p0.png\np1.png\n")
    photos, root, _ = read_photos(tmp_path / "raw.txt", None)
    assert root == tmp_path / "images"
    assert [photo.name for photo in photos] == ["p0.png", "p1.png"]
    bad = tmp_path / "images" / "caf\udce9.png"
    (tmp_path / "images" / "p1.png").rename(bad)
    photos, root, notes = read_photos(tmp_path / "images", None)
    assert [photo.name for photo in photos] == ["p0.png"]
    assert "has a name that is not UTF-8" in notes[0]


def test_picks_are_read_in_their_order(tmp_path: Path) -> None:
    photos = photographs(tmp_path)
    (tmp_path / "picks.csv").write_text(
        "image,rank,reason\np2.png,1,typical\ngone.png,2,x\np0.png,3,x\n"
    )
    picks, [note] = read_picks(tmp_path / "picks.csv", photos)
    assert picks == ["p2.png", "p0.png"]
    assert "picks.csv:3: gone.png is not among" in note
