"""`python -m trainer export RECIPE`: a run becomes a bundle, if the graphs behave as the model.

A failed parity check ends the stage before anything is written, so nothing that differs from the
model it came from can be published.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, JsonValue, model_validator

from exports.manifest import check_name, check_version
from trainer.captioner import Captioner
from trainer.compression import round_weights
from trainer.config import Config as BaseConfig
from trainer.decoding import StepModel, TorchSteps, best_hypotheses
from trainer.errors import ConfigError
from trainer.intervals import Interval
from trainer.parity import Parity, compare
from trainer.photos import load_all, read_captioned
from trainer.run import Run
from trainer.stages._bundle import Content, Graphs, check_free, check_golden
from trainer.stages._card import Card, model_card, provenance
from trainer.stages._few_shot import FewShot, show_examples
from trainer.stages._figures import as_json, score_all
from trainer.stages._precision import Fp16, Int8, Precision, alike
from trainer.stages._reference import training_reference
from trainer.stages._reranking import settle

_ROUNDED = (
    "Rounding the weights for storage (int8 for the decoder's matrices, half precision for the "
    "rest) left {} as they were."
)


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
    fp16: Fp16 | None = None
    card: Card

    @model_validator(mode="after")
    def _is_of_one_precision(self) -> Self:
        if self.int8 and self.fp16:
            raise ValueError("a bundle is [int8] or [fp16]; export two for both")
        return self

    @property
    def precision(self) -> Precision | None:
        """What the graphs compute in, if not in float32."""
        return self.int8 or self.fp16


def run(config: Config, out_dir: Path) -> None:
    """Checks parity, takes the figures and writes the bundle to `out_dir`/bundle."""
    source = Run(config.run)
    target = out_dir / "bundle"
    check_free(target)
    check_golden(config.golden)
    examples = read_captioned(config.data, config.images, config.split)
    trained = blended(source, config.blend)
    shown_examples = None
    if config.few_shot is not None:
        shown_examples = show_examples(config.few_shot, trained, source, examples)
    # Fewer bits are rounded from the trained weights; stored floats are what they are rounded to.
    captioner = trained if config.precision else round_weights(deepcopy(trained))
    references = [example.captions for example in examples]
    pixels = load_all(examples, source.recipe.image)
    found = _checked(config, source, trained, captioner, pixels, references)
    graphs, captions = found.graphs, found.captions
    figures = score_all(references, captions)
    matching = None
    if captioner.matcher:
        graphs = graphs.with_matcher(captioner)
        steps = graphs.steps(source.text)
        matching = settle(
            captioner,
            steps,
            pixels,
            references,
            source,
            encoder=steps if config.precision else None,
            dtype=graphs.decoder_spec.dtype,
        )
        print(matching.words)
    metrics: dict[str, JsonValue] = {
        "data": config.data.name,
        "images": len(examples),
        "figures": as_json(figures),
    }
    proofs = provenance(source, config.blend, found.parity) | {"few_shot": shown_examples}
    if config.precision and found.difference:
        metrics[f"{config.precision.NAME} - float32"] = as_json(found.difference)
        proofs["budget"] = config.precision.budget
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
        prompt_ids=source.prompt_ids,
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
        reference=training_reference(graphs, source.recipe.data, source.recipe.image),
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
        ParityError: the graphs do not behave as the model, or fewer bits may change too much.
    """
    graphs = Graphs.of(captioner)
    steps = graphs.steps(source.text)
    shown = pixels[: config.parity_images]
    generation, prompt = source.recipe.generation, source.prompt_ids
    parity = compare(TorchSteps(captioner), steps, shown, generation, prompt=prompt).check()
    print(f"parity: {parity}")
    captions = _captions(steps, pixels, source)
    difference = None
    if config.precision is None:
        unrounded = _captions(TorchSteps(trained), shown, source)
        rounding = _ROUNDED.format(alike(unrounded, captions[: len(shown)]))
    else:
        floats, graphs = captions, config.precision.applied(graphs, source)
        captions = _captions(graphs.steps(source.text), pixels, source)
        rounding, difference = config.precision.check(references, captions, floats)
    print(rounding)
    return _Checked(graphs, parity, captions, rounding, difference)


def _captions(steps: StepModel, pixels: NDArray[np.uint8], source: Run) -> list[str]:
    found = best_hypotheses(steps, pixels, source.recipe.generation, prompt=source.prompt_ids)
    return [source.tokenizer.decode(hypothesis.token_ids) for hypothesis in found]


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
