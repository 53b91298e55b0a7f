"""Captioners of `transformers`, imported and served, say what `generate` says."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import foreign_checkpoints
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from exports.images import preprocess
from exports.registry import Registry
from serving.captioner import Captioner
from serving.decode_image import ImageLimits, decode_image
from serving.params import Params
from trainer.__main__ import main

PROCESSORS = {
    "vision_encoder_decoder": ViTImageProcessorPil,
    "blip": BlipImageProcessorPil,
    "git": CLIPImageProcessorPil,
}
TOKENS = 12


class Imported:
    """A checkpoint of one family: the model of `transformers`, and what is served."""

    def __init__(self, family: str, root: Path) -> None:
        torch.manual_seed(3)
        self.family, self.folder = family, root / family
        self.model = getattr(foreign_checkpoints, family)(self.folder)
        registry, out = root / "registry", root / f"{family}-out"
        name = family.replace("_", "-")
        places = ["--registry", str(registry), "--out", str(out)]
        command = ["import", str(self.folder), "--name", name, "--licence", "MIT", *places]
        assert main(command) == 0
        self.served = Captioner.load(Registry(registry).resolve(name).path, threads=1)
        self.processor = PROCESSORS[family].from_pretrained(self.folder)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)

    def expected(self, picture: Image.Image, prompt: str = "", **how: Any) -> Any:
        """What `generate` gives: ids after the start without padding, and their scores."""
        pixels = self.processor(picture, return_tensors="pt").pixel_values
        given: dict[str, Any] = {}
        if prompt:
            ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
            bos = self.served.manifest.text.bos_id
            given["input_ids"] = torch.tensor([[bos, *ids]])
            if self.family == "blip":  # which drops the end token of its processor
                given["input_ids"] = torch.tensor([[bos, *ids, 3]])
        found = self.model.generate(
            pixel_values=pixels,
            max_new_tokens=TOKENS,
            early_stopping=False,
            return_dict_in_generate=True,
            output_scores=True,
            **given,
            **how,
        )
        rows = found.sequences[:, 1:].tolist()
        scores = getattr(found, "sequences_scores", None)
        return [self._ended(row) for row in rows], None if scores is None else scores.tolist()

    def said(self, picture: Image.Image, params: Params) -> Any:
        """What the server gives for the picture's file."""
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        pixels = decode_image(buffer.getvalue(), self.served.image_spec, ImageLimits())
        (captions,) = self.served.caption_batch([pixels], [params])
        assert isinstance(captions, list), captions
        return captions

    def params(self, **chosen: Any) -> Params:
        defaults = self.served.manifest.defaults
        return Params.of(defaults, **{"max_new_tokens": TOKENS, **chosen})

    def _ended(self, row: list[int]) -> tuple[int, ...]:
        eos = self.served.manifest.text.eos_id
        return tuple(row[: row.index(eos) + 1] if eos in row else row)


def pictures(count: int) -> list[Image.Image]:
    """Photographs and noise of many sizes, cut out at random."""
    draw = np.random.default_rng(0)
    photos = [
        Image.open(path).convert("RGB") for path in sorted(Path("tests/photos").glob("*"))[1:]
    ]
    found = []
    for number in range(count):
        width, height = (int(side) for side in draw.integers(40, 200, 2))
        if number % 3 == 2:
            noise = draw.integers(0, 256, (height, width, 3), np.uint8)
            found.append(Image.fromarray(noise))
            continue
        photo = photos[number % len(photos)]
        left = int(draw.integers(0, photo.width - width))
        upper = int(draw.integers(0, photo.height - height))
        found.append(photo.crop((left, upper, left + width, upper + height)))
    return found


@pytest.fixture(scope="module", params=sorted(PROCESSORS))
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    return Imported(request.param, tmp_path_factory.mktemp("imported"))


def check(imported: Imported, count: int) -> None:
    texts, ended = set(), 0
    for picture in pictures(count):
        for beams in (1, 3, 5):
            ids, scores = imported.expected(
                picture, num_beams=beams, num_return_sequences=beams, length_penalty=1.0
            )
            captions = imported.said(picture, imported.params(num_beams=beams, num_captions=beams))
            assert [caption.token_ids for caption in captions] == ids
            if scores is not None:
                assert [c.score for c in captions] == pytest.approx(scores, abs=5e-4)
            decoded = imported.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
            assert captions[0].text == decoded
            texts.add(captions[0].text)
            ended += len(ids[0]) < TOKENS
    assert len(texts) > count / 3  # images tell apart
    assert 0 < ended < 3 * count  # and some captions end before the last step


def test_beams_are_those_of_generate(imported: Imported) -> None:
    check(imported, 10)


@pytest.mark.slow
def test_beams_are_those_of_generate_on_fifty_images(imported: Imported) -> None:
    check(imported, 50)


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 2.0])
def test_length_penalties_are_those_of_generate(imported: Imported, penalty: float) -> None:
    for picture in pictures(3):
        ids, _ = imported.expected(picture, num_beams=3, length_penalty=penalty)
        params = imported.params(num_beams=3, length_penalty=penalty)
        assert [caption.token_ids for caption in imported.said(picture, params)] == ids


def test_a_prompt_is_a_prefix(imported: Imported) -> None:
    if imported.family == "vision_encoder_decoder":
        pytest.skip("its generate takes no prompt beside the start token")
    (picture,) = pictures(1)
    ids, _ = imported.expected(picture, prompt="a cat", num_beams=3, length_penalty=1.0)
    (caption,) = imported.said(picture, replace(imported.params(num_beams=3), prefix="a cat"))
    assert caption.token_ids == ids[0]
    assert caption.text.startswith("a cat")


def test_pixels_are_those_of_the_image_processor(imported: Imported) -> None:
    spec = imported.served.image_spec
    mean, std = (
        np.array(value)[:, None, None]
        for value in (imported.processor.image_mean, imported.processor.image_std)
    )
    for picture in pictures(20):
        theirs = imported.processor(picture, return_tensors="np").pixel_values[0] * std + mean
        ours = preprocess(picture, spec).transpose(2, 0, 1) / 255
        assert np.abs(theirs - ours).max() < 1e-6


def test_a_bundle_says_what_it_was_made_of(imported: Imported) -> None:
    manifest = imported.served.manifest
    assert manifest.licence == "MIT"
    assert manifest.provenance["imported"] == type(imported.model).__name__
    assert manifest.provenance["log_prob_difference"] < 1e-4
    assert manifest.defaults.num_beams == 1
    assert manifest.defaults.max_new_tokens == 19
    assert manifest.text.max_length == 32
