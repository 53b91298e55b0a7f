"""Untrusted bytes to pixels: the type is sniffed, and the size checked before decoding."""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from exports.errors import ImageError
from exports.images import ImageSpec, preprocess
from serving.errors import ImageTooLarge, NotAnImage, UndecodableImage
from serving.image_walk import check_pieces, check_scans, gif_reach
from serving.limits import MAX_PIXELS

# No AVIF: its container states one size and the video stream in it another, which libavif decodes
# whole before it compares them. A kilobyte could so claim 64 x 64 pixels and cost any number.
_TYPES = "JPEG, PNG, WebP, GIF, BMP and TIFF"
_BMP_HEADER_SIZES = (12, 40, 52, 56, 64, 108, 124)
_TILE_WIDTH, _TILE_LENGTH = 322, 323

# Pillow's own limit would beat a higher one of ours; ours is checked as soon as a header is read.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What an image may be at most; pixels are counted as the file states them."""

    max_pixels: int = MAX_PIXELS


def decode_image(body: bytes, spec: ImageSpec, limits: ImageLimits) -> npt.NDArray[np.uint8]:
    """Returns the pixels that an encoder takes, uint8 (H, W, 3), of a file's bytes.

    Raises:
        NotAnImage: The bytes begin like none of the types that we read.
        ImageTooLarge: The image states more pixels than the limit; nothing was decoded.
        UndecodableImage: The bytes are damaged, cut off, or none at all, or made to cost more than
            an image of their size.
    """
    if not body:
        raise UndecodableImage("The body is empty: send the bytes of an image file.")
    kind = sniff(body)
    if kind is None:
        raise NotAnImage(f"The bytes are none of the image types read here: {_TYPES}.")
    check_pieces(kind, body)
    image = _open(body, kind, limits)
    try:
        with image:
            return preprocess(image, spec)
    except ImageError as error:
        raise UndecodableImage(f"The {kind} file is damaged or cut off: {error}.") from error


def _open(body: bytes, kind: str, limits: ImageLimits) -> Image.Image:
    if kind == "GIF":
        _check_size(*gif_reach(body), limits)
    try:
        image = Image.open(BytesIO(body), formats=[kind])  # reads the header only
        sizes = (image.size, _tile_size(image))
    except MemoryError:
        raise
    except Exception as error:  # the format plugins raise nearly every built-in exception
        raise UndecodableImage(f"The {kind} file is damaged: its header makes no sense.") from error
    for width, height in sizes:
        _check_size(width, height, limits)
    if kind == "JPEG":
        check_scans(body, image.width * image.height)
    return image


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"The image has {width} x {height} pixels, more than {limits.max_pixels:,}:"
            " make it smaller."
        )


def _tile_size(image: Image.Image) -> tuple[int, int]:
    """Returns the size of a TIFF's tiles, which may be larger than the image they stand in."""
    if not isinstance(image, TiffImageFile):
        return 0, 0
    return int(image.tag_v2.get(_TILE_WIDTH, 0)), int(image.tag_v2.get(_TILE_LENGTH, 0))


def sniff(body: bytes) -> str | None:
    """Returns Pillow's name of the image type that `body` begins like."""
    if body.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if body.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if body.startswith(b"RIFF") and body[8:12] == b"WEBP":
        return "WEBP"
    if body.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if body.startswith(b"BM") and int.from_bytes(body[14:18], "little") in _BMP_HEADER_SIZES:
        return "BMP"
    if body.startswith((b"II*\0", b"MM\0*")):
        return "TIFF"
    return None
