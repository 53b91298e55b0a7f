"""BERT as a decoder, which can also read: post-norm, learned positions, tied output head.

Devlin et al., 2018, https://arxiv.org/abs/1810.04805; with cross-attention and as a text encoder
besides: Li et al., 2022, "BLIP: Bootstrapping Language-Image Pre-training for Unified
Vision-Language Understanding and Generation", https://arxiv.org/abs/2201.12086, section 3.1: the
encoder shares everything with the decoder but self-attention, which looks both ways.

Departures:

1. The tokens [ENC] and [MASK] are vectors of their own, outside of the vocabulary.
2. Weights begin with a standard deviation of 0.02 * sqrt(768 / width), BERT's own at its own width.
   With 0.02 in a narrow model what attention adds is lost in the residual, and matching never
   leaves the constant answer.
"""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from exports.text import TextSpec
from trainer.attention import Attention, Memory, SequenceAttention, split_heads
from trainer.decoders._decoder import Decoder as Base
from trainer.decoders._decoder import DecoderConfig
from trainer.decoders._pretrained import check_sizes, configured
from trainer.errors import ConfigError
from trainer.reading import Reading


class Config(DecoderConfig):
    """Keys of `[decoder] name = "bert"`."""

    text_encoder: bool = False
    """Whether it can `read` as well: what `mlm`, `itc`, `itm` and `blip` need."""
    plain_head: bool = False
    """Whether logits come of one linear layer, as GIT's do, instead of BERT's head."""


class Decoder(Base):
    """See the module."""

    kinds = ("cross_attention", "gated", "prefix")

    def __init__(self, config: Config, *, text: TextSpec, reading: Reading) -> None:
        if config.weights:
            raise ConfigError(
                f"[decoder] weights = {config.weights!r}: bert begins at random; gpt2, bart, t5 "
                "and llama begin with a checkpoint"
            )
        spread = 0.02 * (768 / config.width) ** 0.5
        sizes = configured(
            BlipTextConfig,
            config,
            scratch={
                "vocab_size": text.vocab_size,
                "hidden_size": config.width,
                "encoder_hidden_size": config.width,
                "intermediate_size": 4 * config.width,
                "num_hidden_layers": config.layers,
                "num_attention_heads": config.heads,
                "max_position_embeddings": config.max_length + reading.room,
                "initializer_range": spread,
            },
            always={
                "hidden_dropout_prob": config.dropout,
                "attention_probs_dropout_prob": config.dropout,
                "bos_token_id": text.bos_id,
                "eos_token_id": text.eos_id,
                "sep_token_id": text.eos_id,
                "pad_token_id": text.pad_id,
                "is_decoder": True,
            },
        )
        room = sizes.max_position_embeddings - reading.room
        check_sizes(config, text, sizes.vocab_size, room)
        super().__init__(
            config,
            reading,
            width=sizes.hidden_size,
            layers=sizes.num_hidden_layers,
            heads=sizes.num_attention_heads,
            head_dim=sizes.hidden_size // sizes.num_attention_heads,
            image_width=sizes.encoder_hidden_size,
        )
        self.model: Any = BlipTextLMHeadModel(sizes)
        if config.plain_head:
            self.model.add_module("cls", nn.Linear(sizes.hidden_size, sizes.vocab_size))
        self._layers: Any = self.model.bert.encoder.layer
        if reading.kind != "cross_attention":
            for block in self._layers:
                del block.crossattention
        self.reading_attention = nn.ModuleList()
        if config.text_encoder:
            own: list[Any] = [deepcopy(block.attention) for block in self._layers]
            self.reading_attention.extend(own)
            self.encoder_token = nn.Parameter(torch.randn(self.width) * spread)
            self.mask_token = nn.Parameter(torch.randn(self.width) * spread)

    def embed(self, token_ids: Tensor, position: Tensor) -> Tensor:
        """See `Base`."""
        return self.place(self.model.bert.embeddings.word_embeddings(token_ids), position)

    def place(self, tokens: Tensor, position: Tensor) -> Tensor:
        """See `Base`."""
        inner = self.model.bert.embeddings
        placed: Tensor = inner.dropout(
            inner.LayerNorm(tokens + inner.position_embeddings(position))
        )
        return placed

    def blocks(self, hidden: Tensor, position: Tensor, attention: Attention) -> Tensor:
        """See `Base`."""
        del position  # `embed` has seen to it
        crosses = self.reading.kind == "cross_attention"
        own = (block.attention for block in self._layers)
        return self._run(hidden, attention, own, crosses=crosses)

    def head(self, hidden: Tensor) -> Tensor:
        """See `Base`."""
        logits: Tensor = self.model.cls(hidden)
        return logits

    def image_pairs(self, tokens: Tensor) -> list[Tensor]:
        """See `Base`."""
        return [
            split_heads(project(tokens), self.head_dim)
            for block in self._layers
            for project in (block.crossattention.self.key, block.crossattention.self.value)
        ]

    def read(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        memory: Memory | None = None,
        masked: Tensor | None = None,
    ) -> Tensor:
        """Returns what each token means between those on both sides of it, (R, T, D).

        Args:
            token_ids: (R, T), `<bos>` ... `<eos>` and padding; the R / B rows of an image together.
            lengths: (R,), tokens without padding.
            memory: of B images, which the text is read with; the first token is then [ENC].
            masked: (R, T), True where [MASK] stands for the token.
        """
        embeddings = self.model.bert.embeddings.word_embeddings(token_ids)
        position = torch.arange(token_ids.shape[1], device=token_ids.device)
        if masked is not None:
            embeddings = torch.where(masked.unsqueeze(2), self.mask_token, embeddings)
        if memory is not None:
            first = (position == 0).unsqueeze(1)
            embeddings = torch.where(first, self.encoder_token, embeddings)
        hidden = self.place(embeddings, position)
        padding = position >= lengths.unsqueeze(1)
        shown = hidden.new_zeros(padding.shape).masked_fill(padding, float("-inf"))
        attention = SequenceAttention(
            memory or Memory(),
            self.head_dim,
            causal=False,
            dropout=self.attention_dropout,
            text_visible=shown[:, None, None],
        )
        return self._run(hidden, attention, self.reading_attention, crosses=memory is not None)

    def _run(
        self, hidden: Tensor, attention: Attention, own: Iterable[Any], *, crosses: bool
    ) -> Tensor:
        """Returns the last layer's output, with the self-attention of `own`."""
        for layer, (block, itself) in enumerate(zip(self._layers, own, strict=True)):
            hidden = self.look(layer, hidden, attention)
            projected = (p(hidden) for p in (itself.self.query, itself.self.key, itself.self.value))
            hidden = itself.output(attention.text(layer, *projected), hidden)
            if crosses:
                cross = block.crossattention
                query = cross.self.query(hidden)
                hidden = cross.output(attention.image(layer, query), hidden)
            hidden = block.output(block.intermediate(hidden), hidden)
        return hidden
