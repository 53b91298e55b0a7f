"""The one image preprocessing: a PIL image of any kind to uint8 pixels of a fixed size.

The trainer and the server call the same function on images that are opened but not yet decoded,
so a model sees the same pixels in both. Normalisation is not here: it is part of the encoder graph.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from exports.errors import ImageError

_ORIENTATION_TAG = 0x0112
# What undoes each EXIF orientation; 1 is upright, and anything else is not an orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# JPEG is decoded at 1/2, 1/4 or 1/8 as long as this many times the target size is left, so that
# the antialiased resize, not the decoder's box filter, makes the picture.
_DRAFT_MARGIN = 2
_LONGEST = 16  # how many targets in a row may be covered before the rest is cut off


class ImageSpec(BaseModel):
    """The pixels that an encoder graph takes.

    `squash` stretches the whole photograph to the target; `center_crop` keeps the aspect ratio and
    cuts what juts out on both sides; `shortest_edge` does so after the resize, in whole pixels, as
    CLIP's preprocessing does (Radford et al., 2021, https://arxiv.org/abs/2103.00020); pictures
    longer than 16 targets are cut first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=4096)
    resize: Literal["squash", "center_crop", "shortest_edge"] = "squash"
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"


def preprocess(image: Image.Image, spec: ImageSpec) -> npt.NDArray[np.uint8]:
    """Returns upright RGB pixels, uint8 (spec.height, spec.width, 3).

    In order: scaled JPEG decoding, first frame of an animation, EXIF orientation, deep grey scaled
    (never clipped) to 8 bits, CMYK and the like to RGB, transparency laid on white, antialiased
    resize. Deterministic. `image` should come straight from `Image.open`: one that is loaded
    already gives the same picture, but a large JPEG then differs by the rounding of its decoder.
    Size limits are the caller's: this function decodes whatever it is given.

    Raises:
        ImageError: The file is truncated or damaged, has no pixels, or a mode without an RGB form.
    """
    image = _decode(image, spec)
    if 0 in image.size:
        raise ImageError(f"the image has no pixels: it is {image.width} x {image.height}")
    orientation = _orientation(image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    image = _to_rgb(image)
    if spec.resize == "shortest_edge" and not _is_long(image, spec):
        resized = _cover_and_cut(image, spec)
    else:
        resized = image.resize(
            (spec.width, spec.height), _RESAMPLING[spec.interpolation], box=_box(image.size, spec)
        )
    return np.array(resized, dtype=np.uint8)  # a copy: arrays on PIL memory are read-only


def _decode(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Returns `image` with the pixels of its first frame in memory."""
    try:
        if image.tell():  # not `is_animated`: to know, Pillow reads on to the next frame
            image.seek(0)
        if image.format in ("JPEG", "MPO"):
            size = (spec.width * _DRAFT_MARGIN, spec.height * _DRAFT_MARGIN)
            # No effect on an image that is loaded already.
            image.draft(None, size[::-1] if _orientation(image) in _SIDEWAYS else size)
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # the format plugins raise nearly every built-in exception
        raise ImageError(f"the image cannot be decoded: {error}") from error
    return image


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation; 1 where there is none or the EXIF block is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a photograph with a damaged EXIF block is still a photograph
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Returns `image` in mode RGB, on white where it is transparent."""
    try:
        if image.mode.startswith(("I", "F")):
            image = _eight_bits(image)
        if not image.has_transparency_data:
            return image.convert("RGB")
        layers = image.convert("RGBA")
    except MemoryError:
        raise
    except Exception as error:  # AssertionError, too, where a palette is missing
        raise ImageError(f"an image of mode {image.mode} cannot be shown as RGB") from error
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(layers, mask=layers.getchannel("A"))
    return white


def _eight_bits(image: Image.Image) -> Image.Image:
    """Returns deep grey (16 or 32 bits, integer or float) as mode L, scaled by its full scale.

    A 16-bit mode states its own full scale. Modes I and F do not: theirs is the smallest of 1
    (floats only), 255 and 65,535 that holds the brightest pixel, else that pixel itself.
    """
    # In place and without float64: a picture may have tens of millions of pixels.
    if image.mode.startswith("I;16"):
        table = np.rint(np.arange(65536) / 257.0).astype(np.uint8)
        return Image.fromarray(table[np.asarray(image)])
    grey = np.array(image, dtype=np.float32)
    np.nan_to_num(grey, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    brightest = float(grey.max())
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    grey *= 255.0 / next((scale for scale in scales if brightest <= scale), brightest)
    np.clip(grey, 0.0, 255.0, out=grey)
    return Image.fromarray(np.rint(grey, out=grey).astype(np.uint8))


def _box(size: tuple[int, int], spec: ImageSpec) -> tuple[float, float, float, float]:
    """Returns left, upper, right, lower of what is resized, in pixels of the upright image."""
    width, height = size
    if spec.resize == "squash":
        return (0.0, 0.0, float(width), float(height))
    scale = min(width / spec.width, height / spec.height)
    left = (width - spec.width * scale) / 2
    upper = (height - spec.height * scale) / 2
    # Rounding must not push the box out of the picture, which PIL refuses.
    return (
        max(left, 0.0),
        max(upper, 0.0),
        min(left + spec.width * scale, float(width)),
        min(upper + spec.height * scale, float(height)),
    )


def _cover_and_cut(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """Returns `image` resized to cover the target, cut to it in whole pixels.

    A box would give other pixels: the order in which Pillow resizes rows and columns depends on how
    many there are.
    """
    if spec.width * image.height > spec.height * image.width:
        across, down = spec.width, max(spec.height, spec.width * image.height // image.width)
    else:
        across, down = max(spec.width, spec.height * image.width // image.height), spec.height
    resized = image.resize((across, down), _RESAMPLING[spec.interpolation])
    left, upper = (across - spec.width) // 2, (down - spec.height) // 2
    return resized.crop((left, upper, left + spec.width, upper + spec.height))


def _is_long(image: Image.Image, spec: ImageSpec) -> bool:
    """Returns whether covering the target would take a picture many times as large."""
    down, across = image.height * spec.width, image.width * spec.height
    return max(down, across) > _LONGEST * min(down, across)
