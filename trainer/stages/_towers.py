"""The two towers that an alignment begins with, and what they make of images and captions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exports.images import ImageSpec
from exports.text import TextSpec, Tokenizer
from trainer import variants
from trainer.checkpoint import CHECKPOINT
from trainer.config import Config, validate
from trainer.dataset import framed, padded
from trainer.errors import CheckpointError, ConfigError
from trainer.features import pooled_features
from trainer.forgetting import Views
from trainer.loop import load_kept_weights
from trainer.methods._method import Setting

_ROWS = 256  # captions read at a time
_HUB = "hub:"
_RECIPE = ("image", "encoder", "method")


class Tables(Config):
    """What towers are built from: tables as those of a `pretrain` recipe."""

    image: ImageSpec
    encoder: dict[str, Any]
    method: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Towers:
    """A CLIP.

    Attributes:
        tables: What it is built from, without the weights that it once began with.
        text: Its special ids.
        tokenizer_json: Its tokenizer.
        method: The towers themselves, norms keeping their statistics.
    """

    tables: Tables
    text: TextSpec
    tokenizer_json: bytes
    method: Any

    @property
    def tokenizer(self) -> Tokenizer:
        """What spells captions."""
        return Tokenizer(self.tokenizer_json, self.text)

    def keep_text(self, folder: Path) -> None:
        """Writes `tokenizer.json` and `text.json`, as every run has them."""
        (folder / "tokenizer.json").write_bytes(self.tokenizer_json)
        (folder / "text.json").write_text(self.text.model_dump_json() + "\n", encoding="utf-8")


def open_towers(source: str) -> Towers:
    """Returns the CLIP of a run, or of a `CLIPModel` of transformers.

    Args:
        source: the folder that `pretrain` or `align` wrote, the folder that `save_pretrained`
            wrote, or `hub:NAME`.

    Raises:
        ConfigError: a run of another method.
        CheckpointError: none of these is there, or it is damaged.
    """
    folder = Path(source)
    if (folder / CHECKPOINT).is_file():
        return _of_run(folder)
    if not source.startswith(_HUB) and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"start = {source!r}: neither a run of `pretrain` ({CHECKPOINT} is missing) nor a "
            f"CLIPModel of transformers (config.json is missing); of the hub give {_HUB}NAME"
        )
    return _of_transformers(source.removeprefix(_HUB))


def _of_run(folder: Path) -> Towers:
    try:
        recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        text = (folder / "text.json").read_text(encoding="utf-8")
        tokenizer_json = (folder / "tokenizer.json").read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{folder}: no run of `pretrain` with method clip ({error.filename} is missing)"
        ) from error
    name = (recipe.get("method") or {}).get("name")
    if name != "clip":
        raise ConfigError(
            f"start = {str(folder)!r}: "
            + (f"a run of method {name!r}" if name else "no run of `pretrain`")
            + "; captions are matched by a run of method clip, which has a tower for them"
        )
    tables = validate(Tables, {key: recipe[key] for key in _RECIPE}, str(folder / "recipe.json"))
    towers = _built(tables, TextSpec.model_validate_json(text), tokenizer_json)
    load_kept_weights(towers.method, folder / CHECKPOINT, "")
    return towers


def _of_transformers(source: str) -> Towers:
    # As late as this: `transformers` takes seconds to import.
    from trainer.foreign._clip import read_clip

    clip = read_clip(source)
    tables = Tables(image=clip.pixels.image, encoder=clip.encoder, method=clip.method)
    towers = _built(tables, clip.text, clip.tokenizer_json)
    towers.method.encoder.load(Path(source), clip.vision)
    encoder = {f"encoder.{k}": v for k, v in towers.method.encoder.state_dict().items()}
    towers.method.load_state_dict(encoder | clip.rest)
    return towers


def _built(tables: Tables, text: TextSpec, tokenizer_json: bytes) -> Towers:
    encoder = {**tables.encoder, "weights": ""}
    method = {**tables.method, "frozen": (), "keep_statistics": True}
    tables = Tables(image=tables.image, encoder=encoder, method=method)
    encoder_module, encoder_config = variants.parse("encoders", encoder)
    module, config = variants.parse("methods", method)
    built = encoder_module.Encoder(encoder_config, (tables.image.height, tables.image.width))
    setting = Setting(images=0, batch_size=0, steps=0, text=text)  # CLIP reads the text alone
    return Towers(tables, text, tokenizer_json, module.Method(config, built, setting))


class TowerReader:
    """Towers in evaluation, asked about images and captions.

    Args:
        method: the towers, on any device.
        tokenizer: of their captions; `text`: its special ids.
        text: see `tokenizer`.
    """

    def __init__(self, method: Any, tokenizer: Tokenizer, text: TextSpec) -> None:
        self._method, self._tokenizer, self._text = method.eval(), tokenizer, text
        self._device = next(method.parameters()).device

    @torch.inference_mode()
    def embed_images(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Returns unit vectors (n, E) of pixels (n, H, W, 3)."""
        return self.view(pixels).embeddings

    @torch.inference_mode()
    def view(self, pixels: NDArray[np.uint8]) -> Views:
        """Returns the encoder's features of pixels (n, H, W, 3), and their embeddings."""
        features = pooled_features(self._method.encoder, pixels)
        return Views(features, self._method.project_images(features.to(self._device)).cpu())

    @torch.inference_mode()
    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Returns unit vectors (m, E) of captions."""
        found = []
        for start in range(0, len(captions), _ROWS):
            rows = [
                framed(self._tokenizer.encode(caption), self._text)
                for caption in captions[start : start + _ROWS]
            ]
            token_ids, lengths = padded(rows, self._text.pad_id)
            batch = (token_ids.to(self._device), lengths.to(self._device))
            found.append(self._method.embed_captions(*batch).cpu())
        return torch.cat(found)
