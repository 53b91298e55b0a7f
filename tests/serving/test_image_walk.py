"""Files made to cost more than an image are refused at once, and whole photographs are not."""

import struct
import time
import zlib
from io import BytesIO
from pathlib import Path

import pytest
from image_zoo import PIXELS, png_chunk, png_of, saved, segment, tiff_of
from PIL import Image
from tiny_bundle import picture

from exports.images import ImageSpec
from serving.decode_image import ImageLimits, decode_image
from serving.errors import UndecodableImage

SPEC = ImageSpec(height=32, width=48)
MEGABYTE = zlib.compress(bytes(2**20 - 1), 9)  # of zeros, in a KB


def within(body, at, piece):
    """Returns a file with something in the middle."""
    return body[:at] + piece + body[at:]


def jpeg(piece):
    return within(picture(0, format="JPEG"), 2, piece)


def gif(piece):
    return within(picture(0, format="GIF"), 13 + 3 * 256, piece)


def scans(width, height, count):
    """Returns a progressive JPEG that goes over its pixels again, by sixty bytes each time."""

    def bits(text):
        text += "1" * (-len(text) % 8)
        return int(text, 2).to_bytes(len(text) // 8).replace(b"\xff", b"\xff\0")

    def table(kind, symbol):
        return segment(0xC4, bytes([kind, 1, *[0] * 15, symbol]))

    blocks = -(-width // 8) * -(-height // 8)
    frame = segment(0xC2, struct.pack(">BHHBBBB", 8, height, width, 1, 1, 0x11, 0))
    head = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64) + frame + table(0, 0) + table(0x10, 0xE0)
    first = segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bits("0" * blocks)
    more = segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + bits(("0" + "1" * 14) * -(-blocks // 32767))
    return head + first + more * count + b"\xff\xd9"


def strips(rows, data, *, counts=True, compression=8):
    """Returns a TIFF all of whose rows lie in the same place."""
    tags = {256: 16, 257: rows, 258: 8, 259: compression, 262: 1, 273: [...] * rows, 277: 1, 278: 1}
    return tiff_of(tags | ({279: [len(data)] * rows} if counts else {}), data)


def webp(count):
    body = picture(0, format="WEBP") + b"abcd\0\0\0\0" * count
    return body[:4] + struct.pack("<I", len(body) - 8) + body[8:]


EMPTY_BLOCKS = b"\x78\x9c" + b"\0\0\0\xff\xff" * 200_000 + zlib.compress(bytes(16))[2:]
WIDE = [(tag, [0, 0]) for tag in range(40_000, 42_000)]
DAMAGED = {
    "profiles that swell": lambda: png_of(*[(b"iCCP", b"a\0\0" + MEGABYTE)] * 1000),
    "texts that swell": lambda: png_of(*[(b"zTXt", b"%d\0\0" % n + MEGABYTE) for n in range(100)]),
    "one text that swells": lambda: png_of(
        (b"zTXt", b"a\0\0" + zlib.compress(bytes(3 * 10**7), 9))
    ),
    "a profile that swells": lambda: png_of(
        (b"iCCP", b"a\0\0" + zlib.compress(bytes(3 * 10**7), 9))
    ),
    "chunks": lambda: png_of(*[(b"tEXt", b"")] * 80_000),
    "chunks after the pixels": lambda: png_of()[:-12] + png_chunk(b"tEXt", b"") * 80_000,
    "pixels in empty chunks": lambda: png_of(*[(b"IDAT", b"")] * 200_000),
    "profiles behind a frame": lambda: (
        png_of()[:-12]
        + png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 1, 1, 0, 0, 1, 1, 0, 0))
        + png_chunk(b"iCCP", b"a\0\0" + MEGABYTE) * 1000
    ),
    "large EXIF segments": lambda: jpeg(segment(0xE1, b"Exif\0\0" + bytes(16_000)) * 200),
    "EXIF segments": lambda: jpeg(segment(0xE1, b"Exif\0\0" + bytes(40)) * 40_000),
    "empty segments": lambda: jpeg(segment(0xE5) * 200_000),
    "segments that are shorter than they can be": lambda: jpeg(b"\xff\xe5\0\0" * 200_000),
    "nothing between segments": lambda: jpeg(segment(0xE5) + bytes(2_000_000)),
    "filling between segments": lambda: jpeg(b"\xff" * 2_000_000),
    "markers between segments": lambda: jpeg(b"\xff\xd0" * 1_000_000),
    "scans": lambda: scans(8_000, 5_000, 500),
    "comments": lambda: gif(b"\x21\xfe\1A\0" * 200_000),
    "comments of an old GIF": lambda: gif(b"\x21\xfe" + b"\2AB" * 300_000 + b"\0"),
    "stray bytes": lambda: gif(b"x" * 1_000_000),
    "chunks of a WebP": lambda: webp(400_000),
    "tags": lambda: tiff_of({256: 16, 257: 16, 273: ..., 279: 256} | dict(WIDE), PIXELS),
    "strips over one another": lambda: strips(5_000, EMPTY_BLOCKS),
    "strips without lengths": lambda: strips(5_000, EMPTY_BLOCKS, counts=False),
    "too many strips": lambda: tiff_of({256: 1, 257: 1, 273: ..., 279: [0] * 600_000}, PIXELS),
}


def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def refusal(body):
    """Returns the processor seconds and the kilobytes that a refusal costs."""
    decode_image(picture(0), SPEC, ImageLimits())
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = kilobytes("VmRSS"), time.thread_time()
    with pytest.raises(UndecodableImage):
        decode_image(body, SPEC, ImageLimits())
    return time.thread_time() - start, kilobytes("VmHWM") - before


@pytest.mark.parametrize("name", DAMAGED)
def test_a_bomb_is_refused_at_once_and_costs_no_memory(name):
    body = DAMAGED[name]()
    assert len(body) < 4_000_000
    seconds, memory = refusal(body)
    assert seconds < 0.05
    assert memory < 20_000


def frames(kind, count):
    images = [Image.new("RGB", (2, 2), (n % 256, n // 256, 9)) for n in range(count)]
    return saved(kind, images[0], save_all=True, append_images=images[1:])


HARMLESS = {
    "an animated GIF": lambda: frames("GIF", 1_200),
    "an animated PNG": lambda: frames("PNG", 1_200),
    "an animated WebP": lambda: frames("WEBP", 1_200),
    "a TIFF of many pages": lambda: frames("TIFF", 300),
    "a JPEG with a large profile": lambda: saved("JPEG", icc_profile=bytes(3_000_000)),
    "a PNG with a large profile": lambda: saved("PNG", icc_profile=bytes(900_000)),
    "a WebP with a large profile": lambda: saved("WEBP", icc_profile=bytes(3_000_000)),
    "a GIF with a long comment": lambda: saved("GIF", comment=b"a" * 200_000),
    "a JPEG with a film behind it": lambda: (
        picture(0, format="JPEG", size=(4_000, 3_000)) + b"\xff\xda" * 100_000
    ),
    "a GIF with a film's worth of comments behind its picture": lambda: (
        saved("GIF")[:-1] + b"\x21\xfe" + b"\1A" * 5_000_000 + b"\0;"
    ),
    "a progressive JPEG": lambda: picture(0, format="JPEG", size=(1_600, 1_200), progressive=True),
    "a JPEG of some scans": lambda: scans(640, 480, 20),
    "a PNG with texts": lambda: png_of(
        *[(b"tEXt", b"a\0b")] * 300, *[(b"zTXt", b"a\0\0" + MEGABYTE)]
    ),
    "a TIFF of one row a strip": lambda: saved("TIFF", Image.new("L", (16, 9_000)), strip_size=16),
    "a raw TIFF whose strips have no lengths": lambda: strips(
        8, PIXELS, counts=False, compression=1
    ),
    "a TIFF whose strip has no length": lambda: strips(1, PIXELS, counts=False, compression=1),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_large_in_its_own_way_is_read(name):
    body = HARMLESS[name]()
    start = time.thread_time()
    assert decode_image(body, SPEC, ImageLimits()).shape == (32, 48, 3)
    assert time.thread_time() - start < 0.8


@pytest.mark.parametrize("order", ["little", "big"])
def test_tiffs_of_either_order_are_looked_through(order):
    body = BytesIO()
    image = Image.frombytes("I;16" if order == "little" else "I;16B", (16, 8), PIXELS)
    image.save(body, "TIFF")
    assert body.getvalue()[:2] == (b"II" if order == "little" else b"MM")
    assert decode_image(body.getvalue(), SPEC, ImageLimits()).shape == (32, 48, 3)
    letter = "<" if order == "little" else ">"
    entries = struct.pack(letter + "HHIHHHHII", 259, 3, 1, 8, 0, 279, 4, 2, 38)
    twice = struct.pack(letter + "II", 900, 900) + bytes(800)
    head = body.getvalue()[:4] + struct.pack(letter + "IH", 8, 2)
    with pytest.raises(UndecodableImage, match="over one another"):
        decode_image(head + entries + bytes(4) + twice, SPEC, ImageLimits())
