"""What a bundle tells of itself: the model card for people, the provenance for programs."""

import hashlib
import platform
from collections.abc import Sequence
from importlib import import_module, resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from exports.manifest import Generation
from trainer.config import Config as BaseConfig
from trainer.data import Example
from trainer.intervals import Interval
from trainer.metrics import cider
from trainer.parity import Parity
from trainer.run import Run


class Card(BaseConfig):
    """Keys of `[card]`: what only a person can say about a model."""

    description: str
    data: str
    licence: str
    failures: str


def model_card(
    card: Card,
    *,
    name: str,
    data_name: str,
    generation: Generation,
    figures: dict[str, Interval],
    parity: Parity,
    rounding: str,
    matching: str,
    examples: Sequence[Example],
    captions: Sequence[str],
) -> str:
    """Returns MODEL_CARD.md; `captions` are those of the examples, which the figures score."""
    references = [example.captions for example in examples]
    scores = cider.score(references, captions).per_image[:, 0]
    worst = [
        f"- said *{captions[index]}*, people said *{examples[index].captions[0]}*"
        for index in np.argsort(scores)[:8]
    ]
    template = Template(resources.files("trainer").joinpath("model_card.md").read_text("utf-8"))
    return template.substitute(
        name=name,
        **card.model_dump(),
        data_name=data_name,
        images=len(examples),
        rows="\n".join(
            f"| {k} | {v.value:.3f} | {v.low:.3f} to {v.high:.3f} |" for k, v in figures.items()
        ),
        decoding=", ".join(f"{k} {v}" for k, v in generation.model_dump().items()),
        parity=parity,
        rounding=rounding,
        matching=f"\n\n{matching}" if matching else "",
        worst="\n".join(worst),
    )


def provenance(source: Run, blend: float, parity: Parity) -> dict[str, Any]:
    """Returns what the bundle came from."""
    return {
        "recipe": recipe_of(source),
        "blend": blend,
        "parity": parity.as_json(),
        **environment(),
    }


def environment() -> dict[str, Any]:
    """Returns what a bundle was made with."""
    packages = ("torch", "timm", "transformers", "onnx", "onnxruntime")
    return {
        "python": platform.python_version(),
        # Asked of the module: ONNX Runtime comes from packages of several names.
        "packages": {package: import_module(package).__version__ for package in packages},
    }


def recipe_of(source: Run) -> dict[str, Any]:
    """Returns a run's recipe, and in its `start` that of the run it began with.

    Paths are cut to their names, which is all they mean elsewhere; the captions' sha256 is added.
    A run that is gone by now is only named.
    """
    recipe = source.recipe.model_dump(mode="json")
    data = source.recipe.data
    for key in ("train", "dev", "images"):
        path = getattr(data, key)
        recipe["data"][key] = None if path is None else path.name
    if data.train.is_file():
        recipe["data"]["train_sha256"] = hashlib.sha256(data.train.read_bytes()).hexdigest()
    for table in ("encoder", "decoder"):
        if "weights" in recipe[table]:
            recipe[table]["weights"] = Path(recipe[table]["weights"]).name
    start = source.recipe.start
    if start is not None:
        recipe["start"] = recipe_of(Run(start)) if start.is_dir() else start.name
    return recipe
