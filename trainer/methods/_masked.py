"""What the methods that hide patches share: the encoder's grid, and pixels as patches.

N patches of p x q pixels, row by row from the top left.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.errors import ConfigError

_GREY = 127


def check_patches(encoder: Any, method: str) -> None:
    """Refuses encoders that do not cut an image into whole patches.

    Raises:
        ConfigError: no vision transformer, or patches that do not fill the image.
    """
    if not hasattr(encoder, "visible_tokens"):
        raise ConfigError(
            f'{method} hides patches, and this encoder has none; take [encoder] name = "timm_vit"'
        )
    filled = tuple(n * side for n, side in zip(encoder.grid, encoder.patch, strict=True))
    if filled != tuple(encoder.image_size):
        raise ConfigError(
            f"patches of {encoder.patch} pixels fill {filled} of an image of "
            f"{tuple(encoder.image_size)}; take [image] height and width that they divide"
        )


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Returns images (B, C, H, W) as patches (B, N, p * q * C), the channels innermost."""
    batch, channels, height, width = images.shape
    p, q = patch
    cut = images.reshape(batch, channels, height // p, p, width // q, q)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * q * channels)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Returns patches (B, N, p * q * C) as images (B, C, H, W); undoes `patchify`."""
    (rows, columns), (p, q) = grid, patch
    cut = patches.reshape(len(patches), rows, columns, p, q, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * p, columns * q)


def pixel_mask(mask: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Returns (B, 1, H, W), true where a pixel's patch is in `mask` (B, N)."""
    whole = mask.view(-1, 1, *grid)
    return whole.repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)


def greyed(images: Tensor, hidden: Tensor) -> Tensor:
    """Returns images (B, 3, H, W), uint8, grey where `hidden` (B, 1, H, W) is true."""
    return torch.where(hidden, torch.full_like(images, _GREY), images)


def to_pixels(values: Tensor) -> Tensor:
    """Returns values in 0..255 as uint8, rounded, those outside cut off."""
    return values.round().clamp(0, 255).to(torch.uint8)
