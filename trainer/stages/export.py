"""`python -m trainer export RECIPE`: a run becomes a bundle, if the graphs behave as the model.

A failed parity check ends the stage before anything is written, so nothing that differs from the
model it came from can be published.
"""

import io
from collections.abc import Sequence
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydantic import AfterValidator, Field, JsonValue

from exports.bundle import write_bundle
from exports.images import ImageSpec, preprocess
from exports.manifest import (
    JOIN_FILE,
    DecoderSpec,
    EncoderSpec,
    Golden,
    Manifest,
    check_name,
    check_version,
)
from exports.text import TextSpec
from trainer.captioner import Captioner
from trainer.compression import round_weights
from trainer.config import Config as BaseConfig
from trainer.decoding import StepModel, TorchSteps, beam_search, best_hypotheses
from trainer.errors import ConfigError, ParityError
from trainer.graphs import export_decoder, export_encoder, join_graph
from trainer.intervals import Interval
from trainer.onnx_steps import OnnxSteps
from trainer.parity import compare
from trainer.photos import load_all, load_pixels, read_captioned
from trainer.quantise_decoder import quantise_decoder
from trainer.quantise_encoder import quantise_encoder
from trainer.run import Run
from trainer.stages._card import Card, model_card, provenance
from trainer.stages._few_shot import FewShot, show_examples
from trainer.stages.evaluate import Model, as_json, differences_of, score_all

_ROUNDED = (
    "Rounding the weights for storage (int8 for the decoder's matrices, half precision for the "
    "rest) left {} as they were."
)
_MARGIN = 5e-3  # a golden caption must win by this much, or other processors may not agree


class Int8(BaseConfig):
    """Keys of `[int8]`: graphs that compute in 8-bit integers, for CPUs."""

    data: Path
    """Captioned images, best those of training; what ranges activations have is seen there."""
    images: Path | None = None
    split: str | None = None
    calibration_images: int = Field(default=128, ge=1)
    budget: float = Field(default=0.005, ge=0)
    """How far CIDEr-D may be from that of the float graphs; a bundle beyond it is not written."""


class Config(BaseConfig):
    """A recipe that exports a run."""

    run: Path
    """The folder that `finetune` wrote."""
    name: Annotated[str, AfterValidator(check_name)]
    version: Annotated[str, AfterValidator(check_version)] = "1"
    """Publishing may give another."""
    data: Path
    """Captioned images that were not trained on: parity is checked and figures are taken there."""
    images: Path | None = None
    split: str | None = None
    blend: float = Field(default=1.0, ge=0, le=1)
    """Share of the run's own weights; the rest is those of the run that it started from."""
    parity_images: int = Field(default=200, ge=1)
    golden: tuple[Path, ...] = ()
    """Pictures that go into the bundle with the captions it must give; some are drawn if none are
    named. They are published: name only what may be."""
    few_shot: FewShot | None = None
    int8: Int8 | None = None
    card: Card


def run(config: Config, out_dir: Path) -> None:
    """Checks parity, takes the figures and writes the bundle to `out_dir`/bundle."""
    source = Run(config.run)
    if (out_dir / "bundle").exists():
        raise ConfigError(f"{out_dir / 'bundle'} exists already; choose another folder with --out")
    _check_golden(config.golden)
    examples = read_captioned(config.data, config.images, config.split)
    trained = blended(source, config.blend)
    shown_examples = None
    if config.few_shot is not None:
        shown_examples = show_examples(config.few_shot, trained, source, examples)
    # Integers are rounded from the trained weights; stored floats are what they are rounded to.
    captioner = trained if config.int8 else round_weights(deepcopy(trained))
    print("exporting the graphs ...")
    graphs = Graphs(*export_encoder(captioner), *export_decoder(captioner))
    steps = graphs.steps(source.text)
    references = [example.captions for example in examples]
    pixels = load_all(examples, source.recipe.image)
    generation = source.recipe.generation
    shown = pixels[: config.parity_images]
    parity = compare(TorchSteps(captioner), steps, shown, generation).check()
    print(f"parity: {parity}")
    captions = _captions(steps, pixels, source)
    if config.int8:
        float_captions = captions
        graphs = _quantised(config.int8, graphs, steps, source)
        steps = graphs.steps(source.text)
        captions = _captions(steps, pixels, source)
        rounding, difference = _compared(config.int8.budget, references, captions, float_captions)
    else:
        unrounded = _captions(TorchSteps(trained), shown, source)
        rounding, difference = _ROUNDED.format(_alike(unrounded, captions[: len(shown)])), None
    print(rounding)
    figures = score_all(references, captions)
    model = Model(config.name, steps, source.tokenizer, source.recipe.image, generation)
    golden, pictures = _golden(config.golden, model)
    card = model_card(
        config.card,
        name=config.name,
        data_name=config.data.name,
        generation=generation,
        figures=figures,
        parity=parity,
        rounding=rounding,
        examples=examples,
        captions=captions,
    )
    files = {
        graphs.encoder_spec.file: graphs.encoder,
        graphs.decoder_spec.file: graphs.decoder,
        JOIN_FILE: join_graph(captioner),
        "tokenizer.json": source.tokenizer_json,
        "MODEL_CARD.md": card.encode(),
        **pictures,
    }
    metrics: dict[str, JsonValue] = {
        "data": config.data.name,
        "images": len(examples),
        "figures": as_json(figures),
    }
    if difference is not None:
        metrics["int8 - float32"] = as_json(difference)
    manifest = Manifest(
        name=config.name,
        version=config.version,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        description=config.card.description,
        licence=config.card.licence,
        image=source.recipe.image,
        text=source.text,
        encoder=graphs.encoder_spec,
        decoder=graphs.decoder_spec,
        defaults=generation,
        golden=golden,
        metrics=metrics,
        provenance=provenance(source, config.blend, parity) | {"few_shot": shown_examples},
        files={},
    )
    target = out_dir / "bundle"
    write_bundle(target, manifest, files)
    size = sum(len(body) for body in files.values()) / 1e6
    print(f"wrote {target} ({size:.1f} MB); publish it with: python -m exports publish {target}")


