"""The preview shows what the model sees in evaluation, and beside it what it sees in training."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from exports.images import ImageSpec
from trainer.__main__ import main
from trainer.data import read_examples
from trainer.photos import load_pixels
from trainer.stages.preview import sheet

PRETRAIN, FINETUNE = (f"trainer/recipes/tiny/{name}.toml" for name in ("simclr", "gpt2"))


def preview(recipe: str, shapes: Path, out: Path, *overrides: str) -> NDArray[np.uint8]:
    """Returns the pictures of a preview, uint8 (rows, columns, 32, 32, 3)."""
    data = f"data.train={shapes / 'captions_train.json'}"
    size = ("image.height=32", "image.width=32")
    assert main(["preview", recipe, data, *size, *overrides, "--out", str(out)]) == 0
    page = np.asarray(Image.open(out / "preview.png"))
    cell, gap, heading = 4 * 32, 4, 22  # enlarged to at least 128 pixels
    assert (page[:heading].reshape(-1, 3) == 0).all(1).any()  # there is writing
    rows, columns = (page.shape[0] - heading) // (cell + gap), page.shape[1] // (cell + gap)
    grid = page[heading:].reshape(rows, cell + gap, columns, cell + gap, 3).swapaxes(1, 2)
    assert (grid[:, :, cell:] == 255).all() and (grid[:, :, :, cell:] == 255).all()
    pictures = grid[:, :, :cell:4, :cell:4]
    assert (pictures.repeat(4, 2).repeat(4, 3) == grid[:, :, :cell, :cell]).all()
    return pictures


def test_images_stand_beside_eight_different_views_of_them(shapes, tmp_path: Path, capsys) -> None:
    pictures = preview(PRETRAIN, shapes, tmp_path / "one")
    assert f"wrote {tmp_path}/one/preview.png: 8 images, 8 views of each" in capsys.readouterr().out
    assert pictures.shape[:2] == (8, 9)
    assert len({picture.tobytes() for picture in pictures.reshape(72, -1)}) == 72
    examples = read_examples(shapes / "captions_train.json")
    spec = ImageSpec(height=32, width=32)
    known = {load_pixels(example.image, spec).tobytes() for example in examples}
    assert {row[0].tobytes() for row in pictures} <= known
    assert (preview(PRETRAIN, shapes, tmp_path / "two") == pictures).all()
    assert (preview(PRETRAIN, shapes, tmp_path / "three", "seed=1") != pictures).any()


def test_a_second_view_that_differs_has_columns_of_its_own(shapes, tmp_path: Path) -> None:
    still = preview(PRETRAIN, shapes, tmp_path / "still", "second_view={}")
    assert len({picture.tobytes() for picture in still[0, 1:5]}) == 4
    assert (still[:, 6:] == still[:, 5:6]).all()
    assert (still[:, 0] != still[:, 5]).any()  # cut from a larger picture, as in training
    flip = "augment={flip={}}"
    same = preview(PRETRAIN, shapes, tmp_path / "same", flip, "second_view={flip={}}")
    none = preview(PRETRAIN, shapes, tmp_path / "none", flip)
    assert (same == none).all()


def test_a_captioner_s_images_are_flipped_only_where_captions_allow_it(
    shapes, tmp_path: Path
) -> None:
    pictures = preview(FINETUNE, shapes, tmp_path / "captioned", "augment={flip={probability=1}}")
    kept = [(row == row[:1]).all() for row in pictures]
    flipped = [(row[1:] == row[:1, :, ::-1]).all() for row in pictures]
    assert 0 < sum(kept) < 8
    assert all(keep != flip for keep, flip in zip(kept, flipped, strict=True))
    flips = ("augment={flip={probability=1}}", "data.scale=1")
    pictures = preview(PRETRAIN, shapes, tmp_path / "raw", *flips)
    assert all((row[1:] == row[:1, :, ::-1]).all() for row in pictures)


def test_large_pictures_are_not_enlarged_and_need_not_be_square() -> None:
    rows = [[np.full((90, 140, 3), 10 * n, np.uint8) for n in range(3)]] * 2
    page = sheet(rows, ["one", "two", "three"])
    assert page.size == (3 * 144, 22 + 2 * 94)
    assert page.getpixel((2 * 144 + 139, 22 + 94 + 89)) == (20, 20, 20)


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("trainer/recipes/tiny/evaluate.toml", "seed=0", "no [encoder]: preview takes the recipes"),
        (PRETRAIN, "augment.crp={}", "as a recipe of pretrain: unknown key 'augment.crp'"),
        (FINETUNE, "augment.quarters={}", "captions say what is above what"),
    ],
)
def test_what_it_cannot_show_is_one_line(recipe, override, message, tmp_path, capsys) -> None:
    assert main(["preview", recipe, override, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
