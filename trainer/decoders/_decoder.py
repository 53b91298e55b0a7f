"""What all decoder families share: how they are run, and how they come to see an image."""

from typing import Any, ClassVar, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from trainer.attention import Attention, Memory, SequenceAttention
from trainer.config import Config as BaseConfig
from trainer.decoders._gated import GatedCrossAttention
from trainer.errors import ConfigError
from trainer.reading import Reading


class DecoderConfig(BaseConfig):
    """Keys of every decoder."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    dropout: float = 0.1
    max_length: int = 40
    """The longest sequence, with `<bos>` and `<eos>`."""
    weights: str = ""
    """A checkpoint of `transformers` to begin with: the folder that `save_pretrained` wrote, or a
    name on the hub. Its sizes take the place of `width`, `layers` and `heads`, its tokenizer that
    of one's own; empty for random weights."""
    architecture: dict[str, Any] | None = None
    """The `config.json` of such a checkpoint. A run that began with one keeps it."""

    @model_validator(mode="after")
    def _says_its_sizes_once(self) -> Self:
        sizes = {"width", "layers", "heads", "key_value_heads"} & self.model_fields_set
        if sizes and (self.weights or self.architecture):
            raise ValueError(f"leave {', '.join(sorted(sizes))} out: weights has sizes of its own")
        return self


