"""Opening image files: pixels for training, and the check of a whole data set beforehand.

Pixels always come from `exports.images.preprocess`, the one resize of the project, so that the
model sees in training what it will see in service.
"""

import hashlib
import io
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from tqdm import tqdm

from exports.errors import ImageError
from exports.images import ImageSpec, preprocess
from trainer.data import Example, Only, describe, read_examples
from trainer.errors import DataError

logger = logging.getLogger(__name__)

MIN_SIDE = 16  # pixels; a smaller picture is an icon or a placeholder, not a photograph
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations whose width is the picture's height
_HASH_SPEC = ImageSpec(height=9, width=9, resize="squash", interpolation="bicubic")


def load_pixels(path: Path, spec: ImageSpec) -> NDArray[np.uint8]:
    """Returns the pixels of an image file as the model takes them: uint8 (H, W, 3).

    Raises:
        DataError: The file is missing or cannot be decoded; `scan_images` finds such files
            before an epoch starts.
    """
    try:
        with Image.open(path) as image:
            return preprocess(image, spec)
    except Exception as error:  # a damaged file may raise anything from Pillow's plugins
        raise DataError(f"{path}: {_reason(error)}") from error


def load_thumbnail(path: Path, long_side: int) -> NDArray[np.uint8]:
    """Returns a small upright copy of the whole image for people to look at: uint8 (h, w, 3).

    Args:
        path: The image file.
        long_side: The larger of h and w at most; a smaller image keeps its size.

    Raises:
        DataError: The file is missing or cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            if image.format not in ("JPEG", "MPO"):  # those decode straight to a smaller size
                image.load()  # before its EXIF is asked for, see `_orientation`
            width, height = image.size
            if _orientation(image) in _SIDEWAYS:
                width, height = height, width
            scale = min(1.0, long_side / max(width, height))
            spec = ImageSpec(
                height=max(1, round(height * scale)), width=max(1, round(width * scale))
            )
            return preprocess(image, spec)
    except Exception as error:  # a damaged file may raise anything from Pillow's plugins
        raise DataError(f"{path}: {_reason(error)}") from error


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What identifies a picture: its bytes exactly, its look approximately.

    Attributes:
        sha256: Hex digest of the file.
        look: Difference hash, 128 bits: whether brightness rises from each cell of a 9 x 9
            reduction to the next, rightwards and downwards. Copies of a picture at another
            size or quality differ in a few bits.
    """

    sha256: str
    look: bytes


@dataclass(frozen=True, slots=True)
class ScanReport:
    """What a scan found.

    Attributes:
        ok: The examples that can be trained on, in their order.
        problems: Files left out, each with the reason.
        notes: Files used after a conversion that their owner may want to know of.
        fingerprints: Of every file in `ok`.
    """

    ok: list[Example]
    problems: list[tuple[Path, str]]
    notes: list[tuple[Path, str]]
    fingerprints: dict[Path, Fingerprint]

    def summary(self, *, limit: int = 20) -> str:
        """Returns the findings as text: each problem named (up to `limit`), notes counted."""
        lines = [f"{len(self.ok)} images ready, {len(self.problems)} left out"]
        lines += [f"  left out: {path}: {reason}" for path, reason in self.problems[:limit]]
        if len(self.problems) > limit:
            lines.append(f"  ... and {len(self.problems) - limit} more")
        by_note: dict[str, list[Path]] = {}
        for path, note in self.notes:
            by_note.setdefault(note, []).append(path)
        for note, paths in sorted(by_note.items()):
            lines.append(f"  {note}: {len(paths)}, such as {paths[0]}")
        return "\n".join(lines)


def scan_images(
    examples: Sequence[Example], *, progress: bool = True, workers: int | None = None
) -> ScanReport:
    """Returns which images can be decoded, having decoded every one of them.

    Args:
        examples: The data set; an image that occurs twice is decoded once.
        progress: Shows a progress bar on a terminal.
        workers: Decoding threads; by default Python's choice for this machine.
    """
    paths = list(dict.fromkeys(example.image for example in examples))
    with ThreadPoolExecutor(workers) as pool:
        found = list(
            tqdm(
                pool.map(_inspect, paths),
                total=len(paths),
                desc="checking images",
                unit="img",
                disable=None if progress else True,  # None: silent where no terminal is
            )
        )
    results = dict(zip(paths, found, strict=True))
    return ScanReport(
        ok=[item for item in examples if results[item.image].fingerprint is not None],
        problems=[(path, item.reason) for path, item in results.items() if item.reason],
        notes=[(path, note) for path, item in results.items() for note in item.notes],
        fingerprints={
            path: item.fingerprint for path, item in results.items() if item.fingerprint is not None
        },
    )


