"""`python -m trainer evaluate RECIPE`: figures with intervals, and a contact sheet.

Takes a run's folder or a bundle, and captions a data set with the trainer's own beam search. Where
a run has a matcher, retrieval and the AUC of matching are measured too.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from tqdm import tqdm

from exports.bundle import Bundle
from exports.images import ImageSpec
from exports.manifest import MANIFEST_FILE, Generation, Reranking
from exports.text import TextSpec, Tokenizer
from trainer import variants
from trainer.config import Config as BaseConfig
from trainer.config import validate
from trainer.data import Example, check_apart
from trainer.decoding import Hypothesis, TorchSteps, best_hypotheses
from trainer.intervals import Interval, bootstrap, paired_difference
from trainer.metrics import cider
from trainer.neighbours import CaptionedNeighbours
from trainer.onnx_steps import OnnxSteps
from trainer.photos import load_all, read_captioned
from trainer.reranking import EVIDENCE, Judged, MatchModel, judged_lists, reranked
from trainer.retrieval import Pairs, Reader, measure
from trainer.run import Run
from trainer.sheet import SheetRow, write_sheet


class Config(BaseConfig):
    """A recipe that evaluates a captioner."""

    model: Path
    """A run's folder or a bundle's."""
    data: Path
    images: Path | None = None
    split: str | None = None
    neighbours: Path | None = None
    """Captioned images to compare with: each image then also gets the caption of its nearest
    neighbour among them, the baseline that any captioner has to beat."""
    neighbours_split: str | None = None
    generation: dict[str, Any] = Field(default_factory=dict)
    """Changes to the model's own defaults."""
    batch_size: int = Field(default=32, ge=1)
    sheet_images: int = Field(default=200, ge=1)


@dataclass(frozen=True, slots=True)
class Model:
    """A captioner ready to decode: from a run (PyTorch) or from a bundle (ONNX Runtime)."""

    name: str
    steps: MatchModel
    tokenizer: Tokenizer
    text: TextSpec
    image: ImageSpec
    generation: Generation
    reranking: Reranking | None = None
    """With a matcher, how it weighs."""
    prompt_ids: tuple[int, ...] = ()
    """What every caption begins with; not a part of it."""
    reader: Reader | None = None
    """Of a run with a matcher."""

    @classmethod
    def open(cls, path: Path) -> "Model":
        """Returns the captioner of a bundle's or run's folder.

        Raises:
            CheckpointError: neither is there; BundleError: the bundle does not verify.
        """
        if (path / MANIFEST_FILE).exists():
            bundle = Bundle.open(path)
            manifest, matcher = bundle.manifest, bundle.manifest.matcher
            steps = OnnxSteps(
                bundle.read(manifest.encoder.file),
                bundle.read(manifest.decoder.file),
                manifest.encoder,
                manifest.decoder,
                manifest.text,
                bundle.read(matcher.file) if matcher else None,
                matcher,
            )
            return cls(
                f"{manifest.name}@{manifest.version}",
                steps,
                bundle.tokenizer(),
                manifest.text,
                manifest.image,
                manifest.defaults,
                matcher.reranking if matcher else None,
            )
        run = Run(path)
        captioner = run.captioner()
        return cls(
            path.name,
            TorchSteps(captioner),
            run.tokenizer,
            run.text,
            run.recipe.image,
            run.recipe.generation,
            captioner.matcher.reranking if captioner.matcher else None,
            run.prompt_ids,
            None if captioner.matcher is None else Reader(captioner, run.tokenizer),
        )


