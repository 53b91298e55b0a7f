"""GPT-2 with cross-attention: pre-norm, learned positions, tied output head.

Radford et al., 2019, "Language Models are Unsupervised Multitask Learners",
https://openai.com/research/better-language-models; cross-attention as in `transformers`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

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

    def step(
        self, token_ids: Tensor, position: Tensor, past: Sequence[Tensor], memory: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the next token's logits (R, V) and the grown cache.

        Args:
            token_ids: (R,), the newest token of every row.
            position: (), how many tokens stand before it.
            past: `[k0, v0, ...]`, each (R, H, T, D / H), T = position.
            memory: what `memory_cache` gave, each (B, H, N, D / H); the R / B rows of an image
                stand together.
        """
        transformer = self.model.transformer
        hidden = transformer.wte(token_ids) + transformer.wpe(position.view(1))  # (R, D)
        present: list[Tensor] = []
        for layer, block in enumerate(transformer.h):
            projected = _dense(block.attn.c_attn, block.ln_1(hidden))
            query, key, value = projected.split(self.width, dim=-1)
            keys = torch.cat([past[2 * layer], self._row_heads(key)], dim=2)
            values = torch.cat([past[2 * layer + 1], self._row_heads(value)], dim=2)
            present += [keys, values]
            mixed = _attend(self._row_heads(query), keys, values)
            hidden = hidden + _dense(block.attn.c_proj, mixed.reshape(-1, self.width))

            # The rows of one image are queries against one copy of its keys and values.
            query = _dense(block.crossattention.q_attn, block.ln_cross_attn(hidden))
            image_keys, image_values = memory[2 * layer], memory[2 * layer + 1]
            query = query.reshape(image_keys.shape[0], -1, self.heads, self.head_dim).transpose(
                1, 2
            )
            mixed = _attend(query, image_keys, image_values)
            mixed = mixed.transpose(1, 2).reshape(-1, self.width)
            hidden = hidden + _dense(block.crossattention.c_proj, mixed)

            inner = block.mlp.act(_dense(block.mlp.c_fc, block.ln_2(hidden)))
            hidden = hidden + _dense(block.mlp.c_proj, inner)
        return self.model.lm_head(transformer.ln_f(hidden)), present

    def _row_heads(self, values: Tensor) -> Tensor:  # (R, D) -> (R, H, 1, D / H)
        return values.view(-1, self.heads, 1, self.head_dim)

    def _split_heads(self, values: Tensor) -> Tensor:  # (B, N, D) -> (B, H, N, D / H)
        return values.view(*values.shape[:2], self.heads, self.head_dim).transpose(1, 2)


# Both are written out so that the exported step is lean: the layer of `transformers` would flatten
# and unflatten its input, and PyTorch's attention would copy the keys, transposed, at every step.


def _dense(layer: Any, values: Tensor) -> Tensor:
    """Returns (R, D_out) for values (R, D), by a layer of `transformers` that keeps (D, D_out)."""
    return torch.addmm(layer.bias, values, layer.weight)


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Returns (..., Q, D) for query (..., Q, D) over keys and values (..., T, D)."""
    weights = (query * query.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    return weights.softmax(-1) @ values
