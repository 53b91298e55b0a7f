"""A training run's folder: what it holds and how a captioner is read back from it.

- `recipe.json`: the resolved recipe, defaults included;
- `tokenizer.json`, and `text.json`, its special ids and lengths;
- `last.safetensors`: the whole state of the loop (see `trainer.checkpoint`);
- `log.jsonl`: losses and figures by step; `tensorboard/`: the same as curves.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from exports.images import ImageSpec
from exports.manifest import Generation
from exports.text import TextSpec, Tokenizer
from trainer.captioner import Captioner
from trainer.config import Config, validate
from trainer.errors import CheckpointError
from trainer.loop import CHECKPOINT, Loop, load_kept_weights
from trainer.optim import Optim
from trainer.transforms import Augment


class Data(Config):
    """Keys of `[data]`: paths, and how much of each image's captions a step sees."""

    train: Path
    dev: Path | None = None
    images: Path | None = None
    """The folder that image names are relative to; by default found beside the files."""
    train_split: str | None = None
    dev_split: str | None = None
    dev_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of `train` held out as `dev`, near-duplicates on one side; 0 where `dev` is named."""
    dev_images: int = Field(default=200, ge=1)
    """How many images of `dev` are captioned after an epoch, to see how the run goes."""
    captions_per_image: int = Field(default=5, ge=1)


class TokenizerConfig(Config):
    """Keys of `[tokenizer]`."""

    vocab_size: int = 3072


class Recipe(Config):
    """A recipe that trains a captioner."""

    seed: int = 0
    start: Path | None = None
    """A run of the same architecture, whose tokenizer and weights this one begins with."""
    data: Data
    image: ImageSpec
    tokenizer: TokenizerConfig = TokenizerConfig()
    encoder: dict[str, Any]
    bridge: dict[str, Any]
    decoder: dict[str, Any]
    objective: dict[str, Any]
    augment: Augment = Augment()
    optim: Optim = Optim()
    loop: Loop
    generation: Generation = Field(default_factory=Generation)


class Run:
    """A run's folder, read back.

    Args:
        folder: what `python -m trainer finetune` wrote.

    Raises:
        CheckpointError: a file of it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            resolved = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
            text = (folder / "text.json").read_text(encoding="utf-8")
            self.tokenizer_json = (folder / "tokenizer.json").read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{folder}: no training run ({error.filename} is missing); give the folder that "
                "`python -m trainer finetune` wrote"
            ) from error
        self.recipe = validate(Recipe, resolved, str(folder / "recipe.json"))
        self.text = TextSpec.model_validate_json(text)
        self.tokenizer = Tokenizer(self.tokenizer_json, self.text)

    def captioner(self) -> Captioner:
        """Returns the trained captioner, with the kept weights (the moving average, if any)."""
        captioner = build_captioner(self.recipe, self.text, pretrained=False)
        self.load_into(captioner)
        return captioner.eval()

    def load_into(self, captioner: Captioner) -> None:
        """Gives the trained weights to a captioner of the same architecture."""
        load_kept_weights(captioner, self.folder / CHECKPOINT, "captioner.")


def build_captioner(recipe: Recipe, text: TextSpec, *, pretrained: bool = True) -> Captioner:
    """Returns the recipe's captioner, with its starting weights unless others replace them."""
    encoder = recipe.encoder if pretrained else {**recipe.encoder, "weights": ""}
    return Captioner(
        encoder=encoder, bridge=recipe.bridge, decoder=recipe.decoder, image=recipe.image, text=text
    )
