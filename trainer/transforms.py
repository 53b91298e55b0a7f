"""Augmentations of training images: each is a row of a recipe, with a probability and a strength.

The kernels are torchvision's, or give its results in a fraction of its time; what is drawn comes
from the seed of the view alone, so a view is the same in whichever process it is made.
"""

import math
import random
from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from trainer.config import Config
from trainer.errors import ConfigError
from trainer.filters import gaussian_blur, shift_hue
from trainer.sides import Mirror

Sides = Literal["free", "never"]

_STEEP = 45.0  # degrees; beyond them what was above is rather beside


def _ascending(span: tuple[float, float]) -> tuple[float, float]:
    if span[0] > span[1]:
        raise ValueError("the smaller number comes first")
    return span


Share = Annotated[float, Field(gt=0, le=1)]
Sigmas = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ascending)]
Shares = Annotated[tuple[Share, Share], AfterValidator(_ascending)]
Word = Annotated[str, Field(pattern=r"^\S+$")]


class Row(Config, ABC):
    """An augmentation: a uint8 image (3, H, W) in, one out; called, it acts by its probability.

    Attributes:
        turns_sides: Whether it may exchange left and right.
        mirrors: Whether it does, and nothing else, when it acts.
    """

    turns_sides: ClassVar[bool] = False
    mirrors: ClassVar[bool] = False

    probability: float = Field(default=1.0, ge=0, le=1)

    def __call__(self, image: Tensor, draw: random.Random) -> Tensor:
        """Returns `image`, changed or not."""
        return self.apply(image, draw) if draw.random() < self.probability else image

    @abstractmethod
    def apply(self, image: Tensor, draw: random.Random) -> Tensor:
        """Returns `image` changed, with a strength that is drawn."""


class Crop(Row):
    """Keeps a part of the picture, as Szegedy et al., 2014, https://arxiv.org/abs/1409.4842.

    Departure: a stretch that does not fit the drawn share of the area is not drawn again with
    another share, so that the share is uniform.
    """

    area: Share = 0.08
    """The smallest share of the area that is kept."""
    ratio: Share = 0.75
    """How far the part may be squeezed or stretched: the shape is `ratio` to 1 / `ratio` times the
    picture's."""

    def apply(self, image: Tensor, draw: random.Random) -> Tensor:
        """Returns the part, (3, h, w)."""
        rows, columns = _part(image, draw.uniform(self.area, 1), self.ratio, draw)
        return image[:, rows, columns]


class Rotation(Row):
    """Turns the picture about its centre; corners from outside it are black."""

    degrees: float = Field(gt=0, le=180)
    """The largest angle, to either side."""

    def apply(self, image: Tensor, draw: random.Random) -> Tensor:
        """Returns the picture turned."""
        angle = draw.uniform(-self.degrees, self.degrees)
        return F.rotate(image, angle, interpolation=InterpolationMode.BILINEAR)


class Quarters(Row):
    """Turns the (square) picture by one, two or three right angles, without loss."""

    turns_sides = True

    probability: float = Field(default=0.75, ge=0, le=1)

    def apply(self, image: Tensor, draw: random.Random) -> Tensor:
        """Returns the picture turned."""
        return image.rot90(draw.randint(1, 3), (1, 2))


class Flip(Row):
    """Exchanges left and right, in the image's captions too if `swaps` says how."""

    turns_sides = True
    mirrors = True

    probability: float = Field(default=0.5, ge=0, le=1)
    swaps: tuple[tuple[Word, Word], ...] = ()
    """Words of captions that change places, such as `[["left", "right"]]`, in any language. Without
    any, an image is never flipped whose captions say left or right (see `trainer.sides`)."""

    def apply(self, image: Tensor, draw: random.Random) -> Tensor:
        """Returns the mirror image."""
        del draw
        return image.flip(2)


class Jitter(Row):
    """Changes the colours, in an order that is drawn too.

    Brightness, contrast and saturation are multiplied by 1 - strength to 1 + strength.
    """

    brightness: float = Field(default=0.0, ge=0, le=1)
    contrast: float = Field(default=0.0, ge=0, le=1)
    saturation: float = Field(default=0.0, ge=0, le=1)
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """The largest shift, in turns of the colour circle."""

    def apply(self, image: Tensor, draw: random.Random) -> Tensor:
        """Returns the picture in other colours."""
        factors = (
            (F.adjust_brightness, self.brightness),
            (F.adjust_contrast, self.contrast),
            (F.adjust_saturation, self.saturation),
        )
        steps = [(adjust, draw.uniform(1 - most, 1 + most)) for adjust, most in factors if most]
        if self.hue:
            steps.append((shift_hue, draw.uniform(-self.hue, self.hue)))
        draw.shuffle(steps)
        view = image.float().div_(255)  # rounded once, at the end
        for adjust, amount in steps:
            view = adjust(view, amount)
        return view.mul_(255).round_().to(torch.uint8)


class Grey(Row):
    """Takes all colour away."""

    probability: float = Field(default=0.2, ge=0, le=1)

    def apply(self, image: Tensor, draw: random.Random) -> Tensor:
        """Returns the picture in grey, still of three channels."""
        del draw
        return F.rgb_to_grayscale(image, num_output_channels=3)


