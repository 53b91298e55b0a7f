"""`python -m trainer preview RECIPE`: what a recipe's augmentations make of its images.

Takes any recipe with `[augment]`, pretraining's or a captioner's, and draws a few of its images: as
the trained model will see them, and beside that as they look in training. Nothing is trained.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydantic import RootModel, model_validator

from exports.images import ImageSpec
from trainer import variants
from trainer.config import validate
from trainer.data import Example, describe
from trainer.errors import ConfigError
from trainer.photos import load_pixels, usable_examples
from trainer.run import PretrainRecipe, Recipe
from trainer.transforms import Sides, Transform

_IMAGES, _VIEWS = 8, 8
_CELL = 128  # pixels that a picture has at least, when enlarged
_GAP, _HEADING = 4, 22  # pixels
_PAPER, _INK = (255, 255, 255), (0, 0, 0)

Pixels = NDArray[np.uint8]


class Config(RootModel[PretrainRecipe | Recipe]):
    """Any recipe with `[augment]`: one with a `[method]` is pretraining's, others a captioner's."""

    @model_validator(mode="before")
    @classmethod
    def _as_its_own_stage_reads_it(cls, table: dict[str, Any]) -> PretrainRecipe | Recipe:
        if "encoder" not in table:
            raise ConfigError("no [encoder]: preview takes the recipes of pretrain and finetune")
        if "method" in table:
            return validate(PretrainRecipe, table, "as a recipe of pretrain")
        return validate(Recipe, table, "as a recipe of finetune")


def run(config: Config, out_dir: Path) -> None:
    """Writes `preview.png` to `out_dir`: a row for each of a few images, drawn from the seed.

    Raises:
        DataError: there is no image that can be decoded.
    """
    recipe = config.root
    columns = _columns(recipe)
    rows = [
        _row(recipe, example, list(columns.values()), number)
        for number, example in enumerate(_drawn(recipe))
    ]
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / "preview.png"
    sheet(rows, ["in evaluation", *columns]).save(path)
    print(f"wrote {path}: {len(rows)} images, {len(columns)} views of each")


def _columns(recipe: PretrainRecipe | Recipe) -> dict[str, Transform]:
    """Returns what makes each column, by its heading."""
    size = (recipe.image.height, recipe.image.width)
    first = Transform(recipe.augment, size)
    second = recipe.second_view if isinstance(recipe, PretrainRecipe) else None
    if second is None or second == recipe.augment:
        return {f"view {number}": first for number in range(1, _VIEWS + 1)}
    others = Transform(second, size)
    return {
        f"{name} view, {number}": transform
        for name, transform in (("first", first), ("second", others))
        for number in range(1, _VIEWS // 2 + 1)
    }


def _drawn(recipe: PretrainRecipe | Recipe) -> list[Example]:
    """Returns a few of the recipe's images, drawn from its seed."""
    data = recipe.data
    examples = data.read()
    print(describe(data.train, examples))
    few = random.Random(recipe.seed).sample(examples, min(_IMAGES, len(examples)))
    return usable_examples(few, progress=False)


def _row(
    recipe: PretrainRecipe | Recipe, example: Example, columns: list[Transform], number: int
) -> list[Pixels]:
    """Returns the pictures of one image, uint8 (H, W, 3)."""
    stored, captioned = _training(recipe)
    pixels = torch.from_numpy(load_pixels(example.image, stored)).permute(2, 0, 1)
    known = not captioned or columns[0].mirror(example.captions) is not None
    flip: Sides = "free" if known else "never"
    views = [
        transform(pixels, recipe.seed + number * len(columns) + column, flip=flip)
        for column, transform in enumerate(columns)
    ]
    pictures = [view.permute(1, 2, 0).numpy() for view in views]
    return [load_pixels(example.image, recipe.image), *pictures]


def _training(recipe: PretrainRecipe | Recipe) -> tuple[ImageSpec, bool]:
    """Returns the images that views are cut from, and whether their captions are learnt from."""
    if isinstance(recipe, Recipe):
        return recipe.image, True
    method, _ = variants.parse("methods", recipe.method)
    return recipe.stored_image, method.Method.reads_captions


def sheet(rows: list[list[Pixels]], headings: list[str]) -> Image.Image:
    """Returns pictures in a grid under their headings, small ones enlarged by whole pixels.

    Args:
        rows: uint8 (H, W, 3) each, all of one size.
        headings: one a column.
    """
    height, width = rows[0][0].shape[:2]
    factor = -(-_CELL // max(height, width))
    down, right = height * factor + _GAP, width * factor + _GAP
    page = Image.new("RGB", (right * len(headings), _HEADING + down * len(rows)), _PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for column, heading in enumerate(headings):
        pen.text((column * right, 3), heading, _INK, font)
        for row, pictures in enumerate(rows):
            picture = Image.fromarray(pictures[column])
            enlarged = picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
            page.paste(enlarged, (column * right, _HEADING + row * down))
    return page
