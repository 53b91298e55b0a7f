"""`python -m trainer evaluate RECIPE`: figures with intervals, and a contact sheet.

Takes a run's folder or a bundle, and captions a data set with the trainer's own beam search. Where
a run has a matcher, retrieval and the AUC of matching are measured too.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from tqdm import tqdm

from exports.manifest import Generation
from trainer.config import Config as BaseConfig
from trainer.config import validate
from trainer.data import Example, check_apart
from trainer.decoding import Hypothesis, best_hypotheses
from trainer.intervals import Interval, bootstrap
from trainer.metrics import cider
from trainer.neighbours import CaptionedNeighbours
from trainer.photos import load_all, read_captioned
from trainer.reranking import Judged, judged_lists
from trainer.retrieval import Pairs, Reader, measure
from trainer.sheet import SheetRow, write_sheet
from trainer.stages._figures import as_json, differences_of, rerank_figures, score_all
from trainer.stages._model import Model


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


def run(config: Config, out_dir: Path) -> None:
    """Prints the figures; writes `figures.json`, `captions.jsonl` and `sheet.html` to `out_dir`."""
    model = Model.open(config.model)
    changed = model.generation.model_dump() | config.generation
    generation = validate(Generation, changed, "generation")
    examples = read_captioned(config.data, config.images, config.split)
    others = _others(config, examples)
    pixels = load_all(examples, model.image)
    lists: list[list[Judged]] = []
    if model.reranking:
        lists = judged_lists(
            model.steps,
            pixels,
            generation,
            model.text,
            prompt=model.prompt_ids,
            batch_size=config.batch_size,
        )
        found = [own[0].hypothesis for own in lists]
    else:
        found = best_hypotheses(
            model.steps,
            pixels,
            generation,
            prompt=model.prompt_ids,
            batch_size=config.batch_size,
        )
    decode = model.tokenizer.decode
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
    _write_captions(out_dir / "captions.jsonl", examples, captions, found)
    scores = cider.score(references, captions).per_image[:, 0].tolist()
    rows = [
        SheetRow(example.image, caption, example.captions, hypothesis.score, value)
        for example, caption, hypothesis, value in zip(
            examples, captions, found, scores, strict=True
        )
    ]
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
        blocks.append(last.mean(2, dtype=np.float32).reshape(len(last), -1))
    features: NDArray[np.float32] = np.concatenate(blocks)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _write_captions(
    path: Path,
    examples: Sequence[Example],
    captions: Sequence[str],
    found: Sequence[Hypothesis],
) -> None:
    with path.open("w", encoding="utf-8") as file:
        for example, caption, hypothesis in zip(examples, captions, found, strict=True):
            row = {
                "image": example.image.name,
                "caption": caption,
                "score": round(hypothesis.score, 5),
                "token_ids": hypothesis.token_ids,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _words(generation: Generation) -> str:
    changed = generation.model_dump()
    return ", ".join(f"{name} {value}" for name, value in changed.items())


def _print(figures: dict[str, Interval]) -> None:
    for name, interval in figures.items():
        print(f"  {name:15s} {interval}")
