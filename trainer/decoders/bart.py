"""BART's decoder: post-norm, learned positions that begin at 2, cross-attention in every layer.

Lewis et al., 2019, "BART: Denoising Sequence-to-Sequence Pre-training", https://arxiv.org/abs/1910.13461.
"""

from typing import Any

from torch import Tensor, nn
from transformers import BartConfig, BartForCausalLM, BartForConditionalGeneration

from exports.text import TextSpec
from trainer.attention import Attention, split_heads
from trainer.decoders._decoder import Decoder as Base
from trainer.decoders._decoder import DecoderConfig
from trainer.decoders._pretrained import check_sizes, configured, load
from trainer.reading import Reading


class Config(DecoderConfig):
    """Keys of `[decoder] name = "bart"`."""


class Decoder(Base):
    """See the module."""

    kinds = ("cross_attention",)

    def __init__(self, config: Config, *, text: TextSpec, reading: Reading) -> None:
        sizes = configured(
            BartConfig,
            config,
            scratch={
                "vocab_size": text.vocab_size,
                "max_position_embeddings": config.max_length,
                "d_model": config.width,
                "decoder_layers": config.layers,
                "decoder_attention_heads": config.heads,
                "decoder_ffn_dim": 4 * config.width,
                # As wide as a narrow model needs to tell images apart early; 0.02 at BART's width.
                "init_std": 0.02 * (768 / config.width) ** 0.5,
            },
            always={
                "dropout": config.dropout,
                "attention_dropout": config.dropout,
                "bos_token_id": text.bos_id,
                "eos_token_id": text.eos_id,
                "pad_token_id": text.pad_id,
                "decoder_start_token_id": text.bos_id,
                "forced_eos_token_id": None,
            },
        )
        check_sizes(config, text, sizes.vocab_size, sizes.max_position_embeddings)
        super().__init__(
            config,
            reading,
            width=sizes.d_model,
            layers=sizes.decoder_layers,
            heads=sizes.decoder_attention_heads,
            head_dim=sizes.d_model // sizes.decoder_attention_heads,
        )
        self.model: Any = BartForCausalLM(sizes)
        if config.weights:
            whole: Any = load(
                BartForConditionalGeneration,
                config.weights,
                # A copy: the class above has made its own a decoder's.
                BartConfig.from_dict(sizes.to_dict() | {"is_encoder_decoder": True}),
                new=(),
                ignored=("model.encoder.", "final_logits_bias"),
            )
            self.model.model.decoder = whole.model.decoder
            self.model.lm_head = whole.lm_head
        self.drop = nn.Dropout(config.dropout)

    def embed(self, token_ids: Tensor, position: Tensor) -> Tensor:
        """See `Base`."""
        inner = self.model.model.decoder
        place = nn.functional.embedding(position + 2, inner.embed_positions.weight)
        embedded: Tensor = self.drop(
            inner.layernorm_embedding(inner.embed_tokens(token_ids) + place)
        )
        return embedded

    def blocks(self, hidden: Tensor, position: Tensor, attention: Attention) -> Tensor:
        """See `Base`."""
        del position  # `embed` has seen to it
        for layer, block in enumerate(self.model.model.decoder.layers):
            own, cross = block.self_attn, block.encoder_attn
            mixed = attention.text(
                layer, *(p(hidden) for p in (own.q_proj, own.k_proj, own.v_proj))
            )
            hidden = block.self_attn_layer_norm(hidden + self.drop(own.out_proj(mixed)))
            seen = cross.out_proj(attention.image(layer, cross.q_proj(hidden)))
            hidden = block.encoder_attn_layer_norm(hidden + self.drop(seen))
            inner = block.fc2(block.activation_fn(block.fc1(hidden)))
            hidden = block.final_layer_norm(hidden + self.drop(inner))
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """See `Base`."""
        logits: Tensor = self.model.lm_head(hidden)
        return logits

    def image_pairs(self, tokens: Tensor) -> list[Tensor]:
        """See `Base`."""
        return [
            split_heads(project(tokens), self.head_dim)
            for block in self.model.model.decoder.layers
            for project in (block.encoder_attn.k_proj, block.encoder_attn.v_proj)
        ]
