"""T5's decoder, layers of version 1.1: RMSNorm, relative position biases, gated GELU.

Raffel et al., 2019, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", https://arxiv.org/abs/1910.10683; gated: Shazeer, 2020,
https://arxiv.org/abs/2002.05202.
"""

from math import log
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from exports.text import TextSpec
from trainer.attention import Attention, Relative, split_heads
from trainer.decoders._decoder import Decoder as Base
from trainer.decoders._decoder import DecoderConfig
from trainer.decoders._pretrained import check_sizes, configured, load
from trainer.reading import Reading


class Config(DecoderConfig):
    """Keys of `[decoder] name = "t5"`."""


class Decoder(Base):
    """See the module."""

    kinds = ("cross_attention",)
    asks_for_distances = True

    def __init__(self, config: Config, *, text: TextSpec, reading: Reading) -> None:
        sizes = configured(
            T5Config,
            config,
            scratch={
                "vocab_size": text.vocab_size,
                "d_model": config.width,
                "d_kv": config.width // config.heads,
                "d_ff": 8 * config.width // 3,
                "num_layers": 0,
                "num_decoder_layers": config.layers,
                "num_heads": config.heads,
                "feed_forward_proj": "gated-gelu",
            },
            always={
                "dropout_rate": config.dropout,
                "decoder_start_token_id": text.bos_id,
                "eos_token_id": text.eos_id,
                "pad_token_id": text.pad_id,
            },
        )
        check_sizes(config, text, sizes.vocab_size, config.max_length)
        super().__init__(
            config,
            reading,
            width=sizes.d_model,
            layers=sizes.num_decoder_layers,
            heads=sizes.num_heads,
            head_dim=sizes.d_kv,
        )
        self.model: Any
        if config.weights:
            self.model = load(
                T5ForConditionalGeneration, config.weights, sizes, new=(), ignored=("encoder.",)
            )
        else:
            self.model = T5ForConditionalGeneration(sizes)
        del self.model.encoder  # the bridge stands in its place
        if not sizes.scale_decoder_outputs:  # version 1.1 has a head of its own
            head = self.model.lm_head
            head.weight = nn.Parameter(head.weight.detach().clone())
        self.buckets = buckets(
            config.max_length,
            self.model.config.relative_attention_num_buckets,
            self.model.config.relative_attention_max_distance,
        )

    def embed(self, token_ids: Tensor, position: Tensor) -> Tensor:
        """See `Base`."""
        del position  # tokens know how far they are apart, not where they are
        embedded: Tensor = self.model.decoder.dropout(self.model.shared(token_ids))
        return embedded

    def blocks(self, hidden: Tensor, position: Tensor, attention: Attention) -> Tensor:
        """See `Base`."""
        del position
        relative = self._relative()
        for layer, block in enumerate(self.model.decoder.block):
            self_attention, cross, feed_forward = block.layer
            own, normed = self_attention.SelfAttention, self_attention.layer_norm(hidden)
            projected = (project(normed) for project in (own.q, own.k, own.v))
            mixed = attention.text(layer, *projected, scale=1.0, relative=relative)
            hidden = hidden + self_attention.dropout(own.o(mixed))
            query = cross.EncDecAttention.q(cross.layer_norm(hidden))
            seen = cross.EncDecAttention.o(attention.image(layer, query, scale=1.0))
            hidden = hidden + cross.dropout(seen)
            hidden = feed_forward(hidden)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """See `Base`."""
        inner = self.model.decoder
        hidden = inner.dropout(inner.final_layer_norm(hidden))
        if self.model.config.scale_decoder_outputs:  # the head is the embedding, as in version 1.0
            hidden = hidden * self.width**-0.5
        logits: Tensor = self.model.lm_head(hidden)
        return logits

    def image_pairs(self, tokens: Tensor) -> list[Tensor]:
        """See `Base`."""
        return [
            split_heads(project(tokens), self.head_dim)
            for block in self.model.decoder.block
            for project in (block.layer[1].EncDecAttention.k, block.layer[1].EncDecAttention.v)
        ]

    def _relative(self) -> Relative:
        """Returns the biases (..., H) of distances, which all layers share."""
        own = self.model.decoder.block[0].layer[0].SelfAttention
        by_distance = own.relative_attention_bias.weight[self.buckets.to(own.q.weight.device)]

        def relative(distance: Tensor) -> Tensor:
            far = (-distance).clamp(0, len(self.buckets) - 1)  # what follows is hidden anyway
            return by_distance[far]

        return relative


def buckets(longest: int, count: int, far: int) -> Tensor:
    """Returns the bucket of each distance 0 .. longest - 1 into the past.

    Half of the buckets are for one distance each, the others grow with its logarithm up to `far`.
    """
    distance = torch.arange(longest)
    exact = count // 2
    scaled = (distance.float() / exact).clamp(min=1).log() / log(far / exact) * (count - exact)
    return torch.where(distance < exact, distance, (exact + scaled.long()).clamp(max=count - 1))
