"""Labelled images: what a table of them may look like, and which half is learnt from."""

from pathlib import Path

import pytest

from trainer.errors import DataError
from trainer.labels import Labelled, read_labels


def table(folder: Path, text: str) -> Path:
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_split_column_decides(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "b.png").touch()
    path = table(tmp_path, 'image,label,split\na.png,cat,train\nb.png,"dog, brown",test\n')
    assert read_labels(path) == [
        Labelled(tmp_path / "a.png", "cat", known=True),
        Labelled(tmp_path / "images" / "b.png", "dog, brown", known=False),
    ]


def test_without_one_about_half_is_known_and_stays_so(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(1000)]
    rows = [f"{name},x" for name in names]
    first = read_labels(table(tmp_path, "\n".join(["image,label", *rows])))
    assert 420 < sum(row.known for row in first) < 580
    again = read_labels(table(tmp_path, "\n".join(["image,label", *rows[::-1][:500]])))
    known = {row.image.name: row.known for row in first}
    assert all(known[row.image.name] == row.known for row in again)


def test_images_may_lie_elsewhere(tmp_path: Path) -> None:
    path = table(tmp_path, "image,label\na.png,cat\n")
    [row] = read_labels(path, images=tmp_path / "photos")
    assert row.image == tmp_path / "photos" / "a.png"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,caption\na.png,cat\n", r"csv:1: columns image, caption; it needs image and label"),
        ("", r"csv:1: columns ; it needs"),
        ("image,label\na.png,cat\nb.png\n", "csv:3: image or label is empty"),
        ("image,label\na.png,cat\na.png,dog\n", "csv:3: a.png is there twice"),
        ("image,label,split\na.png,cat,dev\n", "csv:2: split is 'dev'; expected train or test"),
    ],
)
def test_a_wrong_table_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_labels(table(tmp_path, text))
