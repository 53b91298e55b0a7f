"""The proof of a bundle: it captions its golden images as its manifest promises."""

import logging
from collections.abc import Callable, Sequence

from exports.bundle import Bundle
from exports.errors import BundleError
from serving.decode_image import ImageLimits, decode_image
from serving.errors import BundleRejected, CaptionError, CaptionFailed
from serving.params import Result
from serving.session import Pixels

logger = logging.getLogger(__name__)

Answers = Callable[[Sequence[Pixels]], tuple[list[Result], list[str]]]
"""Images to their captions, and to what a matcher says of each that it should not, or ""."""


def prove(bundle: Bundle, answers: Answers) -> list[Pixels]:
    """Compares the answers to a bundle's golden images with its manifest; returns the images.

    Raises:
        BundleRejected: There are no golden images, or one of them is answered otherwise.
    """
    golden = bundle.manifest.golden
    if not golden:
        raise BundleRejected(f"{bundle.path}: without golden captions there is no proof")
    try:
        pixels = [
            decode_image(bundle.read(entry.image), bundle.manifest.image, ImageLimits())
            for entry in golden
        ]
        found, faults = answers(pixels)
    except (CaptionError, BundleError) as error:
        raise BundleRejected(f"{bundle.path}: {error}") from error
    except Exception as error:  # a graph may fail in any way
        raise not_shown(f"{bundle.path}: the graphs do not run") from error
    for entry, captions in zip(golden, found, strict=True):
        if isinstance(captions, CaptionFailed):
            raise BundleRejected(f"{bundle.path}: {entry.image}: {captions.detail}")
        if captions[0].token_ids != entry.token_ids:
            raise BundleRejected(
                f"{bundle.path}: {entry.image} is captioned {captions[0].text!r},"
                f" but the manifest promises {entry.text!r}"
            )
    for entry, fault in zip(golden, faults, strict=True):
        if fault:
            raise BundleRejected(f"{bundle.path}: {entry.image}: {fault}")
    return pixels


def not_shown(what: str) -> BundleRejected:
    """Logs the error that is being handled; its words, ONNX Runtime's, are not for clients."""
    logger.exception(what)
    return BundleRejected(f"{what}; the server's log says why")
