"""`python -m trainer export RECIPE`: a run becomes a bundle, if the graphs behave as the model.

A failed parity check ends the stage before anything is written, so nothing that differs from the
model it came from can be published.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, JsonValue

from exports.manifest import check_name, check_version
from trainer.captioner import Captioner
from trainer.compression import round_weights
from trainer.config import Config as BaseConfig
from trainer.decoding import StepModel, TorchSteps, best_hypotheses
from trainer.errors import ConfigError, ParityError
from trainer.graphs import export_matcher
from trainer.intervals import Interval
from trainer.onnx_steps import OnnxSteps
from trainer.parity import Parity, compare
from trainer.photos import load_all, read_captioned
from trainer.quantise_decoder import quantise_decoder
from trainer.quantise_encoder import quantise_encoder
from trainer.run import Run
from trainer.stages._bundle import Content, Graphs, check_free, check_golden
from trainer.stages._card import Card, model_card, provenance
from trainer.stages._few_shot import FewShot, show_examples
from trainer.stages._reranking import settle
from trainer.stages.evaluate import as_json, differences_of, score_all

_ROUNDED = (
    "Rounding the weights for storage (int8 for the decoder's matrices, half precision for the "
    "rest) left {} as they were."
)


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
    if source.prompt_ids:
        raise ConfigError(
            f"{config.run} was taught to caption behind objective.prompt, which a bundle does not "
            "give; train it without one"
        )
    target = out_dir / "bundle"
    check_free(target)
    check_golden(config.golden)
    examples = read_captioned(config.data, config.images, config.split)
    trained = blended(source, config.blend)
    shown_examples = None
    if config.few_shot is not None:
        shown_examples = show_examples(config.few_shot, trained, source, examples)
    # Integers are rounded from the trained weights; stored floats are what they are rounded to.
    captioner = trained if config.int8 else round_weights(deepcopy(trained))
    references = [example.captions for example in examples]
    pixels = load_all(examples, source.recipe.image)
    found = _checked(config, source, trained, captioner, pixels, references)
    graphs, captions = found.graphs, found.captions
    figures = score_all(references, captions)
    matching = None
    if captioner.matcher:
        # It computes in floats whatever the others do, so its weights are rounded in any case.
        graphs = graphs._replace(matcher=export_matcher(round_weights(captioner)))
        steps = graphs.steps(source.text)
        matching = settle(captioner, steps, pixels, references, source, int8=bool(config.int8))
        print(matching.words)
    metrics: dict[str, JsonValue] = {
        "data": config.data.name,
        "images": len(examples),
        "figures": as_json(figures),
    }
    if found.difference is not None:
        metrics["int8 - float32"] = as_json(found.difference)
    proofs = provenance(source, config.blend, found.parity) | {"few_shot": shown_examples}
    if matching:
        metrics["rerank"] = {name: arm.as_json() for name, arm in matching.arms.items()}
        proofs |= {"match_parity": matching.parity}
    Content(
        name=config.name,
        version=config.version,
        description=config.card.description,
        licence=config.card.licence,
        captioner=captioner,
        graphs=graphs,
        tokenizer_json=source.tokenizer_json,
        generation=source.recipe.generation,
        card=model_card(
            config.card,
            name=config.name,
            data_name=config.data.name,
            generation=source.recipe.generation,
            figures=figures,
            parity=found.parity,
            rounding=found.rounding,
            matching=matching.words if matching else "",
            examples=examples,
            captions=captions,
        ),
        metrics=metrics,
        provenance=proofs,
        reranking=matching.reranking if matching else None,
    ).write(target, config.golden)
    print(f"publish it with: python -m exports publish {target}")


class _Checked(NamedTuple):
    """The graphs that go into a bundle, and how they were held against the model."""

    graphs: Graphs
    parity: Parity
    captions: list[str]
    rounding: str
    difference: dict[str, Interval] | None


def _checked(
    config: Config,
    source: Run,
    trained: Captioner,
    captioner: Captioner,
    pixels: NDArray[np.uint8],
    references: Sequence[Sequence[str]],
) -> _Checked:
    """Exports `captioner`, which is `trained` or what its weights are rounded to.

    Raises:
        ParityError: the graphs do not behave as the model, or integers change too much.
    """
    graphs = Graphs.of(captioner)
    steps = graphs.steps(source.text)
    shown = pixels[: config.parity_images]
    parity = compare(TorchSteps(captioner), steps, shown, source.recipe.generation).check()
    print(f"parity: {parity}")
    captions = _captions(steps, pixels, source)
    if config.int8 is None:
        unrounded = _captions(TorchSteps(trained), shown, source)
        rounding, difference = _ROUNDED.format(_alike(unrounded, captions[: len(shown)])), None
    else:
        floats = captions
        graphs = _quantised(config.int8, graphs, steps, source)
        captions = _captions(graphs.steps(source.text), pixels, source)
        rounding, difference = _compared(config.int8.budget, references, captions, floats)
    print(rounding)
    return _Checked(graphs, parity, captions, rounding, difference)


def _captions(steps: StepModel, pixels: NDArray[np.uint8], source: Run) -> list[str]:
    found = best_hypotheses(steps, pixels, source.recipe.generation)
    return [source.tokenizer.decode(hypothesis.token_ids) for hypothesis in found]


def _quantised(config: Int8, graphs: Graphs, steps: OnnxSteps, source: Run) -> Graphs:
    examples = read_captioned(config.data, config.images, config.split)
    pixels = load_all(examples[: config.calibration_images], source.recipe.image)
    print(f"quantising by the activations on {len(pixels)} images ...")
    decoder = quantise_decoder(graphs.decoder, steps, pixels, source.recipe.generation)
    batches = (pixels[start : start + 8] for start in range(0, len(pixels), 8))
    embeddings = set(graphs.encoder_spec.outputs).difference(graphs.decoder_spec.memory)
    encoder = quantise_encoder(graphs.encoder, batches, floats=embeddings)
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
