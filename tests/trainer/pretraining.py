"""Tiny pretraining recipes and methods for the tests."""

from pathlib import Path
from typing import Any

import torch

from exports.text import TextSpec
from trainer import variants
from trainer.methods._method import Method, Setting
from trainer.run import PretrainRecipe

TEXT = TextSpec(vocab_size=40, pad_id=0, bos_id=1, eos_id=2, max_length=12)
VIT = {
    "name": "timm_vit",
    "model": "vit_tiny_patch16_224",
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
}
CNN = {"name": "timm_cnn", "model": "resnet10t.c3_in1k"}


def recipe(shapes: Path, method: dict[str, Any], **changes: Any) -> PretrainRecipe:
    """A recipe on ShapeCaps of 32 pixels: 6 steps in 2 epochs, a checkpoint after every step."""
    table: dict[str, Any] = {
        "data": {"train": shapes / "captions_train.json"},
        "image": {"height": 32, "width": 32},
        "tokenizer": {"vocab_size": 300},
        "encoder": VIT,
        "method": method,
        "augment": {},
        "loop": {"epochs": 2, "batch_size": 16, "workers": 0, "save_every": 1, "ema": 0.9},
        "probe": {"sample": 16},
    }
    for key, value in changes.items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
    return PretrainRecipe.model_validate(table)


def make_encoder(size: tuple[int, int] = (32, 48), **changes: Any) -> Any:
    """VIT with some keys changed and random weights."""
    torch.manual_seed(0)
    module, config = variants.parse("encoders", {**VIT, **changes})
    return module.Encoder(config, size)


def some_images(count: int = 4, size: tuple[int, int] = (32, 48), seed: int = 0) -> torch.Tensor:
    """Noise, uint8 (count, 3, *size)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=draw)


def method_of(
    table: dict[str, Any], *, encoder: dict[str, Any] | None = None, images: int = 8, batch: int = 8
) -> Method:
    """A method on random weights for images of 32 pixels."""
    module, config = variants.parse("methods", table)
    encoder_module, encoder_config = variants.parse("encoders", encoder or VIT)
    torch.manual_seed(0)
    built = encoder_module.Encoder(encoder_config, (32, 32))
    text = TEXT if module.Method.reads_captions else None
    method: Method = module.Method(config, built, Setting(images, batch, 100, text))
    return method


def batch_of(method: Method, images: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random shades, each view with noise of its own, and a caption for each image."""
    draw = torch.Generator().manual_seed(seed)
    corners = torch.rand(images, 3, 2, 2, generator=draw)
    shades = torch.nn.functional.interpolate(corners, size=32, mode="bilinear") * 240
    views = [
        shades + 10 * torch.rand(images, 3, 32, 32, generator=draw) for _ in range(method.views)
    ]
    batch = {"images": torch.cat(views).to(torch.uint8), "indices": torch.arange(images)}
    if method.reads_captions:
        words = torch.randint(3, TEXT.vocab_size, (images, 6), generator=draw)
        ends = torch.full((images, 1), TEXT.eos_id)
        batch["token_ids"] = torch.cat([torch.full((images, 1), TEXT.bos_id), words, ends], dim=1)
        batch["lengths"] = torch.full((images,), 8)
    return batch
