"""LLaMA: RMSNorm, rotary positions, SwiGLU, keys that heads share, no biases.

Touvron et al., 2023, https://arxiv.org/abs/2302.13971; rotary positions: Su et al., 2021,
https://arxiv.org/abs/2104.09864; shared keys: Ainslie et al., 2023,
https://arxiv.org/abs/2305.13245. It has no cross-attention of its own: that of the bridge
`cross_attention` is gated, before every layer.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from exports.text import TextSpec
from trainer.attention import Attention
from trainer.decoders._decoder import Decoder as Base
from trainer.decoders._decoder import DecoderConfig
from trainer.decoders._pretrained import check_sizes, configured, load
from trainer.reading import Reading


class Config(DecoderConfig):
    """Keys of `[decoder] name = "llama"`."""

    key_value_heads: int = 2
    """Heads of keys and values, each shared by `heads / key_value_heads` of the queries."""


class Decoder(Base):
    """See the module."""

    kinds = ("cross_attention", "gated", "prefix")

    def __init__(self, config: Config, *, text: TextSpec, reading: Reading) -> None:
        if reading.kind == "cross_attention":
            reading = Reading("gated")
        positions = config.max_length + reading.room
        sizes = configured(
            LlamaConfig,
            config,
            scratch={
                "vocab_size": text.vocab_size,
                "max_position_embeddings": positions,
                "hidden_size": config.width,
                "intermediate_size": 8 * config.width // 3,
                "num_hidden_layers": config.layers,
                "num_attention_heads": config.heads,
                "num_key_value_heads": config.key_value_heads,
                "tie_word_embeddings": True,
            },
            always={
                "attention_dropout": config.dropout,
                "bos_token_id": text.bos_id,
                "eos_token_id": text.eos_id,
                "pad_token_id": text.pad_id,
            },
        )
        room = sizes.max_position_embeddings - reading.room
        check_sizes(config, text, sizes.vocab_size, room)
        super().__init__(
            config,
            reading,
            width=sizes.hidden_size,
            layers=sizes.num_hidden_layers,
            heads=sizes.num_key_value_heads,
            head_dim=sizes.head_dim,
            query_heads=sizes.num_attention_heads,
        )
        self.model: Any
        if config.weights:
            self.model = load(LlamaForCausalLM, config.weights, sizes, new=())
        else:
            self.model = LlamaForCausalLM(sizes)
        self.drop = torch.nn.Dropout(config.dropout)
        rotary = self.model.model.rotary_emb
        angle = torch.arange(positions)[:, None] * rotary.inv_freq
        angle = torch.cat([angle, angle], dim=1)  # (positions, D / H)
        self.register_buffer("cosine", angle.cos() * rotary.attention_scaling, persistent=False)
        self.register_buffer("sine", angle.sin() * rotary.attention_scaling, persistent=False)

    def embed(self, token_ids: Tensor, position: Tensor) -> Tensor:
        """See `Base`."""
        return self.place(self.model.model.embed_tokens(token_ids), position)

    def place(self, tokens: Tensor, position: Tensor) -> Tensor:
        """See `Base`. Positions come in by rotation."""
        del position
        placed: Tensor = self.drop(tokens)
        return placed

    def blocks(self, hidden: Tensor, position: Tensor, attention: Attention) -> Tensor:
        """See `Base`."""
        turn = self.get_buffer("cosine")[position], self.get_buffer("sine")[position]
        for layer, block in enumerate(self.model.model.layers):
            hidden = self.look(layer, hidden, attention)
            own, normed = block.self_attn, block.input_layernorm(hidden)
            query, key = (self._turned(p(normed), *turn) for p in (own.q_proj, own.k_proj))
            mixed = attention.text(layer, query, key, own.v_proj(normed))
            hidden = hidden + self.drop(own.o_proj(mixed))
            hidden = hidden + self.drop(block.mlp(block.post_attention_layernorm(hidden)))
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """See `Base`."""
        logits: Tensor = self.model.lm_head(self.model.model.norm(hidden))
        return logits

    def _turned(self, values: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Returns values (..., D), each head rotated by its position's angles (..., D / H)."""
        heads = values.unflatten(-1, (-1, self.head_dim))
        first, second = heads.chunk(2, dim=-1)
        swapped = torch.cat([-second, first], dim=-1)
        turned = heads * cosine.unsqueeze(-2) + swapped * sine.unsqueeze(-2)
        return turned.flatten(-2)