def run(config: Config, out_dir: Path) -> None:
    """Prints the figures; writes `figures.json`, `captions.jsonl` and `sheet.html` to `out_dir`."""
    model = Model.open(config.model)
    changed = model.generation.model_dump() | config.generation
    generation = validate(Generation, changed, "generation")
    examples = read_captioned(config.data, config.images, config.split)
    others = _others(config, examples)
    pixels = load_all(examples, model.image)
    prompt = model.prompt_ids
    lists: list[list[Judged]] = []
    if model.reranking:
        lists = judged_lists(
            model.steps,
            pixels,
            generation,
            model.text,
            prefix=prompt,
            batch_size=config.batch_size,
        )
        found = [own[0].hypothesis for own in lists]
    else:
        found = best_hypotheses(
            model.steps, pixels, generation, prefix=prompt, batch_size=config.batch_size
        )

    def decode(token_ids: Sequence[int]) -> str:
        return model.tokenizer.decode(token_ids[len(prompt) :])

    captions = [decode(hypothesis.token_ids) for hypothesis in found]
    references = [example.captions for example in examples]
    figures = score_all(references, captions)
    report: dict[str, Any] = {
        "model": model.name,
        "images": len(examples),
        "figures": as_json(figures),
    }
    print(f"\n{model.name} on {config.data.name}, {len(examples)} images, {_words(generation)}")
    _print(figures)
    if model.reranking:
        arms = rerank_figures(lists, model.reranking, references, decode)
        report["rerank"] = {name: arm.as_json() for name, arm in arms.items()}
        for name, arm in arms.items():
            print(f"\nreranked by {name}, the search weighing {arm.weight:g}, minus the above")
            _print(arm.gain)
    if model.reader is not None:
        matching = _matching(model.reader, pixels, references)
        report |= {"matching": as_json(matching)}
        print("\nmatching of captions and images")
        _print(matching)
    copied: list[str] = []
    if others:
        copied = _copied_captions(model, pixels, others)
        baseline, gain = score_all(references, copied), differences_of(references, captions, copied)
        report |= {"neighbours": as_json(baseline), "gain": as_json(gain)}
        print(f"\ncaption of the nearest of {len(others)} captioned images")
        _print(baseline)
        print("\ndifference")
        _print(gain)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "figures.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    scores = cider.score(references, captions).per_image[:, 0].tolist()
    rows = [
        SheetRow(example.image, caption, example.captions, hypothesis.score, value)
        for example, caption, hypothesis, value in zip(
            examples, captions, found, scores, strict=True
        )
    ]
    _write_captions(out_dir / "captions.jsonl", examples, rows, found, copied)
    title = f"{model.name} on {config.data.name}"
    write_sheet(out_dir / "sheet.html", rows, title, figures, limit=config.sheet_images)
    print(f"\nwrote {out_dir}/figures.json, captions.jsonl and sheet.html")


def _matching(
    reader: Reader, pixels: NDArray[np.uint8], references: Sequence[Sequence[str]]
) -> dict[str, Interval]:
    """Returns how well captions and images are told to belong together (`trainer.retrieval`)."""
    figures: dict[str, Interval] = {}
    for scores in measure(reader, Pairs(pixels, references)):
        figures |= bootstrap(scores)
    return figures


def _others(config: Config, examples: Sequence[Example]) -> list[Example]:
    """Returns the captioned images to compare with, none of which may be evaluated itself."""
    if config.neighbours is None:
        return []
    others = read_captioned(config.neighbours, config.images, config.neighbours_split)
    check_apart(others, examples, "neighbours", "data")
    return others


def score_all(references: Sequence[Sequence[str]], captions: Sequence[str]) -> dict[str, Interval]:
    """Returns every metric's figures with bootstrap 95 % intervals."""
    figures: dict[str, Interval] = {}
    for name in variants.names("metrics"):
        figures |= bootstrap(variants.load("metrics", name).score(references, captions))
    return figures


def as_json(figures: dict[str, Interval]) -> dict[str, Any]:
    """Returns each figure as [value, low, high], rounded to 4 digits; None where it has no value.

    CIDEr-D of a single image has none, and JSON has no word for it.
    """
    return {
        name: [
            None if math.isnan(number) else round(number, 4)
            for number in (figure.value, figure.low, figure.high)
        ]
        for name, figure in figures.items()
    }


