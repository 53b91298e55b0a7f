"""The towers that an alignment begins with, against the library that wrote them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_checkpoints import CAPTIONS
from PIL import Image
from pretraining import recipe
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from trainer.errors import CheckpointError, ConfigError
from trainer.stages import pretrain
from trainer.stages._towers import TowerReader, open_towers

SIDE = 32
SHAPE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 56,
    "layer_norm_eps": 1e-5,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Whose last tokens, as of CLIP's, are start and end."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CAPTIONS, trainer)
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, unk_token=names["eos_token"])


def saved(folder: Path, *, act: str = "quick_gelu", legacy: bool = False) -> tuple[Any, Any]:
    """A CLIPModel on random weights, and its tokenizer; `legacy` configs name 2 as the end."""
    words = tokenizer()
    text = {
        **SHAPE,
        "hidden_size": 24,
        "vocab_size": len(words),
        "max_position_embeddings": 24,
        "hidden_act": act,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": 2 if legacy else words.eos_token_id,
    }
    vision = {**SHAPE, "hidden_size": 32, "image_size": SIDE, "patch_size": 8, "hidden_act": act}
    torch.manual_seed(0)
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=20)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    size = {"shortest_edge": SIDE}
    processor = CLIPImageProcessor(size=size, crop_size={"height": SIDE, "width": SIDE})
    for part in (model, words, processor):
        part.save_pretrained(folder)
    return model, words


@pytest.mark.parametrize(
    ("act", "legacy"), [("quick_gelu", False), ("quick_gelu", True), ("gelu", False)]
)
def test_embeddings_are_those_of_transformers(act: str, legacy: bool, tmp_path: Path) -> None:
    model, words = saved(tmp_path, act=act, legacy=legacy)
    towers = open_towers(str(tmp_path))
    reader = TowerReader(towers.method, towers.tokenizer, towers.text)
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    ids = [[words.bos_token_id, *words.encode(text), words.eos_token_id] for text in CAPTIONS]
    assert len({len(row) for row in ids}) > 1
    longest = max(map(len, ids))
    padded = torch.tensor([row + [words.eos_token_id] * (longest - len(row)) for row in ids])
    normalised = towers.method.encoder.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    with torch.no_grad():
        images = model.get_image_features(pixel_values=normalised).pooler_output
        texts = model.get_text_features(input_ids=padded).pooler_output
    for found, theirs in (
        (reader.embed_images(pixels), images),
        (reader.embed_captions(CAPTIONS), texts),
    ):
        expected = torch.nn.functional.normalize(theirs, dim=1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert towers.method.logit_scale.item() == pytest.approx(model.logit_scale.item())


def test_pixels_are_prepared_as_its_processor_does(tmp_path: Path) -> None:
    saved(tmp_path)
    towers = open_towers(str(tmp_path))
    spec = towers.tables.image
    assert (spec.height, spec.width, spec.resize) == (SIDE, SIDE, "shortest_edge")
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    picture = Image.fromarray(np.full((SIDE, SIDE, 3), (30, 120, 250), np.uint8))
    theirs = processor(picture, return_tensors="pt")["pixel_values"]
    pixels = torch.tensor([[30, 120, 250]]).view(1, 3, 1, 1).expand(1, 3, SIDE, SIDE)
    torch.testing.assert_close(towers.method.encoder.normalise(pixels), theirs, atol=1e-4, rtol=0)


def change(path: Path, table: str, **values: Any) -> None:
    config = json.loads(path.read_text())
    config[table] |= values
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("table", "values", "message"),
    [
        ("text_config", {"hidden_act": "relu"}, "text_config: hidden_act 'relu'"),
        ("vision_config", {"hidden_act": "relu"}, "vision_config: hidden_act 'relu'"),
        ("text_config", {"num_hidden_layers": 3}, "tensors missing"),
        ("text_config", {"hidden_size": 40}, "of another shape"),
    ],
)
def test_a_clip_that_is_built_otherwise_is_refused(
    table: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(tmp_path)
    change(tmp_path / "config.json", table, **values)
    with pytest.raises(CheckpointError, match=message):
        open_towers(str(tmp_path))


def test_a_folder_of_something_else_is_refused(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither a run of `pretrain`.* give hub:NAME"):
        open_towers(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="a checkpoint of 'gpt2', but a CLIPModel is needed"):
        open_towers(str(tmp_path))
    simclr = {"name": "simclr", "hidden": 32, "width": 16}
    pretrain.run(recipe(shapes, simclr, loop={"epochs": 1}), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"text\.json is missing"):
        open_towers(str(tmp_path / "run"))
    for name in ("text.json", "tokenizer.json"):
        (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(ConfigError, match="a run of method 'simclr'; captions are matched by"):
        open_towers(str(tmp_path / "run"))
