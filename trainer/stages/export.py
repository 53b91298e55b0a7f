"""`python -m trainer export RECIPE`: a run becomes a bundle, if the graphs behave as the model.

A failed parity check ends the stage before anything is written, so nothing that differs from the
model it came from can be published.
"""

import hashlib
import io
import platform
from collections.abc import Sequence
from copy import deepcopy
from datetime import UTC, datetime
from importlib import import_module, resources
from pathlib import Path
from string import Template
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydantic import AfterValidator, Field

from exports.bundle import write_bundle
from exports.images import ImageSpec, preprocess
from exports.manifest import Golden, Manifest, check_name, check_version
from trainer.captioner import Captioner
from trainer.compression import round_weights
from trainer.config import Config as BaseConfig
from trainer.data import Example
from trainer.decoding import StepModel, TorchSteps, beam_search, best_hypotheses
from trainer.errors import ConfigError
from trainer.graphs import export_decoder, export_encoder
from trainer.intervals import Interval
from trainer.metrics import cider
from trainer.onnx_steps import OnnxSteps
from trainer.parity import Parity, compare
from trainer.photos import load_all, load_pixels
from trainer.run import Run
from trainer.stages.evaluate import Model, as_json, score_all
from trainer.stages.finetune import read_captioned

_MARGIN = 5e-3  # a golden caption must win by this much, or other processors may not agree


class Card(BaseConfig):
    """Keys of `[card]`: what only a person can say about a model."""

    description: str
    data: str
    licence: str
    failures: str


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
    card: Card


def run(config: Config, out_dir: Path) -> None:
    """Checks parity, takes the figures and writes the bundle to `out_dir`/bundle."""
    source = Run(config.run)
    if (out_dir / "bundle").exists():
        raise ConfigError(f"{out_dir / 'bundle'} exists already; choose another folder with --out")
    _check_golden(config.golden)
    trained = blended(source, config.blend)
    captioner = round_weights(deepcopy(trained))
    print("exporting two graphs ...")
    encoder, encoder_spec = export_encoder(captioner)
    decoder, decoder_spec = export_decoder(captioner)
    steps = OnnxSteps(encoder, decoder, encoder_spec, decoder_spec, source.text)
    examples = read_captioned(config.data, config.images, config.split)
    pixels = load_all(examples, source.recipe.image)
    generation = source.recipe.generation
    shown = pixels[: config.parity_images]
    parity = compare(TorchSteps(captioner), steps, shown, generation).check()
    print(f"parity: {parity}")
    model = Model(config.name, steps, source.tokenizer, source.recipe.image, generation)
    found = best_hypotheses(steps, pixels, generation)
    captions = [source.tokenizer.decode(hypothesis.token_ids) for hypothesis in found]
    unrounded = best_hypotheses(TorchSteps(trained), shown, generation)
    unchanged = sum(a.token_ids == b.token_ids for a, b in zip(unrounded, found, strict=False))
    rounding = f"{unchanged} of {len(shown)} captions"
    print(f"rounding its weights left {rounding} as they were")
    references = [example.captions for example in examples]
    figures = score_all(references, captions)
    golden, pictures = _golden(config.golden, model)
    files = {
        encoder_spec.file: encoder,
        decoder_spec.file: decoder,
        "tokenizer.json": source.tokenizer_json,
        "MODEL_CARD.md": _card(
            config, source, figures, parity, rounding, examples, captions
        ).encode(),
        **pictures,
    }
    manifest = Manifest(
        name=config.name,
        version=config.version,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        description=config.card.description,
        licence=config.card.licence,
        image=source.recipe.image,
        text=source.text,
        encoder=encoder_spec,
        decoder=decoder_spec,
        defaults=generation,
        golden=golden,
        metrics={"data": config.data.name, "images": len(examples), "figures": as_json(figures)},
        provenance=_provenance(source, config.blend, parity),
        files={},
    )
    target = out_dir / "bundle"
    write_bundle(target, manifest, files)
    size = sum(len(body) for body in files.values()) / 1e6
    print(f"wrote {target} ({size:.1f} MB); publish it with: python -m exports publish {target}")


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


def _card(
    config: Config,
    source: Run,
    figures: dict[str, Interval],
    parity: Parity,
    rounding: str,
    examples: Sequence[Example],
    captions: Sequence[str],
) -> str:
    references = [example.captions for example in examples]
    scores = cider.score(references, captions).per_image[:, 0]
    worst = [
        f"- said *{captions[index]}*, people said *{examples[index].captions[0]}*"
        for index in np.argsort(scores)[:8]
    ]
    template = Template(resources.files("trainer").joinpath("model_card.md").read_text("utf-8"))
    return template.substitute(
        name=config.name,
        **config.card.model_dump(),
        data_name=config.data.name,
        images=len(examples),
        rows="\n".join(
            f"| {k} | {v.value:.3f} | {v.low:.3f} to {v.high:.3f} |" for k, v in figures.items()
        ),
        decoding=", ".join(f"{k} {v}" for k, v in source.recipe.generation.model_dump().items()),
        parity=parity,
        rounding=rounding,
        worst="\n".join(worst),
    )


def _provenance(source: Run, blend: float, parity: Parity) -> dict[str, Any]:
    """Returns what the bundle came from."""
    packages = ("torch", "timm", "transformers", "onnx", "onnxruntime")
    return {
        "recipe": _recipe(source),
        "blend": blend,
        "parity": parity.as_json(),
        "python": platform.python_version(),
        # Asked of the module: ONNX Runtime comes from packages of several names.
        "packages": {package: import_module(package).__version__ for package in packages},
    }


def _recipe(source: Run) -> dict[str, Any]:
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
    if "weights" in recipe["encoder"]:
        recipe["encoder"]["weights"] = recipe["encoder"]["weights"].rpartition("/")[2]
    start = source.recipe.start
    if start is not None:
        recipe["start"] = _recipe(Run(start)) if start.is_dir() else start.name
    return recipe