def differences_of(
    references: Sequence[Sequence[str]], captions: Sequence[str], others: Sequence[str]
) -> dict[str, Interval]:
    """Returns the figures of captions minus those of others, with paired 95 % intervals."""
    found: dict[str, Interval] = {}
    for name in ("cider", "bleu", "rouge"):
        score = variants.load("metrics", name).score
        found |= paired_difference(score(references, captions), score(references, others))
    return found


@dataclass(frozen=True, slots=True)
class RerankFigures:
    """What reranking by one kind of evidence comes to.

    Attributes:
        weight: of the search's own score, 1 being the search alone.
        figures: of the reranked captions.
        gain: their difference from the captions that the search alone puts first.
        changed: images whose caption is another.
    """

    weight: float
    figures: dict[str, Interval]
    gain: dict[str, Interval]
    changed: int

    def as_json(self) -> dict[str, Any]:
        """Returns the fields by name."""
        return {
            "weight": self.weight,
            "figures": as_json(self.figures),
            "gain": as_json(self.gain),
            "changed": self.changed,
        }


def rerank_figures(
    lists: Sequence[Sequence[Judged]],
    reranking: Reranking,
    references: Sequence[Sequence[str]],
    decode: Callable[[Sequence[int]], str],
) -> dict[str, RerankFigures]:
    """Returns, by evidence, the figures of reranked captions against the search's own first."""
    plain = [decode(own[0].hypothesis.token_ids) for own in lists]
    found: dict[str, RerankFigures] = {}
    for evidence in EVIDENCE:
        best = reranked(lists, reranking, evidence)
        captions = [decode(hypothesis.token_ids) for hypothesis in best]
        found[evidence] = RerankFigures(
            reranking.weight(evidence),
            score_all(references, captions),
            differences_of(references, captions, plain),
            sum(one != other for one, other in zip(captions, plain, strict=True)),
        )
    return found


def _copied_captions(
    model: Model, pixels: NDArray[np.uint8], others: Sequence[Example]
) -> list[str]:
    """Returns, for every image, a caption of the captioned image that the model finds nearest."""
    neighbours = CaptionedNeighbours([other.captions for other in others])
    features = _features(model, pixels)
    return neighbours.copied(features, _features(model, load_all(others, model.image)))


def _features(model: Model, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Returns unit vectors (n, D): the last values that text attends to, averaged over tokens."""
    blocks = []
    for start in tqdm(range(0, len(pixels), 64), desc="encoding", disable=None):
        memory = model.steps.encode(pixels[start : start + 64])
        image = [name for name in memory if name.startswith("memory_v")]
        last = memory[(image or [name for name in memory if name.startswith("prefix_v")])[-1]]
        blocks.append(last.mean(2).reshape(len(last), -1))
    features: NDArray[np.float32] = np.concatenate(blocks)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _write_captions(
    path: Path,
    examples: Sequence[Example],
    rows: Sequence[SheetRow],
    found: Sequence[Hypothesis],
    copied: Sequence[str],
) -> None:
    """Writes a line for each image: all that a report needs without captioning again."""
    lines: list[dict[str, Any]] = [
        {
            "image": example.image.name,
            "file": str(example.image.resolve()),
            "caption": row.caption,
            "score": round(hypothesis.score, 5),
            "cider_d": _number(row.cider_d),
            "token_ids": hypothesis.token_ids,
            "references": example.captions,
            "source": example.source,
        }
        for example, row, hypothesis in zip(examples, rows, found, strict=True)
    ]
    if copied:
        values = cider.score([example.captions for example in examples], copied).per_image[:, 0]
        for line, caption, value in zip(lines, copied, values.tolist(), strict=True):
            line["neighbour"] = {"caption": caption, "cider_d": _number(value)}
    body = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(body, encoding="utf-8")


def _number(value: float | None) -> float | None:
    """Returns what JSON has a word for."""
    return None if value is None or math.isnan(value) else round(value, 5)


def _words(generation: Generation) -> str:
    changed = generation.model_dump()
    return ", ".join(f"{name} {value}" for name, value in changed.items())


def _print(figures: dict[str, Interval]) -> None:
    for name, interval in figures.items():
        print(f"  {name:15s} {interval}")
