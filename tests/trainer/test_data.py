"""Every format of a data set is read into the same examples, and every fault names its line."""

import json
from pathlib import Path

import pytest
from PIL import Image

from trainer.data import Example, Only, check_apart, describe, read_examples, write_coco
from trainer.errors import DataError

# Two captioned images and one without; one caption has a comma, quotes and an accent.
CAPTIONS = {
    "a.jpg": ("a dog runs", 'a "brown" dog, at a café'),
    "b.png": ("two people ride bikes",),
    "c.webp": (),
}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(CAPTIONS):
        Image.new("RGB", (32, 24), (number * 40, 90, 120)).save(folder / name)
    return folder


def _records() -> list[dict[str, object]]:
    return [{"image": name, "caption": list(texts)} for name, texts in CAPTIONS.items()]


def _coco() -> dict[str, list[dict[str, object]]]:
    names = list(CAPTIONS)
    pairs = [(name, text) for name, texts in CAPTIONS.items() for text in texts]
    return {
        "images": [{"id": 100 + names.index(name), "file_name": name} for name in names],
        "annotations": [
            {"id": number, "image_id": 100 + names.index(name), "caption": text}
            for number, (name, text) in enumerate(pairs)
        ],
    }


def _karpathy() -> dict[str, object]:
    splits = dict(zip(CAPTIONS, ("train", "restval", "test"), strict=True))
    return {
        "dataset": "coco",
        "images": [
            {"filename": name, "split": splits[name], "sentences": [{"raw": t} for t in texts]}
            for name, texts in CAPTIONS.items()
        ],
    }


def _table(delimiter: str) -> str:
    lines = [f"Filename{delimiter}Caption"]
    for name, texts in CAPTIONS.items():
        quoted = ['"' + text.replace('"', '""') + '"' for text in texts or ("",)]
        lines += [f"{name}{delimiter}{text}" for text in quoted]
    return "\n".join(lines) + "\n"


