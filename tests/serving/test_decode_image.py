"""Untrusted bytes: each kind of bad input gets its own error; what is too big is not decoded."""

import struct
import subprocess
import sys
import time
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
from image_zoo import FORMATS as ZOO
from image_zoo import READ_HERE, file_of, png_chunk, polyglots, saved
from PIL import Image
from tiny_bundle import picture

from exports.images import ImageSpec, preprocess
from serving.decode_image import ImageLimits, decode_image
from serving.errors import CaptionError, ImageTooLarge, NotAnImage, UndecodableImage

SPEC = ImageSpec(height=32, width=48)
LIMITS = ImageLimits()
FORMATS = list(READ_HERE)
Image.init()  # knows all formats from here on


def decode(body):
    return decode_image(body, SPEC, LIMITS)


def stated(kind, width, height):
    """Returns a small file of the type `kind` whose header states another size."""
    body = bytearray(picture(0, format=kind))
    if kind == "JPEG":
        at = body.index(b"\xff\xc0") + 5
        body[at : at + 4] = struct.pack(">HH", height, width)
    elif kind == "PNG":
        body[16:24] = struct.pack(">II", width, height)
        body[29:33] = struct.pack(">I", zlib.crc32(body[12:29]))
    elif kind == "WEBP":
        at = body.index(b"VP8 ") + 14
        body[at : at + 4] = struct.pack("<HH", width, height)
    elif kind == "GIF":
        body[6:10] = struct.pack("<HH", width, height)
    elif kind == "BMP":
        body[18:26] = struct.pack("<ii", width, height)
    elif kind == "TIFF":
        return tiff({256: width, 257: height, 273: 8, 278: height, 279: 100})
    return bytes(body)


def tiff(tags):
    """Returns an 8-bit grey deflate TIFF with more tags; its data are zeros."""
    entries = sorted({258: 8, 259: 8, 262: 1, 277: 1, **tags}.items())
    packed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    directory = struct.pack("<H", len(entries)) + packed + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + directory + zlib.compress(bytes(10_000))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_type_becomes_the_pixels_of_the_one_preprocessing(kind):
    body = picture(1, format=kind)
    expected = preprocess(Image.open(BytesIO(body)), SPEC)
    assert expected.shape == (32, 48, 3)
    np.testing.assert_array_equal(decode(body), expected)


def test_transparency_is_laid_on_white():
    body = BytesIO()
    Image.new("RGBA", (64, 48), (200, 0, 0, 0)).save(body, "PNG")
    assert (decode(body.getvalue()) == 255).all()


@pytest.mark.parametrize(
    "body",
    [
        b"a text file that is called photo.jpg",
        b"BM and other initials\n" * 3,
        b"%PDF-1.7\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\x00",
    ],
)
def test_other_files_are_no_images(body):
    with pytest.raises(NotAnImage, match="JPEG, PNG, WebP"):
        decode(body)


@pytest.mark.parametrize("kind", ZOO)
def test_of_all_formats_that_pillow_opens_six_are_read(kind):
    body = file_of(kind)
    with warnings.catch_warnings(action="ignore"):
        assert Image.open(BytesIO(body), formats=[kind]).format.upper() == kind
    if kind in FORMATS:
        assert decode(body).shape == (32, 48, 3)
    else:
        with pytest.raises(NotAnImage, match="none of the image types"):
            decode(body)


@pytest.mark.parametrize("name", polyglots())
def test_what_is_two_things_at_once_is_what_it_begins_as(name):
    body, is_image = polyglots()[name]
    if is_image:
        assert decode(body).shape == (32, 48, 3)
    else:
        with pytest.raises(NotAnImage):
            decode(body)


def test_no_bytes_are_no_image():
    with pytest.raises(UndecodableImage, match="empty"):
        decode(b"")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("keep", [0.1, 0.6])
