"""What the timm families share: building, normalising and loading."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from trainer.config import Config as BaseConfig
from trainer.encoders._loading import load_backbone, load_tensors
from trainer.encoders._weights_file import WeightsFile
from trainer.errors import ConfigError


class TimmConfig(BaseConfig):
    """Keys of every timm encoder."""

    model: str
    """timm's name, for example `tf_efficientnet_lite0` or `vit_small_patch16_224`."""
    weights: str = ""
    """A training run's folder or its `last.safetensors`, to go on with that run's encoder; a file
    of timm's, open_clip's or transformers' weights (`.safetensors`, `.pth`, `.bin`...);
    `package:NAME` for such a file inside an installed Python package; `hub` for timm's pretrained
    weights; empty for random weights."""
    partial: bool = False
    """Load what fits of `weights` and leave the rest random; otherwise all of it must fit."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Per channel, in pixel values 0..255; the default is ImageNet's. `weights` go with those that
    they were trained with: CLIP, SigLIP and BEiT have others."""
    drop_path: float = 0.0


class TimmEncoder(nn.Module):
    """A timm backbone behind pixel normalisation.

    Args:
        config: the recipe's table.
        image_size: (H, W) in pixels.
        options: further keywords of `timm.create_model`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: TimmConfig, image_size: tuple[int, int], **options: Any) -> None:
        super().__init__()
        self.backbone: Any
        try:
            self.backbone = timm.create_model(
                config.model,
                pretrained=config.weights == "hub",
                num_classes=0,
                drop_path_rate=config.drop_path,
                **options,
            )
        except RuntimeError as error:  # timm's answer to a name it does not know
            raise ConfigError(f"timm cannot build {config.model!r}: {error}") from error
        if config.weights not in ("", "hub"):
            load_backbone(self.backbone, config.weights, partial=config.partial)
        self.image_size = image_size
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)

    def layers_above(self) -> dict[str, int]:
        """Returns for each parameter how many layers stand above its own, 0 for the last.

        Layers are a transformer's blocks or a convolutional network's stages, and the stem below
        them; what follows the last one counts to it.
        """
        groups = group_parameters(
            self.backbone, self.backbone.group_matcher(coarse=True), reverse=True
        )
        last = max(groups.values())
        return {f"backbone.{name}": last - group for name, group in groups.items()}

    def load(self, where: Path, tensors: dict[str, Tensor]) -> None:
        """Loads tensors by another library's names, as those of a file `where`.

        Raises:
            CheckpointError: a tensor is missing or of another shape.
        """
        load_tensors(self.backbone, WeightsFile(where, tensors))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns image_tokens (B, N, D) and pooled (B, D).

        Args:
            images: (B, 3, H, W), or what `encoded` made of them, (B, N + 1, D).
        """
        if images.ndim == 3:
            return images[:, :-1], images[:, -1]
        return self.look(images)

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns image_tokens (B, N, D) and pooled (B, D) of images (B, 3, H, W)."""
        raise NotImplementedError

    @torch.no_grad()
    def encoded(self, images: Tensor) -> Tensor:
        """Returns image_tokens and pooled as one tensor (B, N + 1, D), which `forward` takes."""
        image_tokens, pooled = self.look(images)
        return torch.cat([image_tokens, pooled.unsqueeze(1)], dim=1)

    def normalise(self, images: Tensor) -> Tensor:
        """Returns pixels (B, 3, H, W) in 0..255 as the backbone's input."""
        return (images.float() - self.mean) / self.std

    def denormalise(self, images: Tensor) -> Tensor:
        """Returns the backbone's input (B, 3, H, W) as pixels in 0..255; undoes `normalise`."""
        return images * self.std + self.mean
