"""The encoder that a recipe names: of a run, or a table with weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exports.images import ImageSpec
from trainer import variants
from trainer.config import validate
from trainer.errors import CheckpointError, ConfigError


@dataclass(frozen=True, slots=True)
class OpenEncoder:
    """An encoder in evaluation mode, on the GPU if there is one.

    Attributes:
        module: See `trainer.encoders`.
        table: That it was built from.
        image: What it takes.
    """

    module: Any
    table: dict[str, Any]
    image: ImageSpec


def open_encoder(
    source: Path | dict[str, Any], image: ImageSpec | None, *, seed: int
) -> OpenEncoder:
    """Returns an encoder with its weights.

    Args:
        source: the folder of a run of `pretrain` or `finetune`, or an `[encoder]` table.
        image: what it is shown; by default what the run's images looked like.
        seed: of weights that are random.

    Raises:
        CheckpointError: the folder holds no run.
        ConfigError: a table without an image size, or one that cannot be built.
    """
    if isinstance(source, Path):
        recipe = _recipe(source)
        table = {**recipe["encoder"], "weights": str(source), "partial": False}
        image = image or validate(ImageSpec, recipe["image"], str(source))
    else:
        table = source
    if image is None:
        raise ConfigError("an [encoder] table goes with [image] height and width; name them")
    torch.manual_seed(seed)
    module, config = variants.parse("encoders", table)
    encoder = module.Encoder(config, (image.height, image.width))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return OpenEncoder(encoder.to(device).eval(), table, image)


def _recipe(folder: Path) -> dict[str, Any]:
    path = folder / "recipe.json"
    try:
        recipe: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = {key: recipe[key] for key in ("encoder", "image")}
    except (OSError, ValueError, KeyError):
        raise CheckpointError(
            f"{folder}: no run with an encoder; give the folder that `python -m trainer pretrain` "
            "or `finetune` wrote, or an [encoder] table"
        ) from None
    return found
