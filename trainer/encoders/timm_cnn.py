"""A convolutional timm encoder; its last feature map, row by row, is the image tokens."""

from torch import Tensor

from trainer.encoders._timm import TimmConfig, TimmEncoder


class Config(TimmConfig):
    """Keys of `[encoder] name = "timm_cnn"`."""

    model: str = "tf_efficientnet_lite0"


class Encoder(TimmEncoder):
    """See `trainer.encoders`; D is the backbone's number of features, N the map's h * w."""

    def __init__(self, config: Config, image_size: tuple[int, int]) -> None:
        super().__init__(config, image_size)
        self.width = int(self.backbone.num_features)

    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the last feature map of images (B, 3, H, W), (B, D, h, w)."""
        features: Tensor = self.backbone.forward_features(self.normalise(images))
        return features

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns image_tokens (B, N, D) and their mean, pooled (B, D)."""
        image_tokens = self.feature_map(images).flatten(2).transpose(1, 2)
        return image_tokens, image_tokens.mean(1)
