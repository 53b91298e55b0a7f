import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from exports.errors import ImageError
from exports.images import ImageSpec, preprocess

Pixels = npt.NDArray[np.uint8]
SPEC = ImageSpec(height=48, width=32)


def scene(height: int, width: int) -> Pixels:
    """Returns a picture without any symmetry: two ramps and a dark corner."""
    rows, columns = np.mgrid[0:height, 0:width]
    red = rows * 255 // max(height - 1, 1)
    green = columns * 255 // max(width - 1, 1)
    blue = np.where((rows < height // 3) & (columns < width // 4), 40, 200)
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def encoded(image: Image.Image, image_format: str, **options: object) -> Image.Image:
    """Returns `image` written and opened again, not yet decoded, as a request's body is."""
    body = io.BytesIO()
    image.save(body, format=image_format, **options)
    return Image.open(io.BytesIO(body.getvalue()))


def difference(left: Pixels, right: Pixels) -> npt.NDArray[np.int64]:
    return np.abs(left.astype(np.int64) - right.astype(np.int64))


# How a camera stores an upright picture `a` under each orientation, by the EXIF 2.32 table: which
# sides of the picture its row 0 and its column 0 are.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
def test_every_exif_orientation_comes_out_upright(orientation: int, image_format: str) -> None:
    upright = scene(48, 32)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if image_format == "WEBP" else {}

    pixels = preprocess(encoded(stored, image_format, exif=exif, **lossless), SPEC)

    assert np.array_equal(pixels, upright)


@pytest.mark.parametrize("orientation", STORED)
def test_a_sideways_jpeg_is_drafted_to_the_right_sides(orientation: int) -> None:
    upright = scene(1200, 800)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = encoded(stored, "JPEG", exif=exif, quality=95)

    pixels = preprocess(image, SPEC)

    assert sorted(image.size) == [100, 150]  # an eighth
    assert difference(pixels, preprocess(Image.fromarray(upright), SPEC)).mean() < 1.5


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b""])
def test_damaged_exif_is_no_orientation(exif: bytes) -> None:
    image = encoded(Image.fromarray(scene(48, 32)), "JPEG", exif=exif, quality=95)

    assert difference(preprocess(image, SPEC), scene(48, 32)).mean() < 3


def test_the_two_pictures_of_a_phone_are_the_first() -> None:
    first, second = Image.fromarray(scene(1200, 800)), Image.new("RGB", (800, 1200))
    image = encoded(first, "MPO", save_all=True, append_images=[second])

    pixels = preprocess(image, SPEC)

    assert image.format == "MPO"
    assert image.size == (100, 150)
    assert difference(pixels, preprocess(first, SPEC)).mean() < 1.5


def test_draft_decoding_is_close_to_full_decoding() -> None:
    random = np.random.default_rng(0)
    texture = random.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    picture = Image.fromarray(texture).resize((3000, 2000), Image.Resampling.BICUBIC)
    spec = ImageSpec(height=224, width=224)
    drafted, full = (encoded(picture, "JPEG", quality=90) for _ in range(2))
    full.load()

    off = difference(preprocess(drafted, spec), preprocess(full, spec))

    assert drafted.size == (750, 500)  # a quarter: an eighth would have fewer than 2 x 224 rows
    assert full.size == (3000, 2000)
    assert off.mean() < 1.0
    assert off.max() <= 16


def test_the_same_file_gives_the_same_pixels() -> None:
    picture = Image.fromarray(scene(1000, 1500))
    first, second = (preprocess(encoded(picture, "JPEG"), SPEC) for _ in range(2))
    assert np.array_equal(first, second)
    assert first.flags.writeable
    assert (first.dtype, first.shape) == (np.uint8, (48, 32, 3))


def test_cmyk() -> None:
    image = encoded(Image.fromarray(scene(48, 32)).convert("CMYK"), "JPEG", quality=100)
    assert image.mode == "CMYK"
    assert difference(preprocess(image, SPEC), scene(48, 32)).mean() < 4


def test_transparency_lies_on_white() -> None:
    pixels = np.zeros((48, 32, 4), dtype=np.uint8)
    pixels[:, :, 0] = 200
    pixels[:16, :, 3] = 255
    pixels[16:32, :, 3] = 128

    out = preprocess(encoded(Image.fromarray(pixels), "PNG"), SPEC)

    assert out[8, 16].tolist() == [200, 0, 0]
    assert difference(out[24, 16], np.array([227, 127, 127], np.uint8)).max() <= 1
    assert out[40, 16].tolist() == [255, 255, 255]


@pytest.mark.parametrize("image_format", ["PNG", "GIF"])
def test_a_transparent_palette_colour_lies_on_white(image_format: str) -> None:
    image = Image.new("P", (32, 48), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (0, 0, 32, 24))

    out = preprocess(encoded(image, image_format, transparency=0), SPEC)

    assert out[10, 16].tolist() == [200, 100, 50]
    assert out[40, 16].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["LA", "PA", "L"])
