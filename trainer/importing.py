"""`python -m trainer import DIR`: a captioner of `transformers` becomes a bundle, a bundle a run.

A run that is made of a bundle goes on learning, and is asked, evaluated and exported as any other;
see `trainer.unpacking`. The rest is about captioners of `transformers`.

Their weights move into the parts of this package as they are, unrounded. Nothing is written before
two checks hold: fed the same tokens, our captioner says what the model of `transformers` says; and
the exported graphs behave as our captioner.

Captions are then those of `generate` with the same `num_beams`, `length_penalty` and
`early_stopping=False`, but for two rules:

1. A bundle counts `max_new_tokens` without the prompt and has no `max_length`; and no caption is
   longer than the positions of the decoder.
2. What `generation_config.json` says of sampling, of `early_stopping=True` and of forced or
   penalised tokens is not taken over, which is told.
"""

import io
from importlib import resources
from pathlib import Path
from string import Template
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import AfterValidator

from exports.bundle import Bundle
from exports.images import ImageSpec, preprocess
from exports.manifest import MANIFEST_FILE, Generation, check_name
from exports.registry import Registry
from trainer.captioner import Captioner
from trainer.config import Config as BaseConfig
from trainer.decoding import TorchSteps
from trainer.errors import ConfigError, ParityError
from trainer.foreign._checkpoint import Checkpoint, read
from trainer.parity import LOG_PROB_TOLERANCE, Parity, compare
from trainer.run import write_run
from trainer.stages._bundle import Content, Graphs, check_free, check_golden, drawings
from trainer.stages._card import environment
from trainer.unpacking import unpack

_NOISE = 12  # images of it beside the drawings
_TOKENS = 6


class Config(BaseConfig):
    """What the command line takes."""

    folder: Path
    """What `save_pretrained` wrote: config, weights, tokenizer and image processor. Or a bundle."""
    name: Annotated[str, AfterValidator(check_name)] | None = None
    """Of the bundle that is made."""
    registry: Path | None = None
    """Where the bundle is published, under the next version."""
    licence: str = "not stated"
    description: str | None = None
    golden: tuple[Path, ...] = ()
    """Pictures that go into the bundle with the captions it must give; some are drawn if none are
    named."""


def run(config: Config, out_dir: Path) -> None:
    """Writes a bundle to `out_dir`/bundle, and publishes it where a registry is named.

    Of a bundle it writes a run to `out_dir`.

    Raises:
        ConfigError: a captioner of transformers has got no name, or a bundle a new one.
        CheckpointError: the folder holds no captioner that is supported.
        ParityError: a check failed; nothing is written.
    """
    if (config.folder / MANIFEST_FILE).exists():
        if config.name is not None or config.registry is not None:
            raise ConfigError(
                f"{config.folder} is a bundle already, of which a run is made: leave --name and "
                "--registry out, or publish it with python -m exports publish"
            )
        _unpack(Bundle.open(config.folder), out_dir)
        return
    if config.name is None:
        raise ConfigError(
            f"{config.folder} has no {MANIFEST_FILE}, so is no bundle; of a captioner that "
            "transformers saved --name is missing, what its bundle shall be called"
        )
    target = out_dir / "bundle"
    check_free(target)
    check_golden(config.golden)
    checkpoint = read(config.folder)
    captioner = convert(checkpoint)
    pixels = _pictures(captioner.image)
    difference = _difference(captioner, checkpoint, pixels)
    print(f"log-probabilities within {difference:.1e} of those of transformers")
    graphs = Graphs.of(captioner)
    generation = checkpoint.generation
    steps = graphs.steps(captioner.text)
    parity = compare(TorchSteps(captioner), steps, pixels, generation).check()
    print(f"parity: {parity}")
    family = checkpoint.family.CLASS
    Content(
        name=config.name,
        version="1",
        description=_description(config, family),
        licence=config.licence,
        captioner=captioner,
        graphs=graphs,
        tokenizer_json=checkpoint.tokenizer_json,
        generation=generation,
        card=_card(config, family, difference, parity, generation),
        metrics={},
        provenance={
            "imported": family,
            "folder": config.folder.resolve().name,
            "config": checkpoint.config,
            "log_prob_difference": difference,
            "parity": parity.as_json(),
            **environment(),
        },
    ).write(target, config.golden)
    if config.registry is not None:
        placed = Registry(config.registry).publish(target)
        print(f"published as {placed.reference} in {config.registry}")


