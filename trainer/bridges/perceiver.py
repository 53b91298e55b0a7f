"""Flamingo's resampler: a few learned latents read the image, gated layers read the latents.

Alayrac et al., 2022, "Flamingo: a Visual Language Model for Few-Shot Learning",
https://arxiv.org/abs/2204.14198, figure 5: each layer's keys are the image tokens and the latents,
its queries the latents.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.attention import split_heads
from trainer.bridges._transformer import Positioned, positions
from trainer.config import Config as BaseConfig
from trainer.reading import Reading


class Config(BaseConfig):
    """Keys of `[bridge] name = "perceiver"`."""

    latents: int = Field(default=64, ge=1)
    layers: int = Field(default=6, ge=1)
    heads: int = 8
    every: int = Field(default=1, ge=1)
    """A gated layer stands before every so many of the decoder's."""
    shots: int = Field(default=0, ge=0)
    """How many examples, an image and a caption each, the decoder has room for before the text."""
    shot_tokens: int = Field(default=24, ge=3)
    """Positions of each; longer captions of examples are cut."""

    def reading(self) -> Reading:
        """Returns what becomes of the latents in the decoder."""
        room = self.shots * self.shot_tokens
        return Reading("gated", every=self.every, room=room, shot_tokens=self.shot_tokens)


class Bridge(Positioned):
    """See the module.

    Args:
        config: the recipe's table.
        encoder_width: D of the encoder.
        decoder_width: D of the decoder.
        tokens: N, fixed by the image size and the encoder.
    """

    def __init__(
        self, config: Config, *, encoder_width: int, decoder_width: int, tokens: int
    ) -> None:
        super().__init__()
        self.project = nn.Linear(encoder_width, decoder_width)
        self.position = positions(tokens, decoder_width)
        self.latents = nn.Parameter(torch.randn(1, config.latents, decoder_width) * 0.02)
        self.layers = nn.ModuleList(
            _Layer(decoder_width, config.heads) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(decoder_width)

    def forward(self, image_tokens: Tensor) -> Tensor:
        """Returns latents (B, K, D_decoder) from image_tokens (B, N, D_encoder)."""
        tokens = self.project(image_tokens) + self.position
        latents = self.latents.expand(tokens.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(tokens, latents)
        normed: Tensor = self.norm(latents)
        return normed


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.token_norm, self.latent_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )
        # Products of deviation 2.6 at first, not 0.3: the mean of all tokens, which is what latents
        # would read, hardly differs between images, and gates that have nothing to tell stay shut.
        with torch.no_grad():
            self.query.weight.mul_(4)
            self.key_value.weight[:width].mul_(2)

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        normed = self.latent_norm(latents)
        read = torch.cat([self.token_norm(tokens), normed], dim=1)
        query, key, value = (
            split_heads(part, self.head_dim)
            for part in (self.query(normed), *self.key_value(read).chunk(2, dim=-1))
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        latents = latents + self.out(mixed.transpose(1, 2).flatten(2))
        return latents + self.mlp(latents)
