"""A small text transformer: captions in, one vector each out."""

import torch
from torch import Tensor, nn

from trainer.config import Config as BaseConfig


class TextEncoderConfig(BaseConfig):
    """Keys of a table `text`."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    dropout: float = 0.0


class TextEncoder(nn.Module):
    """Causal and pre-norm; a caption is what its `<eos>` has seen.

    Radford et al., 2021, "Learning Transferable Visual Models From Natural Language Supervision",
    https://arxiv.org/abs/2103.00020, section 2.4.
    """

    def __init__(self, config: TextEncoderConfig, *, vocab_size: int, max_length: int) -> None:
        super().__init__()
        self.width = config.width
        self.token_embedding = nn.Embedding(vocab_size, config.width)
        self.position = nn.Parameter(torch.zeros(max_length, config.width))
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            4 * config.width,
            config.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)

    def forward(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns (B, D).

        Args:
            token_ids: (B, T), `<bos>` ... `<eos>` and padding.
            lengths: (B,), tokens without padding.
        """
        tokens = token_ids.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(tokens, device=token_ids.device)
        hidden = self.token_embedding(token_ids) + self.position[:tokens]
        hidden = self.norm(self.blocks(hidden, mask=causal, is_causal=True))
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, lengths - 1]