def test_grey_with_transparency_lies_on_white(mode: str) -> None:
    if mode == "L":
        image = encoded(Image.new("L", (32, 48), 77), "PNG", transparency=77)
    else:
        image = Image.new(mode[0], (32, 48), 0)
        image.putalpha(0)
    assert image.mode == mode
    assert preprocess(image, SPEC).min() == 255


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.tile(np.linspace(0, 65535, 48).astype(np.uint16)[:, None], (1, 32))
    expected = np.repeat(np.rint(ramp / 257.0)[:, :, None], 3, axis=2).astype(np.uint8)

    for image in (encoded(Image.fromarray(ramp), "PNG"), encoded(Image.fromarray(ramp), "TIFF")):
        assert image.mode.startswith("I;16")
        assert np.array_equal(preprocess(image, SPEC), expected)


@pytest.mark.parametrize(
    ("dtype", "full_scale"),
    [
        *[(np.int32, 255), (np.int32, 65535), (np.int32, 2_000_000_000)],
        *[(np.float32, 1.0), (np.float32, 255.0), (np.float32, 65535.0), (np.float32, 1e30)],
    ],
)
def test_deeper_grey_is_scaled_by_its_full_scale(dtype: type, full_scale: float) -> None:
    ramp = np.tile(np.linspace(0, full_scale, 48).astype(dtype)[:, None], (1, 32))

    out = preprocess(Image.fromarray(ramp), SPEC)

    assert difference(out[:, 0, 0], np.linspace(0, 255, 48).astype(np.uint8)).max() <= 1


def test_floats_that_are_no_numbers_are_black() -> None:
    pixels = np.full((48, 32), 0.5, dtype=np.float32)
    pixels[0, 0], pixels[10:30], pixels[47] = np.inf, np.nan, -3.0

    out = preprocess(Image.fromarray(pixels), SPEC)

    assert (out[20, 5, 0], out[40, 5, 0], out[47, 5, 0]) == (0, 128, 0)


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_its_first_frame(image_format: str) -> None:
    frames = [Image.new("RGB", (32, 48), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if image_format == "WEBP" else {}
    image = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    image.seek(2)

    assert preprocess(image, SPEC)[5, 5].tolist() == [255, 0, 0]


@pytest.mark.parametrize("resize", ["squash", "center_crop", "shortest_edge"])
@pytest.mark.parametrize("size", [(1, 1), (10_000, 1), (1, 10_000), (3, 7)])
def test_any_shape_of_picture(size: tuple[int, int], resize: str) -> None:
    spec = ImageSpec.model_validate({"height": 48, "width": 32, "resize": resize})
    for image_format in ("PNG", "JPEG"):
        out = preprocess(encoded(Image.new("RGB", size, (9, 99, 199)), image_format), spec)
        assert out.shape == (48, 32, 3)
        assert difference(out, np.full_like(out, (9, 99, 199))).max() <= 3


def test_squash_keeps_everything_and_center_crop_keeps_the_middle() -> None:
    picture = np.zeros((40, 100, 3), dtype=np.uint8)
    picture[:, :30] = (255, 0, 0)
    picture[:, 70:] = (0, 0, 255)
    image = Image.fromarray(picture)

    squashed = preprocess(image, ImageSpec(height=20, width=20))
    cropped = preprocess(image, ImageSpec(height=20, width=20, resize="center_crop"))

    assert squashed[10, 0].tolist() == [255, 0, 0]
    assert squashed[10, 19].tolist() == [0, 0, 255]
    assert cropped[:, 1:-1].max() == 0  # the filter looks one pixel over the edge of the crop


@pytest.mark.parametrize(
    ("size", "whole"), [((53, 67), (48, 60)), ((90, 51), (84, 48)), ((48, 48), (48, 48))]
)
def test_shortest_edge_is_a_resize_and_then_a_cut(
    size: tuple[int, int], whole: tuple[int, int]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(noise)

    found = preprocess(image, ImageSpec(height=48, width=48, resize="shortest_edge"))

    left, upper = (whole[0] - 48) // 2, (whole[1] - 48) // 2
    resized = np.asarray(image.resize(whole, Image.Resampling.BICUBIC))
    assert np.array_equal(found, resized[upper : upper + 48, left : left + 48])


def test_a_long_picture_is_cut_before_it_is_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, resize = [], Image.Image.resize

    def watched(image: Image.Image, size: tuple[int, int], *rest: Any, **more: Any) -> Image.Image:
        sizes.append(size)
        return resize(image, size, *rest, **more)

    monkeypatch.setattr(Image.Image, "resize", watched)
    spec = ImageSpec(height=48, width=48, resize="shortest_edge")
    for width in (32, 33):
        preprocess(Image.new("RGB", (width, 2)), spec)
    assert sizes == [(16 * 48, 48), (48, 48)]


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((480, 320, 3), dtype=np.uint8)
    stripes[::2] = 255
    for interpolation in ("bilinear", "bicubic"):
        spec = SPEC.model_copy(update={"interpolation": interpolation})
        assert difference(preprocess(Image.fromarray(stripes), spec), np.uint8(128)).max() < 8


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_truncated_file_is_an_image_error(image_format: str) -> None:
    body = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
        body, format=image_format
    )
    image = None
    try:
        image = Image.open(io.BytesIO(body.getvalue()[: len(body.getvalue()) // 2]))
    except OSError:  # WebP already refuses to open
        assert image_format == "WEBP"
    if image is not None:
        with pytest.raises(ImageError, match="cannot be decoded"):
            preprocess(image, SPEC)


def test_no_pixels_is_an_image_error() -> None:
    with pytest.raises(ImageError, match="no pixels"):
        preprocess(Image.new("RGB", (0, 5)), SPEC)
