"""The encoder's tokens as they are, or through one linear layer where the widths differ.

So have captioners whose encoder says all there is to say: the projection of `transformers`'
VisionEncoderDecoderModel, and none in BLIP (Li et al., 2022, https://arxiv.org/abs/2201.12086),
whose decoder takes tokens of the encoder's width.
"""

from torch import Tensor, nn

from trainer.config import Config as BaseConfig
from trainer.reading import Reading


class Config(BaseConfig):
    """`[bridge] name = "linear"` has no keys."""

    def reading(self) -> Reading:
        """Returns what becomes of the tokens in the decoder."""
        return Reading("cross_attention")


class Bridge(nn.Module):
    """See the module.

    Args:
        config: the recipe's table.
        encoder_width: D of the encoder.
        decoder_width: width of the tokens that the decoder takes.
        tokens: N, fixed by the image size and the encoder.
    """

    def __init__(
        self, config: Config, *, encoder_width: int, decoder_width: int, tokens: int
    ) -> None:
        del config, tokens
        super().__init__()
        self.project: nn.Module = nn.Identity()
        if encoder_width != decoder_width:
            self.project = nn.Linear(encoder_width, decoder_width)

    def forward(self, image_tokens: Tensor) -> Tensor:
        """Returns (B, N, D_decoder) from image_tokens (B, N, D_encoder)."""
        projected: Tensor = self.project(image_tokens)
        return projected
