"""Captioner = encoder + bridge + decoder, built from three tables of a recipe."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from exports.images import ImageSpec
from exports.text import TextSpec
from trainer import variants
from trainer.attention import GrowingCache, Memory
from trainer.matching import Matcher, MatcherConfig


class Captioner(nn.Module):
    """Images and token ids in, next-token logits out.

    Args:
        encoder: `[encoder]` table of a recipe.
        bridge: `[bridge]` table.
        decoder: `[decoder]` table.
        image: what images look like; its size is the encoder's input.
        text: vocabulary and special ids.
        matcher: `[matcher]` table, for captioners that also tell whether a caption fits an image.
    """

    def __init__(
        self,
        *,
        encoder: dict[str, Any],
        bridge: dict[str, Any],
        decoder: dict[str, Any],
        image: ImageSpec,
        text: TextSpec,
        matcher: MatcherConfig | None = None,
    ) -> None:
        super().__init__()
        self.image, self.text = image, text
        module, config = variants.parse("encoders", encoder)
        self.encoder = module.Encoder(config, (image.height, image.width))
        bridges, bridge_config = variants.parse("bridges", bridge)
        module, config = variants.parse("decoders", decoder)
        reading = getattr(bridge_config, "reading")()  # noqa: B009  every bridge's Config has it
        self.decoder = module.Decoder(config, text=text, reading=reading)
        with torch.no_grad():
            probe = self.encoder.eval()(torch.zeros(1, 3, image.height, image.width))[0]
        self.bridge = bridges.Bridge(
            bridge_config,
            encoder_width=self.encoder.width,
            decoder_width=self.decoder.width,
            tokens=probe.shape[1],
        )
        self.matcher: Matcher | None = None
        if matcher is not None:
            self.matcher = Matcher(matcher, encoder_width=self.encoder.width, decoder=self.decoder)

    def encode(self, images: Tensor) -> Tensor:
        """Returns the bridge's tokens (B, N, D) for images as `memory` takes them."""
        tokens: Tensor = self.bridge(self.encoder(images)[0])
        return tokens

    def memory(self, images: Tensor) -> Memory:
        """Returns what text attends to of images (B, 3, H, W), uint8 or float in 0..255."""
        memory: Memory = self.decoder.memory(self.encode(images))
        return memory

    def memory_and_pooled(self, images: Tensor) -> tuple[Memory, Tensor]:
        """Returns `memory(images)` and the encoder's pooled (B, D), from one pass of it."""
        image_tokens, pooled = self.encoder(images)
        return self.decoder.memory(self.bridge(image_tokens)), pooled

    def forward(self, images: Tensor, token_ids: Tensor) -> Tensor:
        """Returns logits (B * C, T, V).

        Args:
            images: (B, 3, H, W).
            token_ids: (B * C, T), the C captions of one image together: each image is encoded once.
        """
        logits: Tensor = self.decoder(token_ids, self.memory(images))
        return logits

    def empty_cache(self, rows: int) -> list[Tensor]:
        """Returns the self-attention cache before the first token: (R, H, 0, D / H) each."""
        decoder = self.decoder
        shape = (rows, decoder.heads, 0, decoder.head_dim)
        return [torch.zeros(shape) for _ in range(2 * decoder.layers)]

    def step(
        self, token_ids: Tensor, position: int, past: Sequence[Tensor], memory: Memory
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the next token's logits (R, V) and the grown cache.

        Args:
            token_ids: (R,), the newest token of every row.
            position: how many tokens stand before it.
            past: `[k0, v0, ...]`, each (R, H, T, D / H), T = position.
            memory: of the B images; the R / B rows of an image stand together.
        """
        cache = GrowingCache(past, memory)
        logits = self.decoder.logits(token_ids, torch.full_like(token_ids, position), cache)
        return logits, cache.present