def _unpack(bundle: Bundle, out_dir: Path) -> None:
    manifest = bundle.manifest
    recipe, captioner = unpack(bundle)
    recipe = recipe.model_copy(update={"generation": manifest.defaults})
    tokenizer_json = bundle.read(manifest.tokenizer_file)
    write_run(out_dir, recipe, manifest.text, tokenizer_json, captioner)
    print(
        f"{manifest.name}@{manifest.version} is a run in {out_dir}; its golden captions score as "
        f"the bundle says\nlearn on from it with start={out_dir}"
    )


def convert(checkpoint: Checkpoint) -> Captioner:
    """Returns our captioner with a checkpoint's weights, in evaluation mode.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or has no place.
    """
    tables, pixels, text = checkpoint.tables, checkpoint.pixels, checkpoint.text
    captioner = Captioner(
        encoder={**tables.encoder, "mean": pixels.mean, "std": pixels.std},
        bridge=tables.bridge,
        decoder={**tables.decoder, "max_length": text.max_length, "dropout": 0.0},
        image=pixels.image,
        text=text,
    )
    found = checkpoint.family.tensors(checkpoint.model)
    captioner.encoder.load(checkpoint.folder, found.vision)
    captioner.bridge.load_state_dict(found.bridge)
    captioner.decoder.model.load_state_dict(found.decoder)
    return captioner.eval()


def _pictures(spec: ImageSpec) -> NDArray[np.uint8]:
    """Returns drawings and noise, (n, H, W, 3): images without much in common."""
    drawn = []
    for body in drawings().values():
        with Image.open(io.BytesIO(body)) as image:
            drawn.append(preprocess(image, spec))
    shape = (_NOISE, spec.height, spec.width, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return np.concatenate([np.stack(drawn), noise])


@torch.no_grad()
def _difference(captioner: Captioner, checkpoint: Checkpoint, pixels: NDArray[np.uint8]) -> float:
    """Returns the largest difference of log-probabilities, over images and random tokens.

    Raises:
        ParityError: it is one that a user could see.
    """
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    draw = torch.Generator().manual_seed(0)
    shape = (len(images), min(_TOKENS, captioner.text.max_length))
    token_ids = torch.randint(captioner.text.vocab_size, shape, generator=draw)
    token_ids[:, 0] = captioner.text.bos_id
    ours = captioner(images, token_ids).log_softmax(-1)
    normalised = captioner.encoder.normalise(images)
    theirs = checkpoint.family.logits(checkpoint.model, normalised, token_ids).log_softmax(-1)
    difference = float((ours - theirs).abs().max())
    if not difference <= LOG_PROB_TOLERANCE:
        raise ParityError(
            f"{checkpoint.folder}: our captioner differs from that of transformers by "
            f"{difference:.2g} in log-probabilities: something in its config.json is not known here"
        )
    return difference


def _description(config: Config, family: str) -> str:
    return config.description or f"{family} of transformers, from {config.folder.resolve().name}"


def _card(
    config: Config, family: str, difference: float, parity: Parity, generation: Generation
) -> str:
    template = resources.files("trainer").joinpath("imported_card.md").read_text("utf-8")
    return Template(template).substitute(
        name=config.name,
        description=_description(config, family),
        licence=config.licence,
        family=family,
        folder=config.folder.resolve().name,
        difference=f"{difference:.1e}",
        parity=parity,
        decoding=", ".join(f"{k} {v}" for k, v in generation.model_dump().items()),
    )
