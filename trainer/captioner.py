"""Captioner = encoder + bridge + decoder, built from three tables of a recipe."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exports.images import ImageSpec
from exports.text import TextSpec
from trainer import variants
from trainer.attention import GrowingCache, Memory
from trainer.errors import ConfigError
from trainer.few_shot import ShotIndex
from trainer.matching import Matcher, MatcherConfig

IMAGE_EMBEDDING = "image_embedding"


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
            decoder_width=self.decoder.image_width,
            tokens=probe.shape[1],
        )
        self.examples: ShotIndex | None = None
        self.matcher: Matcher | None = None
        if matcher is not None:
            self.matcher = Matcher(matcher, encoder_width=self.encoder.width, decoder=self.decoder)

    def encode(self, images: Tensor) -> Tensor:
        """Returns the bridge's tokens (B, N, D) for images as `memory` takes them."""
        tokens: Tensor = self.bridge(self.encoder(images)[0])
        return tokens

    def memory(self, images: Tensor) -> Memory:
        """Returns what text attends to of images (B, 3, H, W), uint8 or float in 0..255."""
        return self.memory_and_pooled(images)[0]

    def encoded(self, images: Tensor) -> dict[str, Tensor]:
        """Returns all that is kept of images, by the names that graphs give it.

        That is the memory, each (B, ...), and with a matcher `image_embedding` (B, E).
        """
        memory, pooled = self.memory_and_pooled(images)
        named = memory.named()
        if self.matcher is not None:
            named[IMAGE_EMBEDDING] = self.matcher.embed_images(pooled)
        return named

    def match(
        self, token_ids: Tensor, lengths: Tensor, image: Tensor, encoded: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Returns how well captions fit: probabilities of a match (C,), and cosines (C,).

        Only for captioners with a matcher.

        Args:
            token_ids: (C, T), `<bos>` ... `<eos>` and padding.
            lengths: (C,), tokens without padding.
            image: (C,), which of the B images each caption belongs to, in any order.
            encoded: of the images, from `encoded`.
        """
        assert self.matcher is not None
        own = {name: value.index_select(0, image) for name, value in encoded.items()}
        memory = Memory.of(own)
        logits = self.matcher.match_logits(self.decoder, token_ids, lengths, memory)
        captions = self.matcher.embed_captions(self.decoder, token_ids, lengths)
        similarity = (captions * own[IMAGE_EMBEDDING]).sum(1)
        return logits.softmax(1)[:, 1], similarity

    def memory_and_pooled(self, images: Tensor) -> tuple[Memory, Tensor]:
        """Returns `memory(images)` and the encoder's pooled (B, D), from one pass of it."""
        image_tokens, pooled = self.encoder(images)
        memory: Memory = self.decoder.memory(self.bridge(image_tokens))
        if self.examples is not None:
            memory = self.examples.prompted(memory, pooled, self.decoder)
        return memory, pooled

    @torch.no_grad()
    def show_examples(
        self, images: NDArray[np.uint8], captions: list[list[int]], *, shots: int
    ) -> None:
        """From now on, text stands behind the captions of labelled images that resemble its image.

        Args:
            images: (n, H, W, 3).
            captions: of each one, as ids `<bos>` ... `<eos>`.
            shots: how many stand before a text.

        Raises:
            ConfigError: there are fewer images, or the decoder has no room for so many.
        """
        reading = self.decoder.reading
        if not 1 <= shots <= min(reading.shots, len(images)):
            raise ConfigError(
                f"{shots} examples before a text: the model has room for {reading.shots} "
                f"([bridge] shots), and there are {len(images)} labelled images"
            )
        device = next(self.parameters()).device
        pooled, latents = [], []
        for start in range(0, len(images), 64):
            pixels = torch.from_numpy(images[start : start + 64]).permute(0, 3, 1, 2)
            image_tokens, features = self.encoder(pixels.to(device))
            pooled.append(features)
            latents.append(self.bridge(image_tokens))
        self.examples = ShotIndex(
            torch.cat(pooled),
            torch.cat(latents),
            captions,
            shots=shots,
            shot_tokens=reading.shot_tokens,
            pad_id=self.text.pad_id,
        )
        self.decoder.placed = self.examples.positions

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
