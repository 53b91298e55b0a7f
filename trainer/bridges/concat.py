"""GIT: image tokens and text are one sequence; image tokens see each other, text sees what is left.

Wang et al., 2022, "GIT: A Generative Image-to-text Transformer for Vision and Language",
https://arxiv.org/abs/2205.14100, section 3.1: a linear layer and a layer norm bring the tokens to
the decoder's width.

Departure: each token has a learned position, since not every encoder has given it one; without
`positions` it is GIT's own.
"""

from torch import Tensor, nn

from trainer.bridges._transformer import Positioned, positions
from trainer.config import Config as BaseConfig
from trainer.reading import Reading


class Config(BaseConfig):
    """Keys of `[bridge] name = "concat"`."""

    positions: bool = True
    """Whether tokens have learned positions."""
    norm_eps: float = 1e-5

    def reading(self) -> Reading:
        """Returns what becomes of the tokens in the decoder."""
        return Reading("prefix", causal=False)


class Bridge(Positioned):
    """See the module.

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
        self.project = nn.Linear(encoder_width, decoder_width)
        self.norm = nn.LayerNorm(decoder_width, eps=config.norm_eps)
        self._placed = config.positions
        if config.positions:
            self.position = positions(tokens, decoder_width)

    def forward(self, image_tokens: Tensor) -> Tensor:
        """Returns (B, N, D_decoder) from image_tokens (B, N, D_encoder)."""
        hidden: Tensor = self.norm(self.project(image_tokens))
        return hidden + self.position if self._placed else hidden
