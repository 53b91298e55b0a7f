"""A timm vision transformer; its patch tokens, class token first where there is one."""

from functools import partial
from typing import Any

import torch
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.encoders._timm import TimmConfig, TimmEncoder
from trainer.errors import ConfigError


class Config(TimmConfig):
    """Keys of `[encoder] name = "timm_vit"`."""

    model: str = "vit_small_patch16_224"
    patch_size: int | None = None
    depth: int | None = None
    embed_dim: int | None = None
    num_heads: int | None = None
    """Set the last four to build another size of the family; weights then come from a file of that
    size, or are random."""
    mlp_ratio: float | None = None
    qkv_bias: bool | None = None
    norm_eps: float | None = None
    """What the weights were trained with, where that is not what timm's model of that name has."""


class Encoder(TimmEncoder):
    """See `trainer.encoders`; D is the transformer's width, N the patches plus prefix tokens."""

    def __init__(self, config: Config, image_size: tuple[int, int]) -> None:
        keys = {"patch_size", "depth", "embed_dim", "num_heads", "mlp_ratio", "qkv_bias"}
        sizes = config.model_dump(include=keys)
        given: dict[str, Any] = {key: value for key, value in sizes.items() if value is not None}
        if config.norm_eps is not None:
            given["norm_layer"] = partial(LayerNorm, eps=config.norm_eps)
        super().__init__(config, image_size, img_size=image_size, **given)
        self.width = int(self.backbone.num_features)

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns image_tokens (B, N, D) and pooled (B, D), as timm pools for classification."""
        image_tokens = self.backbone.forward_features(self.normalise(images))
        return image_tokens, self.backbone.forward_head(image_tokens, pre_logits=True)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        rows, columns = self.backbone.patch_embed.grid_size
        return int(rows), int(columns)

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        height, width = self.backbone.patch_embed.patch_size
        return int(height), int(width)

    @property
    def prefix_tokens(self) -> int:
        """Tokens that stand before the patches', such as the class token."""
        return int(getattr(self.backbone, "num_prefix_tokens", 1))

    def feature_map(self, images: Tensor) -> Tensor:
        """Returns the patches' tokens of images (B, 3, H, W), as a map (B, D, rows, columns)."""
        patches = self(images)[0][:, self.prefix_tokens :]
        return patches.transpose(1, 2).unflatten(2, self.grid)

    def check_can_drop_patches(self) -> None:
        """Refuses backbones whose attention needs the patches that `visible_tokens` leaves out.

        Raises:
            ConfigError: relative positions, windows or the like.
        """
        if not isinstance(self.backbone, VisionTransformer):
            raise ConfigError(
                f"{type(self.backbone).__name__} cannot leave patches out; take a plain vision "
                'transformer, such as model = "vit_small_patch16_224"'
            )

    def cut_out(self, images: Tensor, ids: Tensor) -> Tensor:
        """Returns some patches of each image, one below the other, (B, 3, V * p, q).

        Args:
            images: (B, 3, H, W), filled by patches of p x q pixels.
            ids: (B, V), which patches, row by row from the top left.
        """
        (rows, columns), (height, width) = self.grid, self.patch
        pixels = images.permute(0, 2, 3, 1).reshape(-1, rows, height, columns, width, 3)
        patches = pixels.transpose(2, 3).reshape(len(images) * rows * columns, -1)
        first = rows * columns * torch.arange(len(images), device=ids.device)
        # Whole rows of memory; `gather` takes forty times as long.
        chosen = patches.index_select(0, (ids + first[:, None]).flatten())
        return chosen.view(len(images), -1, width, 3).permute(0, 3, 1, 2)

    def visible_tokens(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """Returns the tokens (B, prefix + V, D) of an encoder that sees some patches only.

        A patch keeps the position embedding of its place, and every prefix token stays.

        Args:
            images: (B, 3, H, W), in 0..255, filled by the patches.
            ids_keep: (B, V), which patches, row by row from the top left.

        Raises:
            ConfigError: see `check_can_drop_patches`.
        """
        self.check_can_drop_patches()
        backbone, embed = self.backbone, self.backbone.patch_embed
        projected = embed.proj(self.normalise(self.cut_out(images, ids_keep)))
        visible = embed.norm(projected.flatten(2).transpose(1, 2))
        # What timm makes of patches that are all 0: its prefix tokens, and the positions alone.
        nothing = visible.new_zeros(1, self.grid[0] * self.grid[1], visible.shape[2])
        prefix, positions = backbone._pos_embed(nothing).tensor_split([self.prefix_tokens], dim=1)
        visible = visible + F.embedding(ids_keep, positions[0])
        tokens = torch.cat([prefix.expand(len(visible), -1, -1), visible], dim=1)
        return backbone.norm(backbone.blocks(backbone.norm_pre(tokens)))

    def masked_tokens(self, images: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
        """Returns the tokens (B, prefix + N, D) of images some of whose patches are unknown.

        Args:
            images: (B, 3, H, W), in 0..255.
            mask: (B, N), true where `mask_token` takes the place of a patch's embedding.
            mask_token: (D,).
        """

        def hide(module: nn.Module, given: tuple[Tensor], patches: Tensor) -> Tensor:
            flat = patches.view(len(patches), -1, patches.shape[-1])
            hidden = torch.where(mask[:, :, None], mask_token.to(flat.dtype), flat)
            return hidden.view_as(patches)

        with self.backbone.patch_embed.register_forward_hook(hide):
            tokens: Tensor = self.backbone.forward_features(self.normalise(images))
        return tokens


def transformer_blocks(layers: int, width: int, heads: int) -> nn.Sequential:
    """Returns layers of a plain vision transformer, (B, N, D) to (B, N, D).

    PyTorch's own `nn.TransformerEncoderLayer` copies queries, keys and values more often.
    """
    return nn.Sequential(
        *(Block(width, heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(layers))
    )