class Decoder(nn.Module):
    """Base of the families: token ids and an image's memory in, logits out.

    Subclasses build their modules in `__init__` and write `embed`, `blocks`, `head` and, if they
    cross-attend by layers of their own, `image_pairs`.

    Args:
        config: the recipe's table.
        reading: how the bridge wants the image to be read.
        width: D; `layers`: L; `heads` of keys and values: H; `head_dim`: the width of a head.
        query_heads: where several share the keys of one; by default H.
        image_width: of the tokens that it takes from a bridge; by default D.
        placed: positions that are taken before the text now, of the `reading`'s room.

    Raises:
        ConfigError: this family cannot read an image that way.
    """

    kinds: ClassVar[tuple[str, ...]]
    """The kinds of `Reading` that it can do."""
    asks_for_distances: ClassVar[bool] = False
    """Whether attention depends on how far tokens are apart."""

    def __init__(
        self,
        config: DecoderConfig,
        reading: Reading,
        *,
        width: int,
        layers: int,
        heads: int,
        head_dim: int,
        query_heads: int | None = None,
        image_width: int | None = None,
    ) -> None:
        super().__init__()
        self.reading = reading
        if reading.kind not in self.kinds:
            name = type(self).__module__.rpartition(".")[2]
            raise ConfigError(
                f"decoder {name} cannot take an image as {reading.kind}; it takes "
                f"{' or '.join(self.kinds)}: choose another bridge or decoder"
            )
        self.width, self.layers, self.heads, self.head_dim = width, layers, heads, head_dim
        self.image_width = image_width or width
        self.max_length, self.dropout = config.max_length, config.dropout
        self.placed = reading.room if reading.kind == "prefix" else 0
        self.gated = nn.ModuleList()
        if reading.kind == "gated":
            self.gated.extend(
                GatedCrossAttention(width, query_heads or heads, head_dim)
                for _ in range(0, layers, reading.every)
            )

    def embed(self, token_ids: Tensor, position: Tensor) -> Tensor:
        """Returns what the first layer takes, (..., D), of ids (...) at positions (...)."""
        raise NotImplementedError

    def place(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Returns image tokens (B, P, D) as `embed` would give them at positions (P,)."""
        raise NotImplementedError

    def blocks(self, hidden: Tensor, position: Tensor, attention: Attention) -> Tensor:
        """Returns what the last layer gives, (..., D), for hidden (..., D)."""
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """Returns logits (..., V) of what follows, for hidden (..., D)."""
        raise NotImplementedError

    def image_pairs(self, tokens: Tensor) -> list[Tensor]:
        """Returns `[k0, v0, ...]`, each (B, H, M, D / H), of the family's own cross-attention."""
        raise NotImplementedError

    def logits(self, token_ids: Tensor, position: Tensor, attention: Attention) -> Tensor:
        """Returns logits (..., V) of what follows tokens (...).

        Args:
            token_ids: (R,) or (R, T).
            position: how many tokens stand before each, (R,) or (T,).
            attention: (R, D) or (R, T, D) to itself and the image.
        """
        position = position + self.placed
        return self.head(self.blocks(self.embed(token_ids, position), position, attention))

    def forward(
        self,
        token_ids: Tensor,
        memory: Memory,
        image_visible: Tensor | None = None,
        text_visible: Tensor | None = None,
    ) -> Tensor:
        """Returns logits (R, T, V) for token_ids (R, T); the R / B rows of an image are together.

        Args:
            token_ids: (R, T).
            memory: of the B images.
            image_visible: (R, T, M), which image tokens each token sees; None: all.
            text_visible: (R, 1, 1, T), 0 for what counts of the text, else -inf; None: all of it.
        """
        position = torch.arange(token_ids.shape[1], device=token_ids.device)
        attention = self._whole(memory, image_visible, text_visible)
        return self.logits(token_ids, position, attention)

    def prompt_pairs(
        self, token_ids: Tensor, memory: Memory, image_visible: Tensor, text_visible: Tensor
    ) -> tuple[Tensor, ...]:
        """Returns keys and values of every layer for a prompt (B, P) at the first positions.

        Args:
            token_ids: (B, P); the others as above.
            memory: see `forward`.
            image_visible: see `forward`.
            text_visible: see `forward`.
        """
        position = torch.arange(token_ids.shape[1], device=token_ids.device)
        attention = self._whole(memory, image_visible, text_visible)
        self.blocks(self.embed(token_ids, position), position, attention)
        return tuple(attention.written)

    def _whole(
        self, memory: Memory, image_visible: Tensor | None, text_visible: Tensor | None
    ) -> SequenceAttention:
        return SequenceAttention(
            memory,
            self.head_dim,
            dropout=self.attention_dropout,
            visible=image_visible,
            text_visible=text_visible,
        )

    def memory(self, tokens: Tensor) -> Memory:
        """Returns what the text attends to of the bridge's tokens (B, N, D)."""
        if self.reading.kind == "gated":
            gated: Any = self.gated
            return Memory(tuple(part for block in gated for part in block.pair(tokens)))
        if self.reading.kind == "cross_attention":
            return Memory(tuple(self.image_pairs(tokens)))
        return Memory(prefix=tuple(self.prefix_pairs(tokens)))

    def prefix_pairs(self, tokens: Tensor) -> list[Tensor]:
        """Returns keys and values of every layer for tokens (B, P, D) before the text."""
        reading = self.reading
        attention = SequenceAttention(
            Memory(), self.head_dim, causal=reading.causal, dropout=self.attention_dropout
        )
        position = torch.arange(tokens.shape[1], device=tokens.device)
        if reading.room:
            tokens = self.place(tokens, position)
        self.blocks(tokens, position if reading.room else 0 * position, attention)
        return attention.written

    def look(self, layer: int, hidden: Tensor, attention: Attention) -> Tensor:
        """Returns a layer's input (..., D) after the gated look before it, if there is one."""
        number, rest = divmod(layer, self.reading.every)
        if self.gated and rest == 0:
            hidden = self.gated[number](hidden, number, attention)
        return hidden

    @property
    def attention_dropout(self) -> float:
        """Of attention weights, now."""
        return self.dropout if self.training else 0.0


def dense(layer: Any, values: Tensor) -> Tensor:
    """Returns (..., D_out) for values (..., D), by a layer of `transformers` that keeps (D, D_out).

    Written out for rows (R, D) so that the exported step is lean: the layer would flatten and
    unflatten its input.
    """
    if values.ndim == 2:
        return torch.addmm(layer.bias, values, layer.weight)
    whole: Tensor = layer(values)
    return whole
