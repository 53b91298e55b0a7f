"""Image tokens projected to the decoder's width, which every decoder layer cross-attends to.

The projection is followed by a learned position a token and by pre-norm self-attention layers
(Vaswani et al., 2017, https://arxiv.org/abs/1706.03762; as refinement of grid features for
captioning: Cornia et al., 2020, https://arxiv.org/abs/1912.08226).
"""

from torch import Tensor, nn

from trainer.bridges._transformer import Layer, Positioned, positions
from trainer.config import Config as BaseConfig
from trainer.reading import Reading


class Config(BaseConfig):
    """Keys of `[bridge] name = "cross_attention"`."""

    layers: int = 1
    heads: int = 4
    dropout: float = 0.1

    def reading(self) -> Reading:
        """Returns what becomes of the tokens in the decoder."""
        return Reading("cross_attention")


class Bridge(Positioned):
    """Projects, places and refines the image tokens.

    Args:
        config: the recipe's table.
        encoder_width: D of the encoder.
        decoder_width: D of the decoder.
        tokens: N, fixed by the image size and the encoder.
    """

    def __init__(
        self, config: Config, *, encoder_width: int, decoder_width: int, tokens: int
    ) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.LayerNorm(encoder_width),
            nn.Linear(encoder_width, decoder_width),
            nn.Dropout(config.dropout),
        )
        self.position = positions(tokens, decoder_width)
        self.layers = nn.ModuleList(
            Layer(decoder_width, config.heads, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(decoder_width)

    def forward(self, image_tokens: Tensor) -> Tensor:
        """Returns (B, N, D_decoder) from image_tokens (B, N, D_encoder)."""
        hidden = self.project(image_tokens) + self.position
        for layer in self.layers:
            hidden = layer(hidden)
        normed: Tensor = self.norm(hidden)
        return normed