def test_a_file_that_is_cut_off_is_undecodable(kind, keep):
    body = picture(2, format=kind)
    with pytest.raises(UndecodableImage, match=kind):
        decode(body[: int(len(body) * keep)])


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it mends
@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_ends_anywhere_gives_pixels_or_a_clear_error(kind):
    body = picture(2, format=kind)
    cuts = sorted({*range(64), *range(64, len(body), max(len(body) // 60, 1)), len(body) - 1})
    for cut in cuts:
        try:
            assert decode(body[:cut]).shape == (32, 48, 3)
            assert cut > len(body) // 2
        except CaptionError as error:
            assert error.status == (400 if cut == 0 or cut >= 20 else error.status)  # noqa: PT017
            assert error.status in (400, 415)  # noqa: PT017 - either way is right


def test_a_palette_that_is_missing_is_damage():
    head = struct.pack(">IIBBBBB", 8, 8, 8, 3, 0, 0, 0)
    pieces = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(72))), (b"IEND", b"")]
    body = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*piece) for piece in pieces)
    with pytest.raises(UndecodableImage, match="mode P"):
        decode(body)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_an_image_without_pixels_is_damaged(kind, size):
    with pytest.raises(UndecodableImage):
        decode(stated(kind, *size))


KINDS = {
    "CMYK": ("JPEG", Image.new("CMYK", (40, 30), (10, 200, 30, 4)), {}),
    "grey": ("JPEG", Image.new("L", (40, 30), 90), {}),
    "progressive": ("JPEG", Image.new("RGB", (40, 30)), {"progressive": True}),
    "16 bits": ("PNG", Image.new("I;16", (40, 30), 30_000), {}),
    "one bit": ("PNG", Image.new("1", (40, 30), 1), {}),
    "grey and alpha": ("PNG", Image.new("LA", (40, 30), (9, 9)), {}),
    "palette and alpha": ("PNG", Image.new("P", (40, 30)), {"transparency": bytes(range(256))}),
    "palette and a hole": ("GIF", Image.new("P", (40, 30)), {"transparency": 0}),
    "CMYK TIFF": ("TIFF", Image.new("CMYK", (40, 30)), {}),
    "LAB TIFF": ("TIFF", Image.new("LAB", (40, 30)), {}),
    "float TIFF": ("TIFF", Image.new("F", (40, 30), 0.5), {}),
    "32-bit TIFF": ("TIFF", Image.new("I", (40, 30), 2**30), {}),
    "JPEG in TIFF": ("TIFF", Image.new("RGB", (40, 30)), {"compression": "jpeg"}),
    "a strip of 65,535": ("GIF", Image.new("L", (1, 65_535), 7), {}),
    "a line of 65,500": ("JPEG", Image.new("L", (65_500, 1), 7), {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_pixel_is_read(name):
    kind, image, save = KINDS[name]
    assert decode(saved(kind, image, **save)).shape == (32, 48, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_upright_whatever_their_type(kind):
    upright = Image.new("RGB", (48, 32), (20, 60, 200))
    upright.paste((250, 240, 30), (0, 0, 16, 16))
    save = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    save |= {"lossless": True} if kind == "WEBP" else {}
    lies = {
        **{1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"},
        **{6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"},
    }
    for orientation, turn in lies.items():
        image = upright.transpose(Image.Transpose[turn]) if turn else upright
        exif = Image.Exif()
        exif[0x0112] = orientation
        found = decode(saved(kind, image, exif=exif, **save)).astype(int)
        assert abs(found - np.asarray(upright).astype(int)).max() < 12, orientation


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it mends
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_damaged_exif_block_costs_nobody_the_photograph(kind):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x010F] = 6, 72.0, "maker"
    whole = exif.tobytes()
    rng = np.random.default_rng(0)
    for trial in range(60):
        block = bytearray(whole)
        for at in rng.integers(6, len(block), 3):
            block[at] = rng.integers(256)
        body = saved(kind, exif=bytes(block[: len(block) - trial % 20]))
        assert decode(body).shape == (32, 48, 3)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [(10_000, 9_000), (16_000, 16_000)])
def test_pixels_are_counted_before_decoding(kind, size):
    with pytest.raises(ImageTooLarge, match="40,000,000"):
        decode(stated(kind, *size))


def test_a_limit_above_pillow_s_own_holds():
    body = stated("JPEG", 16_000, 16_000)  # decoded at an eighth of that
    assert decode_image(body, SPEC, ImageLimits(max_pixels=300_000_000)).shape == (32, 48, 3)


def test_an_avif_that_lies_about_its_size_is_not_opened():
    body = bytearray(picture(0, format="AVIF", size=(640, 480)))
    at = body.index(b"ispe") + 8
    body[at : at + 8] = struct.pack(">II", 64, 48)
    with pytest.raises(NotAnImage, match="none of the image types"):
        decode_image(bytes(body), SPEC, ImageLimits(max_pixels=64 * 48))


def test_a_tiff_with_tiles_larger_than_itself_is_too_large():
    body = tiff({256: 64, 257: 48, 322: 20_000, 323: 20_000, 324: 8, 325: 100})
    with pytest.raises(ImageTooLarge, match="20000 x 20000"):
        decode(body)


CLEARED = b"!\xf9\4\x09\0\0\x07\0"  # what Pillow fills when it reads the header, to clear the frame
BEFORE_THE_FRAME = {
    "nothing": b"",
    "a comment": b"!\xfe\1A\0",
    "an empty comment": b"!\xfe\0",
    "an extension that is empty at first": b"!\xf9\0\1A\0",
    "a loop without its count": b"!\xff\x0bNETSCAPE2.0\0\1A\0",
    "stray bytes": b"xyz",
}


def far(before):
    """Returns a GIF of 16 x 16 pixels whose frame is 50,000 to the right and below of it."""
    body = picture(0, format="GIF", size=(16, 16))
    at = 13 + 3 * 256
    frame = b"," + struct.pack("<4H", 49_984, 49_984, 16, 16)
    wide = b"," + struct.pack("<4H", 0, 0, 50_000, 50_000)
    return body[:at] + before + CLEARED + (frame if before else wide) + body[at + 9 :]


@pytest.mark.parametrize("before", BEFORE_THE_FRAME.values(), ids=BEFORE_THE_FRAME)
def test_a_gif_is_as_large_as_its_frame(before, monkeypatch):
    with pytest.raises(ImageTooLarge, match="50000 x 50000"):
        decode(far(before))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    with pytest.raises(Image.DecompressionBombError):  # the walk ended where Pillow's does
        Image.open(BytesIO(far(before)))


def swollen_png():
    rows = zlib.compressobj(1)  # 8,000 x 8,000 RGB: 192 MB in less than 1
    data = b"".join(rows.compress(bytes(1 + 24_000)) for _ in range(8_000)) + rows.flush()

    def chunk(kind, payload):
        crc = zlib.crc32(kind + payload)
        return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", crc)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8_000, 8_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bomb", [swollen_png, lambda: far(b"")], ids=["PNG", "GIF"])
def test_a_decompression_bomb_costs_no_memory(bomb):
    script = """
import resource, sys
from io import BytesIO
from PIL import Image
from exports.images import ImageSpec
from serving.decode_image import ImageLimits, decode_image
from serving.errors import ImageTooLarge
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
body, spec = sys.stdin.buffer.read(), ImageSpec(height=32, width=32)
small = BytesIO()
Image.new("L", (64, 64)).save(small, "PNG")
decode_image(small.getvalue(), spec, ImageLimits())
before = peak()
try:
    decode_image(body, spec, ImageLimits())
except ImageTooLarge:
    print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        input=bomb(),
        capture_output=True,
        check=True,
    )
    assert int(done.stdout) <= 4  # MiB


@pytest.mark.parametrize("resize", ["squash", "center_crop", "shortest_edge"])
@pytest.mark.parametrize("size", [(10_000, 1), (1, 10_000), (1, 1)])
def test_extreme_shapes_work(resize, size):
    body = BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(body, "PNG")
    spec = ImageSpec(height=32, width=48, resize=resize)
    pixels = decode_image(body.getvalue(), spec, LIMITS)
    assert pixels.shape == (32, 48, 3)
    assert (pixels == (10, 200, 30)).all()


def test_a_12_megapixel_photograph_is_decoded_at_a_fraction_of_its_size():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8))
    body = BytesIO()
    coarse.resize((4_000, 3_000)).save(body, "JPEG", quality=90)
    started = time.process_time()
    decode(body.getvalue())
    scaled = time.process_time() - started
    started = time.process_time()
    Image.open(BytesIO(body.getvalue())).load()
    assert scaled < 0.8 * (time.process_time() - started)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it mends
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_bytes_give_pixels_or_a_clear_error(kind):
    rng = np.random.default_rng(0)
    whole = picture(3, format=kind)
    for trial in range(200):
        body = bytearray(whole)
        reach = len(body) if trial % 2 else min(len(body), 80)  # every other time, the header
        for at in rng.integers(0, reach, 4):
            body[at] = rng.integers(256)
        try:
            assert decode(bytes(body)).shape == (32, 48, 3)
        except CaptionError as error:
            assert error.status in (400, 413, 415)  # noqa: PT017 - either way is right
