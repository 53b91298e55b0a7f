"""A look at how an image file is put together, before a decoder works through it.

What decoding costs should follow from the pixels and the bytes of a file. Six types have corners
where it does not: a megabyte of JPEG segments that Pillow appends one to another, each time copying
all before it; compressed profiles of a PNG, each a thousand times as long as the file says; strips
of a TIFF that all lie over one another and are read again for each. No photograph needs them.
"""

import re
import struct
from collections.abc import Callable, Iterator
from io import BytesIO

import numpy as np

from serving.errors import UndecodableImage

_PIECES = 1_000  # segments, chunks, tags: what stands around the pixels
_COMPRESSED = 32  # of those in a PNG, which may hold a MiB each
_EXIF = 32  # segments of a JPEG, which Pillow puts together, copying all before each
_PARTS = 20_000  # chunks of pixels in a PNG; 1 KB each, they hold 20 MB
_JUNK = 4_096  # bytes of a JPEG's head that belong to nothing; Pillow reads them one by one
_BLOCKS = 20_000  # of up to 255 bytes, in the extensions of a GIF
_GIF_COMMENT, _GIF_APPLICATION = b"\xfe", b"\xff"
_STRIPS = 500_000
_SCANNED = 2_000_000_000  # pixels of all scans of a JPEG: fifty times the largest image

_MARKER = re.compile(rb"[^\xff]*+\xff++(?=.)", re.DOTALL)
_BARE_MARKERS = frozenset((0x00, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)))
_SOS, _APP1 = 0xDA, 0xE1
# The head of a scan of one to four components; its length says how many.
_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
_PNG_COMPRESSED = (b"iCCP", b"zTXt", b"iTXt")
_PNG_PIXELS = (b"IDAT", b"fcTL", b"fdAT")
_TIFF_COMPRESSION, _TIFF_RAW = 259, 1
_TIFF_OFFSETS, _TIFF_COUNTS = (273, 324), (279, 325)  # of strips, of tiles
_TIFF_NUMBERS = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 8: "i2", 9: "i4", 16: "u8", 17: "i8"}


def check_pieces(kind: str, body: bytes) -> None:
    """Looks through the file of a type, as Pillow calls it; what is damaged is left to Pillow.

    Raises:
        UndecodableImage: It has more pieces than an image needs, or they lie over one another.
    """
    if check := _CHECKS.get(kind):
        check(body)


def check_scans(body: bytes, pixels: int) -> None:
    """Looks at how often a JPEG goes over its pixels.

    A progressive one may do so any number of times, by some fifty bytes each, and each costs as
    much as the first. Counted are heads of scans wherever they stand, in previews too.

    Raises:
        UndecodableImage: Far more often than any encoder makes it.
    """
    if sum(1 for _ in _SCAN.finditer(body)) * pixels > _SCANNED:
        raise UndecodableImage("The JPEG file goes over its pixels too often: save it anew.")


def _too_many(kind: str, what: str) -> UndecodableImage:
    return UndecodableImage(f"The {kind} file has {what}: save it anew.")


def _check_jpeg(body: bytes) -> None:
    at, junk, exif = 2, 0, 0
    for _ in range(_PIECES):
        while True:
            found = _MARKER.match(body, at)
            if found is None:
                return
            junk += found.end() - found.start() - 1
            if junk > _JUNK:
                raise _too_many("JPEG", f"more than {_JUNK:,} bytes of nothing in its head")
            at = found.end() + 1
            marker = body[at - 1]
            if marker == _SOS:
                return
            if marker not in _BARE_MARKERS:
                break
            junk += 2
        exif += marker == _APP1 and body[at + 2 : at + 8] == b"Exif\0\0"
        if exif > _EXIF:
            raise _too_many("JPEG", f"more than {_EXIF} EXIF segments")
        at += max(int.from_bytes(body[at : at + 2]), 2)
    raise _too_many("JPEG", f"more than {_PIECES:,} segments before its pixels")


def _check_png(body: bytes) -> None:
    pieces = compressed = parts = 0
    at, name = 8, b""
    while at + 8 <= len(body) and name != b"IEND":
        length, name = int.from_bytes(body[at : at + 4]), body[at + 4 : at + 8]
        at += 12 + length
        if name in _PNG_PIXELS:
            parts += 1
        else:
            pieces += 1
            compressed += name in _PNG_COMPRESSED
        if parts > _PARTS:
            raise _too_many("PNG", f"its pixels in more than {_PARTS:,} chunks")
        if pieces > _PIECES or compressed > _COMPRESSED:
            raise _too_many("PNG", "too many texts, profiles or other chunks beside its pixels")


