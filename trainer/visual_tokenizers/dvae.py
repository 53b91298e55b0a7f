"""dVAE: an autoencoder through one of V codes at each patch.

Ramesh et al., 2021, "Zero-Shot Text-to-Image Generation", https://arxiv.org/abs/2102.12092,
section 2.1; BEiT (Bao et al., 2021, https://arxiv.org/abs/2106.08254) takes its ids as targets:

    q(code | patch) = softmax(encoder(image)),  y ~ Gumbel-softmax(q, temperature),
    loss = |decoder(y codebook) - image|^2 + kl_weight KL(q || uniform),

with the temperature of the relaxation (Jang et al., 2016, https://arxiv.org/abs/1611.01144) falling
exponentially from 1 to 1/16 over the training. An id is the most likely code.

Departures:

1. A third term, usage_weight KL(mean of q over a batch || uniform), and logits that begin 8 times
   as far apart. Without them a training of some hundred steps ends with two or three codes in use.
2. Pixels from -1 to 1 under squared error in place of the logit-Laplace likelihood; the weight of
   the KL term is small and constant, where the paper's rises to 6.6 for a sum over pixels.
3. Patches are cut out by one convolution and put back by another; all layers between them work on
   the grid, so that any size of patch fits.
"""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.visual_tokenizers._tokenizer import (
    TokenizerConfig,
    VisualTokenizer,
    map_decoder,
    patch_encoder,
    perplexity,
    scaled,
    unscaled,
)

_SPREAD = 8.0  # of the logits; see the first departure


class Config(TokenizerConfig):
    """Keys of `[method.tokenizer] name = "dvae"`."""

    temperature: float = Field(default=1.0, gt=0)
    """Of the relaxation, at the start."""
    final_temperature: float = Field(default=0.0625, gt=0)
    """At the end."""
    kl_weight: float = Field(default=1e-3, ge=0)
    """Of each patch's own codes against equally likely ones."""
    usage_weight: float = Field(default=0.02, ge=0)
    """Of a batch's codes against equally frequent ones: higher keeps more of them in use."""


class Tokenizer(VisualTokenizer):
    """See the module.

    Args:
        config: the recipe's table.
        image_size: (H, W) in pixels.
        grid: patches down and across.
        steps: over which the temperature falls.
    """

    temperature: Tensor

    def __init__(
        self, config: Config, image_size: tuple[int, int], grid: tuple[int, int], steps: int
    ) -> None:
        super().__init__(config, image_size, grid)
        self._config, self._steps = config, steps
        width, blocks = config.width, config.blocks
        pixels = nn.ConvTranspose2d(width, 3, self.patch, stride=self.patch)
        self.encoder = patch_encoder(self.patch, width, blocks, config.vocab_size)
        self.codebook = nn.Embedding(config.vocab_size, width)
        self.decoder = map_decoder(width, width, blocks, pixels)
        self.register_buffer("temperature", torch.tensor(config.temperature))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the loss, its parts, and how many codes the batch makes use of."""
        images = scaled(batch["images"])
        logits = self._logits(images)
        relaxed = F.gumbel_softmax(logits, float(self.temperature), dim=2)
        error = F.mse_loss(self._decode(relaxed @ self.codebook.weight).float(), images)
        log_q = logits.log_softmax(2)
        log_mean = log_q.flatten(0, 1).logsumexp(0) - math.log(log_q[..., 0].numel())
        kl, usage = from_uniform(log_q).mean(), from_uniform(log_mean)
        config = self._config
        return {
            "loss": error + config.kl_weight * kl + config.usage_weight * usage,
            "psnr": 10 * (4 / error.detach()).log10(),
            "kl": kl.detach(),
            "usage": usage.detach(),
            "perplexity": perplexity(logits.argmax(2), self.vocab_size),
            "temperature": self.temperature.clone(),
        }

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Lowers the temperature."""
        config = self._config
        share = min(1.0, step / self._steps)
        ratio = config.final_temperature / config.temperature
        self.temperature.fill_(config.temperature * ratio**share)

    @torch.no_grad()
    def token_ids(self, images: Tensor) -> Tensor:
        """Returns the most likely codes (B, N)."""
        return self._logits(scaled(images)).argmax(2)

    @torch.no_grad()
    def decode(self, token_ids: Tensor) -> Tensor:
        """Returns the decoder's pixels for ids (B, N), uint8 (B, 3, H, W)."""
        return unscaled(self._decode(self.codebook(token_ids)).float())

    def reconstruct(self, images: Tensor) -> Tensor:
        """Returns uint8 images (B, 3, H, W) as their ids describe them."""
        return self.decode(self.token_ids(images))

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = _SPREAD * self.encoder(images).float()  # (B, V, h, w)
        return logits.flatten(2).transpose(1, 2)

    def _decode(self, codes: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(codes.transpose(1, 2).unflatten(2, self.grid))
        return pixels


def from_uniform(log_shares: Tensor) -> Tensor:
    """Returns KL(shares || uniform) of distributions, log_shares (..., V), as (...)."""
    return math.log(log_shares.shape[-1]) + (log_shares.exp() * log_shares).sum(-1)
