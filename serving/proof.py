"""The proof of a bundle: it captions its golden images as its manifest promises."""

import logging
import math
import time
from collections.abc import Callable, Sequence

from exports.bundle import Bundle
from exports.errors import BundleError
from serving.decode_image import ImageLimits, decode_image
from serving.errors import BundleRejected, CaptionError, CaptionFailed
from serving.params import Result
from serving.session import Pixels

logger = logging.getLogger(__name__)

# How ONNX Runtime says so: it has no error of its own for it.
_NO_MEMORY = ("bad_alloc", "bad allocation", "failed to allocate", "out of memory")

Answers = Callable[[Sequence[Pixels]], tuple[list[Result], list[str]]]
"""Images to their captions, and to what a matcher says of each that it should not, or ""."""


def prove(bundle: Bundle, answers: Answers, *, allowed_s: float = math.inf) -> list[Pixels]:
    """Compares the answers to a bundle's golden images with its manifest; returns the images.

    Args:
        bundle: The bundle.
        answers: What it says.
        allowed_s: How long all the answers together may take.

    Raises:
        BundleRejected: There are no golden images, one of them is answered otherwise, or the
            answers took too long.
    """
    golden = bundle.manifest.golden
    if not golden:
        raise BundleRejected(f"{bundle.path}: without golden captions there is no proof", "golden")
    try:
        pixels = [
            decode_image(bundle.read(entry.image), bundle.manifest.image, ImageLimits())
            for entry in golden
        ]
        began = time.monotonic()
        found, faults = answers(pixels)
        spent_s = time.monotonic() - began
    except BundleError as error:
        raise BundleRejected(f"{bundle.path}: {error}", error.cause) from error
    except CaptionError as error:
        raise BundleRejected(f"{bundle.path}: {error.detail}", "golden") from error
    except Exception as error:  # a graph may fail in any way
        raise not_shown(f"{bundle.path}: the graphs do not run", error) from error
    for entry, captions in zip(golden, found, strict=True):
        if isinstance(captions, CaptionFailed):
            raise BundleRejected(f"{bundle.path}: {entry.image}: {captions.detail}", "golden")
        if captions[0].token_ids != entry.token_ids:
            raise BundleRejected(
                f"{bundle.path}: {entry.image} is captioned {captions[0].text!r},"
                f" but the manifest promises {entry.text!r}",
                "golden",
            )
    for entry, fault in zip(golden, faults, strict=True):
        if fault:
            raise BundleRejected(f"{bundle.path}: {entry.image}: {fault}", "golden")
    if spent_s > allowed_s:
        raise BundleRejected(
            f"{bundle.path}: {len(golden)} golden images took {spent_s:.2f} s; {allowed_s:g} s are"
            " allowed",
            "slow",
        )
    return pixels


def not_shown(what: str, error: Exception) -> BundleRejected:
    """Logs the error that is being handled; its words, ONNX Runtime's, are not for clients."""
    logger.exception(what)
    words = str(error).lower()
    memory = isinstance(error, MemoryError) or any(sign in words for sign in _NO_MEMORY)
    return BundleRejected(f"{what}; the server's log says why", "memory" if memory else "onnx")
