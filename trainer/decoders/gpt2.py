"""GPT-2 with cross-attention: pre-norm, learned positions, tied output head.

Radford et al., 2019, "Language Models are Unsupervised Multitask Learners",
https://openai.com/research/better-language-models; cross-attention as in `transformers`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from trainer.attention import StepAttention
from trainer.config import Config as BaseConfig


class Config(BaseConfig):
    """Keys of `[decoder] name = "gpt2"`."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    dropout: float = 0.1
    max_length: int = 40
    """Positions: the longest sequence with `<bos>` and `<eos>`."""


class Decoder(nn.Module):
    """`transformers`' GPT-2 for training, and the same weights one step at a time for decoding.

    Args:
        config: the recipe's table.
        vocab_size: V.
        bos_id: the token a caption starts from.
        eos_id: the token that ends it.
    """

    def __init__(self, config: Config, *, vocab_size: int, bos_id: int, eos_id: int) -> None:
        super().__init__()
        self.model: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_positions=config.max_length,
                n_embd=config.width,
                n_layer=config.layers,
                n_head=config.heads,
                resid_pdrop=config.dropout,
                embd_pdrop=config.dropout,
                attn_pdrop=config.dropout,
                add_cross_attention=True,
                bos_token_id=bos_id,
                eos_token_id=eos_id,
            )
        )
        self.width, self.layers, self.heads = config.width, config.layers, config.heads
        self.head_dim = config.width // config.heads
        self.max_length = config.max_length

    def forward(self, token_ids: Tensor, memory: Tensor) -> Tensor:
        """Returns logits (R, T, V) for token_ids (R, T) that attend to memory (R, N, D)."""
        return self.model(input_ids=token_ids, encoder_hidden_states=memory, use_cache=False).logits

    def memory_cache(self, memory: Tensor) -> list[Tensor]:
        """Returns keys and values of the image, `[k0, v0, k1, v1, ...]`, each (B, H, N, D / H)."""
        cache: list[Tensor] = []
        for block in self.model.transformer.h:
            keys_values = block.crossattention.c_attn(memory)
            cache += [self._split_heads(part) for part in keys_values.split(self.width, dim=-1)]
        return cache

    def step(self, token_ids: Tensor, position: Tensor, attention: StepAttention) -> Tensor:
        """Returns the logits (R, V) of what follows the newest tokens.

        Args:
            token_ids: (R,), the newest token of every row.
            position: (R,), how many tokens stand before it.
            attention: the caches.
        """
        transformer = self.model.transformer
        hidden = transformer.wte(token_ids) + transformer.wpe(position)  # (R, D)
        for layer, block in enumerate(transformer.h):
            projected = _dense(block.attn.c_attn, block.ln_1(hidden))
            mixed = attention.text(layer, *projected.split(self.width, dim=-1))
            hidden = hidden + _dense(block.attn.c_proj, mixed)
            query = _dense(block.crossattention.q_attn, block.ln_cross_attn(hidden))
            hidden = hidden + _dense(block.crossattention.c_proj, attention.image(layer, query))
            inner = _dense(block.mlp.c_fc, block.ln_2(hidden))
            # The model's `gelu_new`, in the one operator that a graph has for it.
            inner = nn.functional.gelu(inner, approximate="tanh")
            hidden = hidden + _dense(block.mlp.c_proj, inner)
        return self.model.lm_head(transformer.ln_f(hidden))

    def _split_heads(self, values: Tensor) -> Tensor:  # (B, N, D) -> (B, H, N, D / H)
        return values.view(*values.shape[:2], self.heads, self.head_dim).transpose(1, 2)


def _dense(layer: Any, values: Tensor) -> Tensor:
    """Returns (R, D_out) for values (R, D), by a layer of `transformers` that keeps (D, D_out).

    Written out so that the exported step is lean: the layer would flatten and unflatten its input.
    """
    return torch.addmm(layer.bias, values, layer.weight)