class Graphs(NamedTuple):
    """The two graphs that differ from captioner to captioner, and the names of their tensors."""

    encoder: bytes
    encoder_spec: EncoderSpec
    decoder: bytes
    decoder_spec: DecoderSpec

    def steps(self, text: TextSpec) -> OnnxSteps:
        """Returns them ready to run."""
        return OnnxSteps(self.encoder, self.decoder, self.encoder_spec, self.decoder_spec, text)


def _captions(steps: StepModel, pixels: NDArray[np.uint8], source: Run) -> list[str]:
    found = best_hypotheses(steps, pixels, source.recipe.generation)
    return [source.tokenizer.decode(hypothesis.token_ids) for hypothesis in found]


def _quantised(config: Int8, graphs: Graphs, steps: OnnxSteps, source: Run) -> Graphs:
    examples = read_captioned(config.data, config.images, config.split)
    pixels = load_all(examples[: config.calibration_images], source.recipe.image)
    print(f"quantising by the activations on {len(pixels)} images ...")
    decoder = quantise_decoder(graphs.decoder, steps, pixels, source.recipe.generation)
    batches = (pixels[start : start + 8] for start in range(0, len(pixels), 8))
    encoder = quantise_encoder(graphs.encoder, batches)
    return graphs._replace(encoder=encoder, decoder=decoder)


def _compared(
    budget: float, references: Sequence[Sequence[str]], found: list[str], floats: list[str]
) -> tuple[str, dict[str, Interval]]:
    """Returns what int8 changes, in words and figures.

    Raises:
        ParityError: CIDEr-D differs by more than the budget.
    """
    differences = differences_of(references, found, floats)
    difference = differences["CIDEr-D"]
    same = _alike(found, floats)
    if not abs(difference.value) <= budget:
        raise ParityError(
            f"int8 graphs change CIDEr-D by {difference}, more than the budget of {budget:g} "
            f"({same} are the float graphs'); calibrate on more images, or export without [int8]"
        )
    return (
        "The graphs compute in 8-bit integers. Against the same graphs in float32 that changes "
        f"CIDEr-D by {difference} and leaves {same} as they were.",
        differences,
    )


def _alike(first: Sequence[str], second: Sequence[str]) -> str:
    same = sum(a == b for a, b in zip(first, second, strict=True))
    return f"{same} of {len(first)} captions"


def blended(source: Run, share: float) -> Captioner:
    """Returns the run's captioner, its weights averaged with those that it started from.

    What a second stage gains on its own measure it may lose on others; between the two sets of
    weights there is often a better one (Wortsman et al., 2021, "Robust fine-tuning of zero-shot
    models", https://arxiv.org/abs/2109.01903).
    """
    captioner = source.captioner()
    if share == 1:
        return captioner
    if source.recipe.start is None:
        raise ConfigError(f"blend = {share}, but {source.folder} started from no other run")
    before = deepcopy(captioner)
    Run(source.recipe.start).load_into(before)
    with torch.no_grad():  # buffers are the same: normalisation keeps its statistics
        for name, parameter in captioner.named_parameters():
            parameter.lerp_(before.get_parameter(name), 1 - share)
    return captioner


def _check_golden(paths: Sequence[Path]) -> None:
    """Raises DataError or ConfigError for pictures that cannot be taken, before the long work."""
    for path in paths:
        load_pixels(path, ImageSpec(height=32, width=32))
    if len({path.name for path in paths}) < len(paths):
        raise ConfigError("golden: two of the pictures have one name; rename one")


def _golden(paths: Sequence[Path], model: Model) -> tuple[tuple[Golden, ...], dict[str, bytes]]:
    """Returns golden captions and their pictures by bundle path."""
    pictures = {path.name: path.read_bytes() for path in paths} if paths else _drawn()
    golden, kept = [], {}
    for name, body in pictures.items():
        with Image.open(io.BytesIO(body)) as image:
            pixels = preprocess(image, model.image)[None]
        best = _clear_winner(model.steps, pixels, model)
        if best is None:
            print(f"golden: {name} left out, two captions score nearly alike")
            continue
        kept[f"golden/{name}"] = body
        text = model.tokenizer.decode(best.token_ids)
        golden.append(
            Golden(
                image=f"golden/{name}",
                token_ids=best.token_ids,
                text=text,
                score=round(best.score, 5),
            )
        )
    if not golden:
        raise ConfigError("golden: no picture has a clear best caption; name others")
    return tuple(golden), kept


def _clear_winner(steps: StepModel, pixels: NDArray[np.uint8], model: Model) -> Any:
    generation = model.generation
    pair = generation.model_copy(update={"num_captions": min(2, generation.num_beams)})
    best, *others = beam_search(steps, pixels, pair)[0]
    return None if others and best.score - others[0].score < _MARGIN else best


def _drawn() -> dict[str, bytes]:
    """Returns a few small drawings, the same each time."""
    pictures = {}
    for number, (ground, ball) in enumerate(
        (("green", "red"), ("white", "black"), ("navy", "orange"), ("tan", "brown"))
    ):
        image = Image.new("RGB", (96, 64), "skyblue")
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 32, 96, 64), fill=ground)
        draw.ellipse((20 + 12 * number, 24, 44 + 12 * number, 48), fill=ball)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        pictures[f"drawing-{number}.png"] = buffer.getvalue()
    return pictures
