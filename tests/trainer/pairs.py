"""A tiny captioner that matches, and batches of pairs, for the tests of objectives on pairs."""

from typing import Any

import numpy as np
import torch
from tiny_captioner import TEXT, VIT

from exports.images import ImageSpec
from trainer import variants
from trainer.captioner import Captioner
from trainer.data import Example
from trainer.dataset import CaptionDataset
from trainer.matching import MatcherConfig
from trainer.transforms import Augment, Transform

BERT = {
    "name": "bert",
    "text_encoder": True,
    "width": 32,
    "layers": 2,
    "heads": 2,
    "dropout": 0.0,
    "max_length": 12,
}
SIZE = (32, 48)


class Letters:
    """A tokenizer of captions written in letters: `d` is token 3, `e` is 4, and so on."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text if letter != " "]

    prefix_ids = encode


def make_matcher(**changes: Any) -> Captioner:
    """A captioner on random weights; `changes` replace its tables."""
    tables: dict[str, Any] = {
        "encoder": VIT,
        "bridge": {"name": "cross_attention", "layers": 0, "dropout": 0.0},
        "decoder": BERT,
        "matcher": MatcherConfig(width=16),
    }
    torch.manual_seed(0)
    captioner = Captioner(**(tables | changes), image=ImageSpec(height=32, width=48), text=TEXT)
    return captioner.eval()


def make_dataset(captions: list[tuple[str, ...]], *, each: int = 1) -> CaptionDataset:
    """Patterns of large squares with captions; an item holds `each` of an image's captions."""
    squares = np.random.default_rng(0).integers(0, 256, (len(captions), 2, 3, 3), np.uint8)
    pixels = squares.repeat(16, axis=1).repeat(16, axis=2)
    examples = [Example(f"{n}.png", own, None) for n, own in enumerate(captions)]  # type: ignore[arg-type]
    transform = Transform(Augment(), SIZE)
    tokenizer: Any = Letters()
    return CaptionDataset(
        examples, pixels, tokenizer, TEXT, captions=each, transform=transform, seed=0
    )


def some_captions(images: int, captions: int = 1) -> list[tuple[str, ...]]:
    """Different captions of different lengths."""
    draw = np.random.default_rng(1)

    def caption() -> str:
        return "".join(draw.choice(list("defghijklmnopqrstuvwxyz"), draw.integers(3, 8)))

    return [tuple(caption() for _ in range(captions)) for _ in range(images)]


def objective_of(
    table: dict[str, Any], dataset: CaptionDataset, captioner: Captioner | None = None
) -> Any:
    """An objective on `captioner`, by default one of `make_matcher`."""
    module, config = variants.parse("objectives", table)
    return module.Objective(config, captioner or make_matcher(), dataset)


def batch_of(dataset: CaptionDataset, *indices: int, epoch: int = 0) -> dict[str, torch.Tensor]:
    """A batch of some images, by default of all."""
    chosen = indices or range(len(dataset))
    return dataset.collate([dataset[(epoch, index)] for index in chosen])