class Blur(Row):
    """Blurs by a Gaussian."""

    probability: float = Field(default=0.5, ge=0, le=1)
    sigma: Sigmas = (0.1, 2.0)
    """The least and the largest standard deviation, in pixels of the view."""

    def apply(self, image: Tensor, draw: random.Random) -> Tensor:
        """Returns the picture blurred."""
        return gaussian_blur(image, draw.uniform(*self.sigma))


class Solarise(Row):
    """Inverts what is bright, as Grill et al., 2020, https://arxiv.org/abs/2006.07733."""

    probability: float = Field(default=0.2, ge=0, le=1)
    threshold: int = Field(default=128, ge=0, le=255)
    """Values from it on become 255 minus themselves."""

    def apply(self, image: Tensor, draw: random.Random) -> Tensor:
        """Returns the picture solarised."""
        del draw
        return F.solarize(image, self.threshold)


class Erase(Row):
    """Blackens a rectangle, as Zhong et al., 2017, https://arxiv.org/abs/1708.04896."""

    probability: float = Field(default=0.5, ge=0, le=1)
    area: Shares = (0.02, 0.2)
    """The least and the largest share of the area."""
    ratio: Share = 0.3
    """The rectangle's shape is `ratio` to 1 / `ratio` times the picture's."""

    def apply(self, image: Tensor, draw: random.Random) -> Tensor:
        """Returns the picture with a hole."""
        rows, columns = _part(image, draw.uniform(*self.area), self.ratio, draw)
        view = image.clone()
        view[:, rows, columns] = 0
        return view


class Augment(Config):
    """Keys of `[augment]`; a row that is absent is off.

    Rows act in the order below, whatever their order in the recipe: the crop first, so that the
    others work on the small view.
    """

    crop: Crop | None = None
    rotation: Rotation | None = None
    quarters: Quarters | None = None
    flip: Flip | None = None
    jitter: Jitter | None = None
    grey: Grey | None = None
    blur: Blur | None = None
    solarise: Solarise | None = None
    erase: Erase | None = None

    def check_upright(self) -> None:
        """Lets only augmentations pass after which captions are still true.

        Raises:
            ConfigError: some turn the picture so far that up is no longer up.
        """
        steep = self.rotation is not None and self.rotation.degrees > _STEEP
        if steep or self.quarters is not None:
            raise ConfigError(
                "augment: captions say what is above what; leave quarters out, and keep "
                f"rotation.degrees within {_STEEP:g}"
            )


class Transform:
    """A uint8 image (3, H, W) in, one augmented view (3, *size) out.

    Args:
        config: the rows.
        size: height and width of the views; images of another size are resized.

    Attributes:
        mirror: Makes an image's captions those of the mirror image.

    Raises:
        ConfigError: quarter turns of views that are not square.
    """

    def __init__(self, config: Augment, size: tuple[int, int]) -> None:
        if config.quarters is not None and size[0] != size[1]:
            raise ConfigError(
                f"augment.quarters: views are {size[0]} x {size[1]} pixels, and only squares keep "
                "their size when turned"
            )
        self._size, self._crop = size, config.crop
        self.mirror = Mirror(config.flip.swaps if config.flip else ())
        rows: list[Row | None] = [getattr(config, name) for name in type(config).model_fields]
        self._rows = [row for row in rows if row is not None and row is not config.crop]

    def __call__(self, image: Tensor, seed: int, *, flip: Sides) -> Tensor:
        """Returns a view of `image` (3, H, W) that depends on `seed` alone; see `view`."""
        return self.view(image, seed, flip=flip)[0]

    def view(self, image: Tensor, seed: int, *, flip: Sides) -> tuple[Tensor, bool]:
        """Returns a view of `image` (3, H, W), and whether it is a mirror image.

        Args:
            image: uint8, never written to.
            seed: of everything that is drawn.
            flip: "never" leaves out the rows that may exchange left and right.
        """
        draw = random.Random(seed)
        view = image if self._crop is None else self._crop(image, draw)
        if view.shape[1:] != self._size:  # as torchvision's `resize`, in half its time
            view = interpolate(view[None], self._size, mode="bilinear", antialias=True)[0]
        view, mirrored = view.contiguous(), False
        for row in self._rows:
            if flip == "free" or not row.turns_sides:
                before, view = view, row(view, draw)
                mirrored ^= row.mirrors and view is not before
        return view, mirrored


def _part(image: Tensor, share: float, ratio: float, draw: random.Random) -> tuple[slice, slice]:
    """Returns the rows and columns of a part with `share` of the area, anywhere in `image`."""
    limit = -math.log(max(share, ratio))  # stretched further, the part would not fit
    stretch = math.exp(draw.uniform(-limit, limit))
    height, width = image.shape[1:]
    kept_height = max(1, round(height * math.sqrt(share / stretch)))
    kept_width = max(1, round(width * math.sqrt(share * stretch)))
    top, left = draw.randint(0, height - kept_height), draw.randint(0, width - kept_width)
    return slice(top, top + kept_height), slice(left, left + kept_width)