def usable_examples(examples: Sequence[Example], *, progress: bool = True) -> list[Example]:
    """Returns the examples whose images decode, and prints which do not, before an epoch starts.

    Raises:
        DataError: Not one image is left.
    """
    report = scan_images(examples, progress=progress)
    print(report.summary())
    if not report.ok:
        raise DataError("no image of the data set can be decoded; the reasons are listed above")
    return report.ok


def read_captioned(
    source: Path, images: Path | None, split: str | None, only: Only | None = None
) -> list[Example]:
    """Returns the examples that have captions and whose images decode, and says what was read.

    Raises:
        DataError: the data set cannot be read, or has no such example.
    """
    examples = read_examples(source, images=images, split=split, only=only)
    print(describe(source, examples))
    captioned = [example for example in examples if example.captions]
    if not captioned:
        raise DataError(f"{source}: none of its {len(examples)} images has a caption")
    return usable_examples(captioned)


@dataclass(frozen=True, slots=True)
class _Inspection:
    fingerprint: Fingerprint | None
    reason: str
    notes: tuple[str, ...]


def _inspect(path: Path) -> _Inspection:
    try:
        body = path.read_bytes()
        with Image.open(io.BytesIO(body)) as image:
            if min(image.size) < MIN_SIDE:
                width, height = image.size
                return _Inspection(None, f"tiny: {width} x {height} pixels", ())
            pixels = preprocess(image, _HASH_SPEC)
            notes = _notes(image)
    except Exception as error:  # a damaged file may raise anything from Pillow's plugins
        return _Inspection(None, _reason(error), ())
    digest = hashlib.sha256(body).hexdigest()
    return _Inspection(Fingerprint(digest, _look(pixels)), "", notes)


def _notes(image: Image.Image) -> tuple[str, ...]:
    """Returns how this image departs from an upright 8-bit RGB photograph."""
    notes = []
    if image.mode == "CMYK":
        notes.append("CMYK, converted to RGB")
    if image.mode.startswith(("I", "F")):
        notes.append("more than 8 bits a channel, scaled to 8")
    if getattr(image, "is_animated", False):
        notes.append("several frames, first one used")
    if _orientation(image) != 1:
        notes.append("turned upright as its EXIF says")
    return tuple(notes)


def _orientation(image: Image.Image) -> object:
    """Returns the EXIF orientation, 1 where there is none or the EXIF block is damaged.

    Pillow decodes a whole PNG to find its EXIF, and once that has failed the image passes for
    loaded. So this comes after decoding, where a failure is heard.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF block turns nothing: `preprocess` ignores it too
        return 1


def _look(pixels: NDArray[np.uint8]) -> bytes:
    """Returns the difference hash of a (9, 9, 3) reduction, 16 bytes."""
    grey = pixels.astype(np.int32) @ np.array([299, 587, 114], np.int32)  # (9, 9)
    rightwards = grey[:8, 1:] > grey[:8, :-1]
    downwards = grey[1:, :8] > grey[:-1, :8]
    bits: NDArray[Any] = np.concatenate([rightwards.ravel(), downwards.ravel()])
    return np.packbits(bits).tobytes()


def _reason(error: Exception) -> str:
    if isinstance(error, ImageError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can open"
    return f"cannot be decoded: {error or type(error).__name__}"


def load_all(
    examples: Sequence[Example], spec: ImageSpec, *, workers: int | None = None
) -> NDArray[np.uint8]:
    """Returns the pixels of every example, uint8 (n, H, W, 3), decoded once for all epochs.

    Args:
        examples: Images that a scan found usable.
        spec: The size; n * H * W * 3 bytes of memory are taken.
        workers: Decoding threads; by default Python's choice for this machine.
    """
    pixels = np.empty((len(examples), spec.height, spec.width, 3), np.uint8)
    with ThreadPoolExecutor(workers) as pool:
        decoded = pool.map(lambda example: load_pixels(example.image, spec), examples)
        bar = tqdm(decoded, total=len(examples), desc="decoding images", unit="img", disable=None)
        for row, image in enumerate(bar):
            pixels[row] = image
    return pixels
