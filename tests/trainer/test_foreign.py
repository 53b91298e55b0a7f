"""What the import of a captioner refuses, and what of a checkpoint it takes over."""

import json
from pathlib import Path
from typing import Any

import foreign_checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BlipImageProcessor, CLIPImageProcessor, ViTImageProcessor

from trainer import importing, variants
from trainer.__main__ import main
from trainer.errors import CheckpointError, ConfigError, ParityError
from trainer.foreign._checkpoint import read
from trainer.foreign._pixels import pixels_of


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("family", variants.names("foreign"))
def test_ours_says_what_the_checkpoint_says(family: str, tmp_path: Path) -> None:
    getattr(foreign_checkpoints, family)(tmp_path)
    checkpoint = read(tmp_path)
    captioner = importing.convert(checkpoint)
    pixels = torch.randint(0, 256, (2, 3, 48, 48))
    token_ids = torch.randint(0, 50, (2, 7))
    with torch.no_grad():
        found = captioner(pixels, token_ids)
    normalised = captioner.encoder.normalise(pixels)
    theirs = checkpoint.family.logits(checkpoint.model, normalised, token_ids)
    torch.testing.assert_close(found, theirs, atol=1e-4, rtol=1e-4)


def test_equal_widths_need_no_projection(tmp_path: Path) -> None:
    foreign_checkpoints.vision_encoder_decoder(tmp_path, width=32)
    captioner = importing.convert(read(tmp_path))
    assert not list(captioner.bridge.parameters())


def test_other_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not there, or no JSON"):
        read(tmp_path)
    foreign_checkpoints.blip(tmp_path)
    config = tmp_path / "config.json"
    told = config.read_text()
    change(config, architectures=["BlipForQuestionAnswering"])
    known = "BlipForConditionalGeneration, GitForCausalLM, VisionEncoderDecoderModel"
    with pytest.raises(CheckpointError, match=f"BlipForQuestionAnswering; what .* {known}"):
        read(tmp_path)
    config.write_text(told)
    weights = load_file(tmp_path / "model.safetensors")
    name = "vision_model.post_layernorm.weight"
    for spoilt, message in (
        ({k: v for k, v in weights.items() if k != name}, f"1 tensors missing .first {name}"),
        (weights | {name: torch.zeros(3)}, f"1 tensors of another shape .first {name}"),
    ):
        save_file(spoilt, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path)


def test_captioners_that_are_built_otherwise_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign_checkpoints.git(tmp_path)
    change(tmp_path / "config.json", num_image_with_embedding=6)
    assert main(["import", str(tmp_path), "--name", "x", "--out", str(tmp_path / "out")]) == 1
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error")]
    assert "num_image_with_embedding = 6: a captioner of videos" in line
    assert not (tmp_path / "out").exists()
    assert main(["import", str(tmp_path), "--name", "No Name", "--out", str(tmp_path)]) == 1
    assert "no model name" in capsys.readouterr().err


def test_what_is_missing_beside_the_weights_is_named(tmp_path: Path) -> None:
    foreign_checkpoints.git(tmp_path)
    size, crop = {"shortest_edge": 32}, {"height": 32, "width": 32}
    CLIPImageProcessor(size=size, crop_size=crop).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="prepared as 32 x 32, but the model takes 48 x 48"):
        read(tmp_path)
    change(tmp_path / "generation_config.json", eos_token_id=[3, 1])
    CLIPImageProcessor(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
    ).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"begin with 2 and end with \[3, 1\]"):
        read(tmp_path)
    foreign_checkpoints.byte_pairs().save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"has the id 2\d\d, but the model embeds \d\d tokens"
    ):
        read(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json is missing"):
        read(tmp_path)


def test_image_processors_are_taken_over_or_refused() -> None:
    size = {"height": 30, "width": 40}
    found = pixels_of(ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3), "p")
    assert (found.image.height, found.image.width, found.image.resize) == (30, 40, "squash")
    assert found.image.interpolation == "bilinear"
    assert found.mean == pytest.approx([127.5] * 3)
    assert found.std == pytest.approx([63.75] * 3)
    plain = pixels_of(ViTImageProcessor(size=size, do_normalize=False, do_rescale=False), "p")
    assert (plain.mean, plain.std) == ((0.0,) * 3, (1.0,) * 3)
    padded = BlipImageProcessor(do_pad=True, size_divisor=32)  # as BLIP's own are saved
    assert pixels_of(padded, "p").image.height == 384
    for refused, message in (
        (ViTImageProcessor(size=size, resample=0), "p: resample = 0; 2 .bilinear. and 3"),
        (ViTImageProcessor(size=size, do_resize=False), "do_resize False"),
        (CLIPImageProcessor(size={"shortest_edge": 64}), "shortest_edge 64, do_center_crop True"),
    ):
        with pytest.raises(CheckpointError, match=message):
            pixels_of(refused, "p")


def test_defaults_are_those_of_its_generate_and_others_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign_checkpoints.git(tmp_path)
    change(
        tmp_path / "generation_config.json",
        num_beams=3,
        max_length=12,
        min_length=4,
        length_penalty=0.6,
        no_repeat_ngram_size=2,
        early_stopping=True,
    )
    found = read(tmp_path).generation
    assert (found.num_beams, found.max_new_tokens, found.min_new_tokens) == (3, 11, 3)
    assert (found.length_penalty, found.no_repeat_ngram_size) == (0.6, 2)
    told = "not taken over: early_stopping = True of generation_config.json"
    assert told in capsys.readouterr().out


def test_a_captioner_that_differs_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign_checkpoints.git(tmp_path)
    convert = importing.convert

    def spoilt(checkpoint: Any) -> Any:
        captioner = convert(checkpoint)
        captioner.bridge.norm.eps = 0.1
        return captioner

    monkeypatch.setattr(importing, "convert", spoilt)
    config = importing.Config(folder=tmp_path, name="x")
    with pytest.raises(ParityError, match="differs from that of transformers by"):
        importing.run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out" / "bundle").mkdir(parents=True)
    with pytest.raises(ConfigError, match="bundle exists already"):
        importing.run(config, tmp_path / "out")