def _check_webp(body: bytes) -> None:
    pieces, at = 0, 12
    while at + 8 <= len(body):
        pieces += body[at : at + 4] != b"ANMF"
        if pieces > _PIECES:
            raise _too_many("WEBP", f"more than {_PIECES:,} chunks beside its pixels")
        length = int.from_bytes(body[at + 4 : at + 8], "little")
        at += 8 + length + length % 2


def gif_reach(body: bytes) -> tuple[int, int]:
    """Returns the width and height that the first frame of a GIF reaches to, (0, 0) without one.

    Pillow may fill as much memory while it reads the header, whatever size the file states before.
    The walk is Pillow's own, oddities and all, so that both find the same frame.

    Raises:
        UndecodableImage: More stands before the frame than an image needs.
    """
    file, blocks = BytesIO(body), 0
    file.seek(13 + _gif_palette(body, 10))
    refusal = _too_many("GIF", "too many comments or extensions before its pixels")

    def block() -> bytes:
        nonlocal blocks
        blocks += 1
        if blocks > _BLOCKS:
            raise refusal
        length = file.read(1)
        return file.read(length[0]) if length else b""

    for _ in range(_PIECES):
        piece = file.read(1)
        if piece in (b"", b";"):
            return 0, 0
        if piece == b",":
            left, top, width, height = struct.unpack("<4H", file.read(8).ljust(8, b"\0"))
            return left + width, top + height
        if piece == b"!":
            label, first = file.read(1), block()
            if label == _GIF_APPLICATION and first.startswith(b"NETSCAPE2.0"):
                block()
            if label != _GIF_COMMENT or first:
                while block():
                    pass
    raise refusal


def _gif_palette(body: bytes, at: int) -> int:
    flags = body[at] if at < len(body) else 0
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _check_tiff(body: bytes) -> None:
    order = "<" if body.startswith(b"II") else ">"
    tags = _tiff_tags(body, order)
    offsets = counted = 0
    claimed, is_raw = 0.0, True
    for tag, kind, count, at in tags:
        if tag == _TIFF_COMPRESSION:
            (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), body, at)
            is_raw = is_raw and value == _TIFF_RAW
        if tag not in _TIFF_OFFSETS + _TIFF_COUNTS or kind not in _TIFF_NUMBERS:
            continue
        if count > _STRIPS:
            raise _too_many("TIFF", f"more than {_STRIPS:,} strips")
        if tag in _TIFF_OFFSETS:
            offsets = max(offsets, count)
            continue
        number = np.dtype(order + _TIFF_NUMBERS[kind])
        if number.itemsize * count > 4:
            (at,) = struct.unpack_from(order + "I", body, at)
        end = at + number.itemsize * count
        counts = np.frombuffer(body[at:end], number) if end <= len(body) else np.empty(0, "u1")
        claimed += float(np.abs(counts, dtype=np.float64).sum())
        counted += 1
    if not counted:
        claimed = offsets * len(body)  # what libtiff takes the strips for
    if claimed > 2 * len(body) and not is_raw:  # Pillow reads raw ones by their pixels
        raise _too_many("TIFF", "strips that lie over one another")


def _tiff_tags(body: bytes, order: str) -> Iterator[tuple[int, int, int, int]]:
    """Yields tag, type, count and the place of the value of each entry of the first directory."""
    start = int.from_bytes(body[4:8], "little" if order == "<" else "big")
    if start + 2 > len(body):
        return
    (entries,) = struct.unpack_from(order + "H", body, start)
    if entries > _PIECES:
        raise _too_many("TIFF", f"more than {_PIECES:,} tags")
    for at in range(start + 2, start + 2 + 12 * entries, 12):
        if at + 12 > len(body):
            return
        tag, kind, count = struct.unpack_from(order + "HHI", body, at)
        yield tag, kind, count, at + 8


_CHECKS: dict[str, Callable[[bytes], None]] = {
    "JPEG": _check_jpeg,
    "PNG": _check_png,
    "WEBP": _check_webp,
    "TIFF": _check_tiff,
}
