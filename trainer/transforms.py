"""Augmentations of training images, as rows of a recipe; each draws from the seed it is given."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torchvision.transforms import v2

from trainer.config import Config


class Augment(Config):
    """Keys of `[augment]`; each is off at 0.

    Flips mirror the picture, and with it any "left" and "right" of a caption: `flip` leaves images
    alone whose captions say either word.
    """

    crop: float = Field(default=0.0, ge=0, lt=1)
    """Random resized crop that keeps at least 1 - `crop` of the area."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a horizontal flip."""
    rotation: float = Field(default=0.0, ge=0, le=180)
    """Largest angle, in degrees."""
    jitter: float = Field(default=0.0, ge=0, le=1)
    """Strength of brightness, contrast and saturation changes."""
    hue: float = Field(default=0.0, ge=0, le=0.5)
    """Strength of the change of hue, at most 0.5."""
    grey: float = Field(default=0.0, ge=0, le=1)
    """Probability of losing all colour."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """Probability of erasing a rectangle."""


class Transform:
    """A uint8 image (3, H, W) in, one augmented view of the same size out."""

    def __init__(self, config: Augment, size: tuple[int, int]) -> None:
        rows: list[torch.nn.Module] = []
        if config.crop:
            area, ratio = (1 - config.crop, 1.0), (4 / 5, 5 / 4)
            rows.append(v2.RandomResizedCrop(size, scale=area, ratio=ratio, antialias=True))
        if config.rotation:
            rows.append(v2.RandomRotation(config.rotation, v2.InterpolationMode.BILINEAR))
        if config.jitter or config.hue:
            strength = config.jitter
            rows.append(v2.ColorJitter(strength, strength, strength, config.hue))
        if config.grey:
            rows.append(v2.RandomGrayscale(config.grey))
        if config.erase:
            rows.append(v2.RandomErasing(config.erase, scale=(0.02, 0.2)))
        self._rows = v2.Compose(rows) if rows else v2.Identity()
        self._flip = config.flip

    def __call__(self, image: Tensor, seed: int, *, flip: Literal["free", "never"]) -> Tensor:
        """Returns a view of `image` (3, H, W) that depends on `seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            view = self._rows(image)
            if flip == "free" and torch.rand(()).item() < self._flip:
                view = view.flip(-1)
        return view
