"""A file of every format that Pillow can open, and files that are two things at once.

Most are written by Pillow. What it only reads is put together here from its specification, in the
smallest file that Pillow takes for one.
"""

import struct
import warnings
import zlib
from io import BytesIO
from zipfile import ZipFile

from PIL import Image
from tiny_bundle import picture

READ_HERE = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
FORMATS = (
    *("AVIF", "BLP", "BMP", "BUFR", "CUR", "DCX", "DDS", "DIB", "EPS", "FITS", "FLI", "FTEX"),
    *("GBR", "GIF", "GRIB", "HDF5", "ICNS", "ICO", "IM", "IMT", "IPTC", "JPEG", "JPEG2000"),
    *("MCIDAS", "MPEG", "MSP", "PCD", "PCX", "PIXAR", "PNG", "PPM", "PSD", "QOI", "SGI", "SPIDER"),
    *("SUN", "TGA", "TIFF", "WEBP", "WMF", "XBM", "XPM", "XVTHUMB"),
)  # the 43 of Pillow 13
SIDE = 16
PIXELS = bytes(range(256))  # of a square, in grey


def saved(kind, image=None, **save):
    """Returns an image as Pillow writes it."""
    body = BytesIO()
    image = image or Image.frombytes("L", (SIDE, SIDE), PIXELS).convert("RGB")
    image.save(body, kind, **save)
    return body.getvalue()


def _cur():
    icon = bytearray(saved("ICO", sizes=[(SIDE, SIDE)], bitmap_format="bmp"))
    icon[2] = 2
    return bytes(icon)


def _dcx():
    return struct.pack("<III", 0x3ADE68B1, 12, 0) + saved("PCX")


def _fits():
    cards = [("SIMPLE", "T"), ("BITPIX", 8), ("NAXIS", 2), ("NAXIS1", SIDE), ("NAXIS2", SIDE)]
    head = "".join(f"{name:8}= {value:>20}".ljust(80) for name, value in cards) + "END"
    return head.ljust(2880).encode() + PIXELS.ljust(2880, b"\0")


def _fli():
    head = struct.pack("<IHHHHHHI", 128 + 16, 0xAF11, 1, SIDE, SIDE, 8, 3, 5).ljust(128, b"\0")
    return head + struct.pack("<IHH", 16, 0xF1FA, 0).ljust(16, b"\0")


def _ftex():
    head = b"FTEX" + struct.pack("<iiiiiii", 0, SIDE, SIDE, 1, 1, 1, 32)
    return head + struct.pack("<i", 3 * SIDE * SIDE) + bytes(3 * SIDE * SIDE)


def _gbr():
    return struct.pack(">IIIII4sI", 29, 2, SIDE, SIDE, 1, b"GIMP", 10) + b"\0" + PIXELS


def _iptc():
    def field(record, number, content):
        return struct.pack(">BBBH", 0x1C, record, number, len(content)) + content

    size = struct.pack(">H", SIDE)
    head = [(3, 60, b"\1\0"), (3, 20, size), (3, 30, size), (3, 120, b"\1"), (8, 10, PIXELS)]
    return b"".join(field(*one) for one in head)


def _mcidas():
    words = [0] * 64
    words[1], words[8], words[9], words[10], words[13], words[33] = 4, SIDE, SIDE, 1, 1, 256
    return struct.pack(">64i", *words) + PIXELS


def _pcd():
    return bytes(2048) + b"PCD_IPI".ljust(1539, b"\0") + bytes(96 * 2048)


def _pixar():
    head = bytearray(b"\200\350\0\0".ljust(1024, b"\0"))
    head[416:420] = struct.pack("<HH", SIDE, SIDE)
    head[424:428] = struct.pack("<HH", 14, 2)
    return bytes(head) + PIXELS * 3


def _psd():
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, SIDE, SIDE, 8, 3)
    return head + struct.pack(">IIIH", 0, 0, 0, 0) + PIXELS * 3


def _sun():
    return struct.pack(">8I", 0x59A66A95, SIDE, SIDE, 8, len(PIXELS), 1, 0, 0) + PIXELS


def _wmf():
    placeable = struct.pack("<IHhhhhHIH", 0x9AC6CDD7, 0, 0, 0, 100, 100, 96, 0, 0)
    return placeable + b"\1\0\x09\0" + bytes(60)


def _xpm():
    rows = ",\n".join(['"4 4 2 1"', '"a c #ff0000"', '"b c #0000ff"', *['"abab"'] * 4])
    return f"/* XPM */\nstatic char *x[] = {{\n{rows}\n}};\n".encode()


