"""MAE: an encoder sees a quarter of an image's patches, a small decoder guesses the others' pixels.

He et al., 2021, "Masked Autoencoders Are Scalable Vision Learners",
https://arxiv.org/abs/2111.06377:

    visible = encoder(patches[ids_keep])
    prediction = decoder(visible and mask tokens, with the positions of their places)
    loss = mean over masked patches of |prediction - (patch - mean) / sqrt(var + 1e-6)|^2 / pixels,

with mean and (unbiased) variance of each patch's own pixels.

Departures:

1. The encoder's position embedding is the backbone's, which timm learns; the decoder's is the
   paper's fixed one.
2. The decoder is 4 blocks of width 256 by default, for encoders smaller than the paper's ViT-L
   (8 blocks of 512).
"""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.encoders.timm_vit import transformer_blocks
from trainer.errors import ConfigError
from trainer.methods._masked import (
    check_patches,
    greyed,
    patchify,
    pixel_mask,
    to_pixels,
    unpatchify,
)
from trainer.methods._method import Method as BaseMethod
from trainer.methods._method import MethodConfig, Setting

_EPSILON = 1e-6


class Config(MethodConfig):
    """Keys of `[method] name = "mae"`."""

    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of the patches that the encoder does not see."""
    norm_pix: bool = True
    """Whether a patch's pixels are predicted relative to its own mean and deviation."""
    decoder_width: int = Field(default=256, ge=4, multiple_of=4)
    decoder_layers: int = Field(default=4, ge=1)
    decoder_heads: int = Field(default=8, ge=1)


