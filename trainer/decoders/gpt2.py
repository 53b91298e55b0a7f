"""GPT-2: pre-norm, learned positions, tied output head.

Radford et al., 2019, "Language Models are Unsupervised Multitask Learners",
https://openai.com/research/better-language-models; cross-attention as in `transformers`.
"""

from typing import Any

from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from exports.text import TextSpec
from trainer.attention import Attention, split_heads
from trainer.decoders._decoder import Decoder as Base
from trainer.decoders._decoder import DecoderConfig, dense
from trainer.decoders._pretrained import check_sizes, configured, load
from trainer.errors import ConfigError
from trainer.reading import Reading


class Config(DecoderConfig):
    """Keys of `[decoder] name = "gpt2"`."""


class Decoder(Base):
    """See the module."""

    kinds = ("cross_attention", "gated", "prefix")

    def __init__(self, config: Config, *, text: TextSpec, reading: Reading) -> None:
        sizes = configured(
            GPT2Config,
            config,
            scratch={
                "vocab_size": text.vocab_size,
                "n_positions": config.max_length + reading.room,
                "n_embd": config.width,
                "n_layer": config.layers,
                "n_head": config.heads,
            },
            always={
                "resid_pdrop": config.dropout,
                "embd_pdrop": config.dropout,
                "attn_pdrop": config.dropout,
                "add_cross_attention": reading.kind == "cross_attention",
                "bos_token_id": text.bos_id,
                "eos_token_id": text.eos_id,
            },
        )
        if not sizes.scale_attn_weights or sizes.scale_attn_by_inverse_layer_idx:
            raise ConfigError(
                f"{config.weights}: scales attention by layer, which decoder gpt2 does not do"
            )
        check_sizes(config, text, sizes.vocab_size, sizes.n_positions - reading.room)
        super().__init__(
            config,
            reading,
            width=sizes.n_embd,
            layers=sizes.n_layer,
            heads=sizes.n_head,
            head_dim=sizes.n_embd // sizes.n_head,
        )
        self.model: Any
        if config.weights:
            new = ("crossattention", "ln_cross_attn")
            self.model = load(GPT2LMHeadModel, config.weights, sizes, new=new)
        else:
            self.model = GPT2LMHeadModel(sizes)

    def embed(self, token_ids: Tensor, position: Tensor) -> Tensor:
        """See `Base`."""
        return self.place(self.model.transformer.wte(token_ids), position)

    def place(self, tokens: Tensor, position: Tensor) -> Tensor:
        """See `Base`."""
        placed: Tensor = self.model.transformer.drop(tokens + self.model.transformer.wpe(position))
        return placed

    def blocks(self, hidden: Tensor, position: Tensor, attention: Attention) -> Tensor:
        """See `Base`."""
        del position  # `embed` has seen to it
        for layer, block in enumerate(self.model.transformer.h):
            hidden = self.look(layer, hidden, attention)
            projected = dense(block.attn.c_attn, block.ln_1(hidden))
            mixed = attention.text(layer, *projected.split(self.width, dim=-1))
            hidden = hidden + block.attn.resid_dropout(dense(block.attn.c_proj, mixed))
            if self.reading.kind == "cross_attention":
                cross = block.crossattention
                query = dense(cross.q_attn, block.ln_cross_attn(hidden))
                seen = dense(cross.c_proj, attention.image(layer, query))
                hidden = hidden + cross.resid_dropout(seen)
            inner = dense(block.mlp.c_fc, block.ln_2(hidden))
            hidden = hidden + block.mlp.dropout(dense(block.mlp.c_proj, self._activated(inner)))
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """See `Base`."""
        logits: Tensor = self.model.lm_head(self.model.transformer.ln_f(hidden))
        return logits

    def _activated(self, inner: Tensor) -> Tensor:
        if self.model.config.activation_function in ("gelu_new", "gelu_pytorch_tanh"):
            # In the one operator that a graph has for it.
            return nn.functional.gelu(inner, approximate="tanh")
        activated: Tensor = self.model.transformer.h[0].mlp.act(inner)
        return activated

    def image_pairs(self, tokens: Tensor) -> list[Tensor]:
        """See `Base`."""
        return [
            split_heads(part, self.head_dim)
            for block in self.model.transformer.h
            for part in block.crossattention.c_attn(tokens).split(self.width, dim=-1)
        ]
