"""What every visual tokenizer is given and gives, and the convolutions they are made of."""

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.config import Config as BaseConfig
from trainer.objective import Objective


class TokenizerConfig(BaseConfig):
    """Keys of every visual tokenizer."""

    epochs: int = Field(default=20, ge=1)
    """How long it is trained before the method begins."""
    lr: float = Field(default=1e-3, gt=0)
    vocab_size: int = Field(default=1024, ge=4)
    """How many ids there are; the papers' 8192 are for a million images."""
    width: int = Field(default=128, ge=1)
    """Of its convolutions."""
    blocks: int = Field(default=2, ge=1)
    """Residual blocks of its encoder, and of its decoder."""


class VisualTokenizer(Objective):
    """Base of the tokenizers.

    Args:
        config: the recipe's table.
        image_size: (H, W) in pixels.
        grid: patches down and across; every one of the N gets an id.
    """

    def __init__(
        self, config: TokenizerConfig, image_size: tuple[int, int], grid: tuple[int, int]
    ) -> None:
        super().__init__()
        self.vocab_size, self.grid = config.vocab_size, grid
        self.patch = (image_size[0] // grid[0], image_size[1] // grid[1])

    def token_ids(self, images: Tensor) -> Tensor:
        """Returns the ids (B, N) of images (B, 3, H, W) in 0..255; the same for the same image."""
        raise NotImplementedError

    def decode(self, token_ids: Tensor) -> Tensor:
        """Returns what ids (B, N) look like, uint8 (B, 3, H, W)."""
        raise NotImplementedError


class Residual(nn.Module):
    """A pre-norm residual block on a map (B, D, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        changed: Tensor = features + self.inner(features)
        return changed


def patch_encoder(patch: tuple[int, int], width: int, blocks: int, outputs: int) -> nn.Sequential:
    """Returns a module from scaled pixels (B, 3, H, W) to the patches' map (B, outputs, h, w)."""
    return nn.Sequential(
        nn.Conv2d(3, width, patch, stride=patch),
        *(Residual(width) for _ in range(blocks)),
        nn.GroupNorm(1, width),
        nn.GELU(),
        nn.Conv2d(width, outputs, 1),
    )


def map_decoder(inputs: int, width: int, blocks: int, last: nn.Module) -> nn.Sequential:
    """Returns a module from a map (B, inputs, h, w) to what `last` makes of (B, width, h, w)."""
    return nn.Sequential(
        nn.Conv2d(inputs, width, 1),
        *(Residual(width) for _ in range(blocks)),
        nn.GroupNorm(1, width),
        nn.GELU(),
        last,
    )


def scaled(images: Tensor) -> Tensor:
    """Returns pixels 0..255 as -1..1."""
    return images.float() / 127.5 - 1


def unscaled(values: Tensor) -> Tensor:
    """Returns -1..1 as uint8 pixels; values outside are cut off."""
    return ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def perplexity(token_ids: Tensor, vocab_size: int) -> Tensor:
    """Returns how many ids are in use: the exponential of the entropy of their shares.

    From 1, where all are the same, to V, where all are equally frequent.
    """
    shares = torch.bincount(token_ids.flatten(), minlength=vocab_size) / token_ids.numel()
    return torch.special.entr(shares).sum().exp()
