"""A timm vision transformer; its patch tokens, class token first where there is one."""

from torch import Tensor

from trainer.encoders._timm import TimmConfig, TimmEncoder


class Config(TimmConfig):
    """Keys of `[encoder] name = "timm_vit"`."""

    model: str = "vit_small_patch16_224"
    patch_size: int | None = None
    depth: int | None = None
    embed_dim: int | None = None
    num_heads: int | None = None
    """Set the last four to build another size of the family; weights then come from a file of that
    size, or are random."""


class Encoder(TimmEncoder):
    """See `trainer.encoders`; D is the transformer's width, N the patches plus prefix tokens."""

    def __init__(self, config: Config, image_size: tuple[int, int]) -> None:
        sizes = config.model_dump(include={"patch_size", "depth", "embed_dim", "num_heads"})
        given = {key: value for key, value in sizes.items() if value is not None}
        super().__init__(config, image_size, img_size=image_size, **given)
        self.width = int(self.backbone.num_features)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns image_tokens (B, N, D) and pooled (B, D), as timm pools for classification."""
        image_tokens = self.backbone.forward_features(self.normalise(images))
        return image_tokens, self.backbone.forward_head(image_tokens, pre_logits=True)