class Method(BaseMethod):
    """See the module."""

    remedies = "another optim.lr, a lower method.mask_ratio, or larger patches"

    def __init__(self, config: Config, encoder: Any, setting: Setting) -> None:
        super().__init__(config, encoder, setting)
        check_patches(encoder, "mae")
        encoder.check_can_drop_patches()
        self._norm_pix = config.norm_pix
        self._grid, self._patch = encoder.grid, encoder.patch
        self._patches = encoder.grid[0] * encoder.grid[1]
        self._visible = _visible_patches(self._patches, config.mask_ratio)
        self.decoder = Decoder(config, encoder)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the loss; at chance every pixel is guessed to be 0, its patch's mean."""
        images = batch["images"]
        noise = torch.rand(len(images), self._patches, device=images.device)
        ids_keep, ids_hide = shuffled(noise, self._visible)
        target, _, _ = self._target(images, ids_hide)
        loss = F.mse_loss(self._predict(images, ids_keep, ids_hide), target)
        zero = target.square().mean()
        return {"loss": loss, "of_chance": loss.detach() / zero.clamp(min=_EPSILON)}

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """Returns the visible patches, with the prediction in place of the others, and the image.

        The mask is the same at every call. With `norm_pix` a predicted patch is shown with the true
        patch's mean and deviation, which are not predicted.
        """
        noise = torch.rand(
            len(images), self._patches, generator=torch.Generator().manual_seed(0)
        ).to(images.device)
        ids_keep, ids_hide = shuffled(noise, self._visible)
        _, mean, deviation = self._target(images, ids_hide)
        predicted = self._predict(images, ids_keep, ids_hide) * deviation + mean
        pixels = self.encoder.denormalise(
            unpatchify(predicted, (ids_hide.shape[1], 1), self._patch)
        )
        patches = patchify(images, self._patch)
        places = ids_hide[:, :, None].expand(-1, -1, patches.shape[2])
        patches = patches.scatter(1, places, patchify(to_pixels(pixels), self._patch))
        reconstruction = unpatchify(patches, self._grid, self._patch)
        mask = torch.zeros_like(noise, dtype=torch.bool).scatter_(1, ids_hide, True)
        hidden = pixel_mask(mask, self._grid, self._patch)
        return torch.stack([greyed(images, hidden), reconstruction, images], dim=1)

    def _predict(self, images: Tensor, ids_keep: Tensor, ids_hide: Tensor) -> Tensor:
        tokens = self.encoder.visible_tokens(images, ids_keep)
        prediction: Tensor = self.decoder(tokens, ids_keep, ids_hide)
        return prediction.float()

    def _target(
        self, images: Tensor, ids_hide: Tensor
    ) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Returns what is predicted (B, M, P), and the mean and deviation taken out of it."""
        hidden = self.encoder.cut_out(images, ids_hide)
        patches = patchify(self.encoder.normalise(hidden), self._patch)
        return standardised(patches) if self._norm_pix else (patches, 0.0, 1.0)


class Decoder(nn.Module):
    """Visible tokens in their shuffled order to the pixels of all patches.

    Args:
        config: the method's.
        encoder: whose tokens are decoded.
    """

    position: Tensor

    def __init__(self, config: Config, encoder: Any) -> None:
        super().__init__()
        width, heads = config.decoder_width, config.decoder_heads
        if width % heads:
            raise ConfigError(
                f"method.decoder_heads = {heads} does not divide method.decoder_width = {width}"
            )
        self._prefix = encoder.prefix_tokens
        self.embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.register_buffer("position", sin_cos_positions(encoder.grid, width), persistent=False)
        self.blocks = transformer_blocks(config.decoder_layers, width, heads)
        self.norm = nn.LayerNorm(width, eps=_EPSILON)
        self.to_pixels = nn.Linear(width, encoder.patch[0] * encoder.patch[1] * 3)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, ids_keep: Tensor, ids_hide: Tensor) -> Tensor:
        """Returns the hidden patches (B, M, P), P the pixels of a patch times 3.

        Tokens stay in their shuffled order, as attention does not know it; positions go with them.

        Args:
            tokens: (B, prefix + V, D), prefix tokens and V visible patches.
            ids_keep: (B, V), which patches these are.
            ids_hide: (B, M), which ones are guessed.
        """
        embedded = self.embed(tokens)
        prefix, visible = embedded.tensor_split([self._prefix], dim=1)
        visible = visible + self.position[ids_keep]
        guessed = self.mask_token + self.position[ids_hide]
        decoded = self.blocks(torch.cat([prefix, visible, guessed.to(visible.dtype)], dim=1))
        pixels: Tensor = self.to_pixels(self.norm(decoded[:, -ids_hide.shape[1] :]))
        return pixels


def shuffled(noise: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """Returns which patches of each image are seen and which are not, both in a random order.

    Args:
        noise: (B, N); a patch stands where its noise stands among the sorted.
        visible: V.

    Returns:
        ids_keep (B, V) and ids_hide (B, N - V).
    """
    ids_keep, ids_hide = noise.argsort(1).tensor_split([visible], dim=1)
    return ids_keep, ids_hide


def standardised(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns patches (B, M, P) less their own mean over their deviation, and these (B, M, 1)."""
    pixels = patches.shape[2]
    share = (pixels - 1) / pixels  # of the paper's variance in the one that a layer norm takes
    normed, mean, rate = torch.native_layer_norm(patches, [pixels], None, None, share * _EPSILON)
    return normed * math.sqrt(share), mean, 1 / (rate * math.sqrt(share))


def sin_cos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Returns (N, D): sines and cosines of a patch's column, then of its row.

    Vaswani et al., 2017, https://arxiv.org/abs/1706.03762, section 3.5, once for each axis.

    Args:
        grid: rows and columns.
        width: D, a multiple of 4.
    """
    rows, columns = grid
    quarter = width // 4
    rates = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    column = torch.arange(columns).repeat(rows)[:, None] * rates
    row = torch.arange(rows).repeat_interleave(columns)[:, None] * rates
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()


def _visible_patches(patches: int, mask_ratio: float) -> int:
    """Returns how many patches the encoder sees.

    Raises:
        ConfigError: none or all.
    """
    visible = round(patches * (1 - mask_ratio))
    if not 0 < visible < patches:
        raise ConfigError(
            f"method.mask_ratio = {mask_ratio} of {patches} patches leaves {visible} visible and "
            f"{patches - visible} masked; both need at least 1: change it, or take smaller patches"
        )
    return visible
