"""Cross-attention that begins closed, so that a language model is at first what it was.

Alayrac et al., 2022, "Flamingo: a Visual Language Model for Few-Shot Learning",
https://arxiv.org/abs/2204.14198, figure 4:

    y = y + tanh(a) * attention(norm(y), x);  y = y + tanh(b) * mlp(norm(y)),  a = b = 0 at first.
"""

import torch
from torch import Tensor, nn

from trainer.attention import Attention, split_heads


class GatedCrossAttention(nn.Module):
    """One such block, to stand before a layer of a decoder of that width."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        inner = heads * head_dim
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key_value = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )
        self.mlp_gate = nn.Parameter(torch.zeros(1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def pair(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values (B, H, M, D / H) of image tokens (B, M, D)."""
        keys, values = self.key_value(tokens).chunk(2, dim=-1)
        return split_heads(keys, self.head_dim), split_heads(values, self.head_dim)

    def forward(self, hidden: Tensor, layer: int, attention: Attention) -> Tensor:
        """Returns (..., D); `layer` counts the blocks like this one."""
        seen = self.out(attention.image(layer, self.query(self.norm(hidden))))
        hidden = hidden + self.attention_gate.tanh() * seen
        return hidden + self.mlp_gate.tanh() * self.mlp(self.mlp_norm(hidden))