MADE = {
    "BUFR": lambda: b"BUFR" + bytes(32),
    "CUR": _cur,
    "DCX": _dcx,
    "FITS": _fits,
    "FLI": _fli,
    "FTEX": _ftex,
    "GBR": _gbr,
    "GRIB": lambda: b"GRIB\0\0\0\1" + bytes(32),
    "HDF5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(32),
    "IMT": lambda: b"width 16\nheight 16\npixel n8\n\x0c" + PIXELS,
    "IPTC": _iptc,
    "MCIDAS": _mcidas,
    "MPEG": lambda: b"\0\0\1\xb3" + bytes([0x01, 0x00, 0x10]) + bytes(32),
    "MSP": lambda: saved("MSP", Image.new("1", (SIDE, SIDE))),
    "PCD": _pcd,
    "PIXAR": _pixar,
    "PSD": _psd,
    "SPIDER": lambda: saved("SPIDER", Image.new("F", (SIDE, SIDE))),
    "SUN": _sun,
    "WMF": _wmf,
    "XBM": lambda: saved("XBM", Image.new("1", (SIDE, SIDE))),
    "XPM": _xpm,
    "XVTHUMB": lambda: b"P7 332\n#XVVERSION\n#END_OF_COMMENTS\n16 16 255\n" + PIXELS,
    "BLP": lambda: saved("BLP", Image.new("P", (SIDE, SIDE))),
}


def file_of(kind):
    """Returns a file of a format, by Pillow's name of it."""
    with warnings.catch_warnings(action="ignore"):  # some are deprecated
        return MADE.get(kind, lambda: saved(kind))()


def png_chunk(kind, content):
    """Returns a chunk of a PNG file."""
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png_of(*chunks, size=(8, 8)):
    """Returns a grey PNG with chunks before its pixels."""
    width, height = size
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x80" * width) * height)
    pieces = ((b"IHDR", head), *chunks, (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*piece) for piece in pieces)


def segment(marker, content=b""):
    """Returns a segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def tiff_of(tags, data):
    """Returns a TIFF of numbers or lists of them by tag; `data` stands behind its directory.

    Where a value is `...`, it is the place of `data`.
    """
    place = 8 + 2 + 12 * len(tags) + 4
    lists = {tag: value for tag, value in tags.items() if isinstance(value, list)}
    start = place + sum(4 * len(value) for value in lists.values())
    entries = extra = b""
    for tag, value in sorted(tags.items()):
        if tag in lists:
            numbers = [start if number is ... else number for number in value]
            entries += struct.pack("<HHII", tag, 4, len(numbers), place + len(extra))
            extra += struct.pack(f"<{len(numbers)}I", *numbers)
        else:
            entries += struct.pack("<HHII", tag, 4, 1, start if value is ... else value)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + entries + bytes(4) + extra + data


def _zip():
    body = BytesIO()
    with ZipFile(body, "w") as archive:
        archive.writestr("evil.js", "alert(1)")
    return body.getvalue()


def polyglots():
    """Returns files that are two things at once, and whether they are images here."""
    gif, jpeg, png = (picture(0, format=kind) for kind in ("GIF", "JPEG", "PNG"))
    script = b"=1;alert(1)//"
    size = int.from_bytes(b"/*", "little")
    gif_script = b"GIF89a" + b"/*" + gif[8:] + b"*/" + script
    assert int.from_bytes(gif_script[6:8], "little") == size
    html = b"<script>alert(1)</script>"
    return {
        "a JPEG and a zip": (jpeg + _zip(), True),
        "a zip and a JPEG": (_zip() + jpeg, False),
        "a GIF and a script": (gif_script, True),
        "a GIF with a script behind it": (gif + script, True),
        "a PNG with a page behind it": (png + html, True),
        "a PNG with a page in it": (png_of((b"tEXt", b"a\0" + html)), True),
        "a JPEG with PHP in it": (jpeg[:2] + segment(0xFE, b"<?php ?>") + jpeg[2:], True),
        "a JPEG with a PDF in it": (jpeg[:2] + segment(0xFE, b"%PDF-1.7\n") + jpeg[2:], True),
        "a PDF": (saved("PDF"), False),
        "a PDF with a JPEG in it": (b"%PDF-1.7\n" + jpeg, False),
        "a page with a PNG in it": (html + png, False),
        "an SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", False),
        "a blank and a PNG": (b" " + png, False),
        "a BigTIFF": (saved("TIFF", big_tiff=True), False),
        "an icon with a PNG in it": (saved("ICO"), False),
    }
