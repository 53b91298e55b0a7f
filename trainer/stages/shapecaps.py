"""`python -m trainer shapecaps RECIPE`: draws ShapeCaps, a data set whose truth is known exactly.

Each picture holds two coloured shapes, one left of or above the other, on a textured ground; each
caption says so in one of five ways. The grammar is small enough to learn in seconds, and what a
caption claims can be checked word by word.
"""

import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from trainer.config import Config as BaseConfig
from trainer.data import Example, write_coco

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 210, 40),
    "purple": (140, 50, 170),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle")
_TEMPLATES = (
    "a {first} {relation} a {second}",
    "there is a {first} {relation} a {second}",
    "the {first} is {relation} the {second}",
    "a {second} with a {first} {opposite} it",
    "one {first} {relation} one {second}",
)
_RELATIONS = {"left of": "to the left of", "above": "above"}


class Config(BaseConfig):
    """A recipe that draws ShapeCaps."""

    images: int = 1000
    side: int = 64
    """Of the square pictures, in pixels."""
    dev: int = 100
    """How many of the images are put into the dev split."""
    seed: int = 0


def run(config: Config, out_dir: Path) -> None:
    """Writes `images/*.png`, `captions_train.json` and `captions_dev.json` (COCO) to `out_dir`."""
    folder = out_dir / "images"
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(config.seed)
    examples = []
    for number in range(config.images):
        image, captions = scene(draw, config.side)
        path = folder / f"{number:05d}.png"
        image.save(path)
        examples.append(Example(path, captions, None))
    write_coco(examples[config.dev :], out_dir / "captions_train.json", images=folder)
    write_coco(examples[: config.dev], out_dir / "captions_dev.json", images=folder)
    print(f"wrote {config.images} pictures to {out_dir}, {config.dev} of them for dev")


def scene(draw: random.Random, side: int) -> tuple[Image.Image, tuple[str, ...]]:
    """Returns one picture, side x side pixels, and its five captions."""
    colours = draw.sample(sorted(COLOURS), 2)
    shapes = draw.choices(SHAPES, k=2)
    relation = draw.choice(sorted(_RELATIONS))
    image = Image.fromarray(_ground(draw, side))
    pen = ImageDraw.Draw(image)
    for place, (colour, shape) in enumerate(zip(colours, shapes, strict=True)):
        along = side * (0.27 + 0.46 * place)
        across = side * (0.5 + 0.12 * (draw.random() - 0.5))
        centre = (along, across) if relation == "left of" else (across, along)
        _shape(pen, shape, COLOURS[colour], centre, side * draw.uniform(0.13, 0.2))
    first, second = (f"{c} {s}" for c, s in zip(colours, shapes, strict=True))
    words = {"first": first, "second": second, "relation": relation}
    words["opposite"] = _RELATIONS[relation]
    return image, tuple(template.format(**words) for template in _TEMPLATES)


def _ground(draw: random.Random, side: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Returns a dark ground with grain, uint8 (side, side, 3)."""
    noise = np.random.default_rng(draw.getrandbits(32))
    base = noise.integers(20, 70, 3)
    grain = noise.integers(-14, 15, (side, side, 1))
    return np.clip(base + grain, 0, 255).astype(np.uint8)


def _shape(
    pen: ImageDraw.ImageDraw,
    shape: str,
    colour: tuple[int, int, int],
    centre: tuple[float, float],
    radius: float,
) -> None:
    x, y = centre
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "square":
        pen.rectangle((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        corners = [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)]
        pen.polygon(corners, fill=colour)