FILES = {
    "coco.json": json.dumps(_coco()),
    "karpathy.json": json.dumps(_karpathy()),
    "list.json": json.dumps(_records()),
    "lines.jsonl": "\n".join(json.dumps(record) for record in _records()),
    "comma.csv": _table(","),
    "semicolon.csv": _table(";"),
    "tabs.tsv": _table("\t"),
    "kaggle.txt": _table(","),
    "wide.csv": 'image,caption_1,caption_2\na.jpg,a dog runs,"a ""brown"" dog, at a café"\n'
    "b.png,two people ride bikes,\nc.webp,,\n",
    "with_bom.csv": "\ufeff" + _table(","),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_reads_the_same_examples(pictures: Path, name: str) -> None:
    source = pictures.parent / name
    source.write_text(FILES[name], encoding="utf-8")
    examples = read_examples(source)  # finds `images/` beside the file by itself
    assert {item.image: item.captions for item in examples} == {
        pictures / image: texts for image, texts in CAPTIONS.items()
    }
    assert {item.source for item in examples} == {"human"}


def test_a_folder_is_read_with_its_subfolders_and_sidecars(
    pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (pictures / "a.txt").write_text("a dog runs\n\n  a brown dog \n", encoding="utf-8")
    (pictures / "deep").mkdir()
    Image.new("RGB", (32, 24)).save(pictures / "deep" / "D.JPEG")
    (pictures / "._a.jpg").write_bytes(b"what a Mac leaves behind")
    (pictures / "phone.heic").write_bytes(b"")
    (pictures / "notes.md").write_text("not an image")
    examples = read_examples(pictures)
    assert [item.image.relative_to(pictures).as_posix() for item in examples] == [
        *("a.jpg", "b.png", "c.webp", "deep/D.JPEG")
    ]
    assert examples[0].captions == ("a dog runs", "a brown dog")
    assert "1 .heic" in caplog.text


def test_a_list_of_names_gives_unlabelled_examples(pictures: Path) -> None:
    source = pictures.parent / "raw.txt"
    source.write_text("b.png\n\na.jpg\n")
    assert read_examples(source, images=pictures) == [
        Example(pictures / "b.png", (), None),
        Example(pictures / "a.jpg", (), None),
    ]


def test_a_part_is_kept_in_the_order_of_the_file_that_names_it(pictures: Path) -> None:
    source = pictures.parent / "coco.json"
    source.write_text(FILES["coco.json"])
    picks = pictures.parent / "picks.csv"
    picks.write_text("image,rank,score\nb.png,1,0.5\na.jpg,2,0.25\n")
    found = read_examples(source, only=Only(names=picks))
    assert [(item.image.name, item.captions) for item in found] == [
        ("b.png", CAPTIONS["b.png"]),
        ("a.jpg", CAPTIONS["a.jpg"]),
    ]
    assert read_examples(source, only=Only(names=picks, first=1)) == found[:1]
    assert [item.image.name for item in read_examples(source, only=Only(first=1))] == ["a.jpg"]
    picks.write_text("image\na.jpg\nz.jpg\ny.jpg\n")
    with pytest.raises(DataError, match=r"picks\.csv:3: z\.jpg is not in .*, nor are 1 others of"):
        read_examples(source, only=Only(names=picks))


def test_a_split_is_honoured_and_train_includes_restval(pictures: Path) -> None:
    source = pictures.parent / "karpathy.json"
    source.write_text(FILES["karpathy.json"])
    train = read_examples(source, split="train")
    assert [item.image.name for item in train] == ["a.jpg", "b.png"]
    with pytest.raises(DataError, match="'val'; it has restval, test, train"):
        read_examples(source, split="val")


def test_an_image_in_two_splits_is_refused(pictures: Path) -> None:
    source = pictures.parent / "leak.csv"
    source.write_text("image,caption,split\na.jpg,one,train\na.jpg,two,test\n")
    for split in (None, "train", "test"):
        with pytest.raises(DataError, match=r"leak\.csv:3: a\.jpg is in split 'test' here"):
            read_examples(source, split=split)


def test_captions_of_different_sources_stay_apart(pictures: Path) -> None:
    source = pictures.parent / "mixed.csv"
    source.write_text("image,caption,source\na.jpg,one,\na.jpg,buy now,web\na.jpg,two,human\n")
    assert [(item.source, item.captions) for item in read_examples(source)] == [
        ("human", ("one", "two")),
        ("web", ("buy now",)),
    ]


def test_of_the_labelling_page_s_rows_the_last_of_an_image_counts(
    pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def row(image: str, revision: int, *captions: str, action: str = "edit") -> str:
        fields = {"image": image, "captions": captions, "action": action, "revision": revision}
        return json.dumps(fields | {"source": "human"})

    lines = [
        row("a.jpg", 1, "wrong"),
        row("b.png", 1, "two people"),
        row("c.webp", 1, "a mistake"),
        row("a.jpg", 2, "a dog runs", "a dog"),
        row("c.webp", 2, action="skip"),
    ]
    source = pictures.parent / "answers.jsonl"
    torn = row("b.png", 2, "tw\u00f6").encode()
    source.write_bytes("\n".join(lines).encode() + b"\n" + torn[:-4])
    assert [(one.image.name, one.captions) for one in read_examples(source)] == [
        ("a.jpg", ("a dog runs", "a dog")),
        ("b.png", ("two people",)),
        ("c.webp", ()),
    ]
    assert "answers.jsonl:6: not JSON" in caplog.text
    source.write_text("\n".join([lines[0], "{", lines[1]]))
    with pytest.raises(DataError, match=r"answers\.jsonl:2: not JSON"):
        read_examples(source)


def test_label_studio_s_tasks_are_a_data_set(pictures: Path) -> None:
    def task(image: str, *texts: str) -> dict[str, object]:
        result = [{"type": "textarea", "value": {"text": list(texts)}}] if texts else []
        return {"data": {"image": image}, "annotations": [{"result": result}]}

    tasks = [
        task("/data/local-files/?d=a.jpg", *CAPTIONS["a.jpg"]),
        task("b.png", *CAPTIONS["b.png"]),
        task("c.webp"),
    ]
    source = pictures.parent / "tasks.json"
    source.write_text(json.dumps(tasks), encoding="utf-8")
    examples = read_examples(source)
    assert {item.image.name: item.captions for item in examples} == CAPTIONS
    assert describe(source, examples).startswith(f"{source}: read as Label Studio, 3 images")


FAULTS = {
    "latin.csv": ("image,caption\na.jpg,a caf\xe9\n".encode("latin-1"), r":2: byte 0xe9 is not"),
    "latin.json": (b'{"images":\n["\xff"]}', r":2: byte 0xff is not UTF-8"),
    "comma.csv": (b"image,caption\na.jpg,one, two\n", r":2: 3 columns, but the header has 2"),
    "quote.csv": (b'image,caption\na.jpg,one\nb.png,"two" x\n', r":3: .* a quote is doubled"),
    "columns.csv": (b"photo,words\na.jpg,one\n", r":2: no image among \(photo, words\)"),
    "nameless.csv": (b"image,caption\n,one\n", r":2: image is ''; expected an image name"),
    "bad.jsonl": (b'{"image": "a.jpg"}\n{"image": \n', r":2: not JSON"),
    "array.jsonl": (b"[1]\n", r":1: expected an object"),
    "number.jsonl": (b'{"image": "a.jpg", "caption": 3}\n', r":1: caption: 3 is neither"),
    "cut.json": (b'{"images":\n[', r":2: not JSON"),
    "other.json": (b'{"rows": []}', r"neither COCO captions"),
    "boxes.json": (
        b'{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1}]}',
        r"read as COCO captions: annotations\[0\]\.caption: Field required",
    ),
    "orphan.json": (
        b'{"images": [], "annotations": [{"image_id": 7, "caption": "x"}]}',
        r"annotations\[0\]: no image has the id 7",
    ),
    "twins.json": (
        b'{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.png"}],'
        b' "annotations": [{"image_id": 1, "caption": "x"}]}',
        r"images\[1\]: the id 1 is there twice",
    ),
    "twice.csv": (
        b"image,caption,caption\na.jpg,one,two\n",
        r":1: the column 'caption' is there twice",
    ),
    "half.jsonl": (b'{"image": "a.jpg", "caption": "\\ud83d"}\n', r":1: caption: .*surrogate"),
    "twice.jsonl": (
        b'{"image": "a.jpg", "text": "x", "text": "y"}\n',
        r":1: the key 'text' is there",
    ),
    "twice.json": (
        b'{"images": [],\n"images": []}',
        r"twice\.json: the key 'images' is there twice",
    ),
    "deep.json": (b"[" * 100_000, r"deep\.json: nested too deeply"),
    "nowhere.json": (b'[{"data": {"text": "x"}}]', r"task 0: data names no image"),
    "unread.json": (
        b'[{"data": {"image": "a.jpg"}, "annotations": [3]}]',
        r"task 0: annotations is",
    ),
    "prose.txt": (b"a.jpg\na dog runs\n", r":2: 'a dog runs' is not an image name"),
    "empty.csv": (b"", r"holds no images"),
    "model.pt": (b"", r"unknown format \.pt; give a folder"),
    "lost.txt": (b"z.jpg\n", r"none of its 1 images exist \(looked in .* for z\.jpg\)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_the_file_and_the_line(pictures: Path, name: str) -> None:
    body, message = FAULTS[name]
    source = pictures.parent / name
    source.write_bytes(body)
    with pytest.raises(DataError, match=message) as error:
        read_examples(source)
    assert str(error.value).startswith(str(source))


def test_sets_that_share_an_image_are_not_compared(pictures: Path) -> None:
    first = [Example(pictures / "a.jpg", ("x",), None), Example(pictures / "b.png", ("x",), None)]
    second = [Example(pictures / ".." / "images" / "b.png", ("y",), None)]
    check_apart(first[:1], second, "data.train", "data.dev")
    with pytest.raises(DataError, match=r"1 images are in both data\.train and data\.dev.*b\.png"):
        check_apart(first, second, "data.train", "data.dev")


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        read_examples(tmp_path / "nowhere")


def test_coco_survives_a_round_trip(pictures: Path) -> None:
    source, copy = pictures.parent / "coco.json", pictures.parent / "copy.json"
    coco = _coco()
    coco["images"][0]["split"] = "train"
    coco["annotations"][0]["caption"] = "as  written, even so \n"
    source.write_text(json.dumps(coco))
    examples = read_examples(source)
    write_coco(examples, copy, images=pictures)
    assert read_examples(copy) == examples
    written = json.loads(copy.read_text())
    for document in (coco, written):  # ids and order are the file's own affair
        names = {image["id"]: image.pop("file_name") for image in document["images"]}
        for image in document["images"]:
            image["file_name"] = names[image.pop("id")]
        for annotation in document["annotations"]:
            annotation["image_id"] = names[annotation["image_id"]]
            annotation.pop("id")
    assert written == coco


def test_describe_shows_what_was_understood(pictures: Path) -> None:
    source = pictures.parent / "coco.json"
    source.write_text(FILES["coco.json"])
    text = describe(source, read_examples(source), rows=2)
    assert text.splitlines() == [
        f"{source}: read as COCO, 3 images, 3 captions",
        "  a.jpg: 'a dog runs' (+1)",
        "  b.png: 'two people ride bikes'",
    ]
