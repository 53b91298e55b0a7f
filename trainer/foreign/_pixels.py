"""Image preprocessing of `transformers` as an `ImageSpec` and a normalisation.

`exports.images.preprocess` gives the pixels of its PIL processors, bit for bit. Elsewhere they
differ:

1. Its default processors resize in PyTorch, which rounds otherwise: by one step of 255, seldom two.
2. A JPEG of at least four times the target's size is decoded at a fraction of its own: by up to 14
   steps at edges, by one on average.
3. Photographs are turned upright by their EXIF, transparency is laid on white, and of pictures 16
   times as long as wide the ends are cut off first; those processors do nothing of it.
"""

from typing import Any, NamedTuple

from exports.images import ImageSpec
from trainer.errors import CheckpointError

_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


class Pixels(NamedTuple):
    """How images are prepared: size, and mean and deviation a channel in values of 0..255."""

    image: ImageSpec
    mean: tuple[float, ...]
    std: tuple[float, ...]


def pixels_of(processor: Any, where: str) -> Pixels:
    """Returns what an image processor does.

    Args:
        processor: of `transformers`.
        where: names it in errors.

    Raises:
        CheckpointError: it does what `exports.images` does not.
    """
    resample = int(processor.resample) if processor.resample is not None else None
    if resample not in _INTERPOLATIONS:
        raise CheckpointError(
            f"{where}: resample = {resample}; 2 (bilinear) and 3 (bicubic) are supported"
        )
    height, width, resize = _size(processor, where)
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (0.0,) * 3, (1.0,) * 3
    if processor.do_normalize:
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return Pixels(
        ImageSpec.model_validate(
            {
                "height": height,
                "width": width,
                "resize": resize,
                "interpolation": _INTERPOLATIONS[resample],
            }
        ),
        tuple(value / scale for value in mean),
        tuple(value / scale for value in std),
    )


def _size(processor: Any, where: str) -> tuple[int, int, str]:
    """Returns height, width, and how they are come to."""
    size: Any = processor.size
    crop: Any = getattr(processor, "crop_size", None)
    crops = bool(getattr(processor, "do_center_crop", False))
    if processor.do_resize:  # after which padding, where it is asked for, finds nothing to do
        if size.height and size.width and not crops:
            return size.height, size.width, "squash"
        if size.shortest_edge and crops and crop.height == crop.width == size.shortest_edge:
            return crop.height, crop.width, "shortest_edge"
    raise CheckpointError(
        f"{where}: do_resize {processor.do_resize} to {_words(size)}, do_center_crop {crops} to "
        f"{_words(crop)}; supported are a resize to height and width, and one of "
        "the shortest edge with a square crop of that size"
    )


def _words(size: Any) -> str:
    if not size:
        return "nothing"
    return " ".join(f"{key} {value}" for key, value in dict(size).items() if value)
