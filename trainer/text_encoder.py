"""A small text transformer: captions in, one vector each out."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import Config as BaseConfig


class TextEncoderConfig(BaseConfig):
    """Keys of a table `text`."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    dropout: float = 0.0
    mlp_width: int | None = None
    """Of the layers' hidden features; by default four times `width`."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """OpenAI's CLIP has quick_gelu, most later ones gelu: weights go with theirs alone."""
    norm_eps: float = 1e-5


def quick_gelu(features: Tensor) -> Tensor:
    """Returns x * sigmoid(1.702 x), OpenAI's approximation of GELU."""
    return features * torch.sigmoid(1.702 * features)


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
            config.mlp_width or 4 * config.width,
            config.dropout,
            activation=quick_gelu if config.activation == "quick_gelu" else F.gelu,
            layer_norm_eps=config.norm_eps,
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
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
