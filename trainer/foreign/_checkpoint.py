"""What the folder of a captioner of `transformers` holds."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from exports.manifest import Generation
from exports.text import TextSpec
from trainer import variants
from trainer.decoders._pretrained import quiet
from trainer.errors import CheckpointError
from trainer.foreign._pixels import Pixels, pixels_of


class SpecialIds(NamedTuple):
    """What captions begin with, end with, and are filled up with; None where nothing says so."""

    bos: int | None
    eos: int | list[int] | None
    pad: int | None


class Tables(NamedTuple):
    """Of a recipe; those of the encoder without its normalisation."""

    encoder: dict[str, Any]
    bridge: dict[str, Any]
    decoder: dict[str, Any]
    positions: int
    """How many tokens the decoder has places for."""
    side: tuple[int, int]
    """Height and width of the images that the encoder takes."""


class Tensors(NamedTuple):
    """Weights: the vision tower's by its own names, the others by ours."""

    vision: dict[str, Tensor]
    bridge: dict[str, Tensor]
    decoder: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A captioner as `save_pretrained` left it.

    Attributes:
        folder: where it lies.
        family: the file of `trainer.foreign` that knows it.
        model: the captioner, in evaluation mode.
        tokenizer_json: its tokenizer.
        text: its special ids.
        tables: what ours is built from.
        pixels: how its images are prepared.
        generation: how its `generate` searches where it is told nothing.
        config: its `config.json`.
    """

    folder: Path
    family: ModuleType
    model: Any
    tokenizer_json: bytes
    text: TextSpec
    tables: Tables
    pixels: Pixels
    generation: Generation
    config: dict[str, Any]


def read(folder: Path) -> Checkpoint:
    """Returns what a folder holds.

    Raises:
        CheckpointError: it holds no captioner that is known, a file of it is missing or damaged,
            or it is built in a way that our parts are not.
    """
    config = _config(folder)
    family = _family(folder, config)
    with quiet():
        tables = _tables(folder, family)
        model = load_model(folder, family.CLASS)
        tokenizer = load_tokenizer(folder)
        pixels = load_pixels(folder, tables.side)
    backend = tokenizer.backend_tokenizer
    largest = max(backend.get_vocab(with_added_tokens=True).values())
    return Checkpoint(
        folder=folder,
        family=family,
        model=model,
        tokenizer_json=backend.to_str().encode(),
        text=_text(folder, family.special_ids(model), tables, largest),
        tables=tables,
        pixels=pixels,
        generation=_generation(family.generation(model), tables.positions - 1),
        config=config,
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not there, or no JSON; give the folder that save_pretrained wrote"
        ) from error
    return dict(config)


def _family(folder: Path, config: dict[str, Any]) -> ModuleType:
    name = str(config.get("model_type", "")).replace("-", "_")
    known = variants.names("foreign")
    classes = {known_name: str(variants.load("foreign", known_name).CLASS) for known_name in known}
    found = (config.get("architectures") or ["no class"])[0]
    if classes.get(name) != found:
        raise CheckpointError(
            f"{folder}: a checkpoint of {found}; what can be imported is "
            f"{', '.join(classes.values())}"
        )
    return variants.load("foreign", name)


def _tables(folder: Path, family: ModuleType) -> Tables:
    try:
        config = getattr(transformers, family.CLASS).config_class.from_pretrained(folder)
        tables: Tables = family.tables(config)
    except (CheckpointError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return tables


def load_model(folder: str | Path, name: str) -> Any:
    """Returns the model of class `name` in a folder, or of that name on the hub, in evaluation.

    Raises:
        CheckpointError: no weights there, or tensors are missing or of another shape.
    """
    try:
        model, report = getattr(transformers, name).from_pretrained(
            folder, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except Exception as error:  # of whatever kind: several libraries read weights
        line = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder}: {line}") from error
    missing = sorted(report["missing_keys"])
    misshapen = sorted(name for name, *_ in report["mismatched_keys"])
    for names, what in ((missing, "missing"), (misshapen, "of another shape")):
        if names:
            raise CheckpointError(
                f"{folder}: {len(names)} tensors {what} (first {names[0]}): these are weights of "
                "another architecture than its config.json says"
            )
    return model.eval()


def load_tokenizer(folder: str | Path) -> Any:
    """Returns the tokenizer beside a model.

    Raises:
        CheckpointError: there is none that the library `tokenizers` can be.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        _ = tokenizer.backend_tokenizer
    except Exception as error:  # of whatever kind: many libraries read tokenizers
        raise CheckpointError(
            f"{folder}: no tokenizer that can be a tokenizer.json; save it beside the weights "
            "with save_pretrained"
        ) from error
    return tokenizer


def load_pixels(folder: str | Path, side: tuple[int, int]) -> Pixels:
    """Returns how images are prepared for a model.

    Raises:
        CheckpointError: nothing there says so, `exports.images` does not do it, or it gives images
            of another size than `side`, (H, W).
    """
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: preprocessor_config.json is missing or unknown; save the image "
            "processor beside the weights with save_pretrained"
        ) from error
    pixels = pixels_of(processor, f"{folder}: preprocessor_config.json")
    if (pixels.image.height, pixels.image.width) != side:
        raise CheckpointError(
            f"{folder}: images are prepared as {pixels.image.height} x {pixels.image.width}, but "
            f"the model takes {side[0]} x {side[1]}; correct the size in "
            "preprocessor_config.json"
        )
    return pixels


def _text(folder: Path, ids: SpecialIds, tables: Tables, largest: int) -> TextSpec:
    vocabulary = int(tables.decoder["architecture"]["vocab_size"])
    if largest >= vocabulary:
        raise CheckpointError(
            f"{folder}: the tokenizer has the id {largest}, but the model embeds {vocabulary} "
            "tokens; save the tokenizer of these weights beside them"
        )
    eos = ids.eos[0] if isinstance(ids.eos, list) and len(ids.eos) == 1 else ids.eos
    if ids.bos is None or not isinstance(eos, int):
        raise CheckpointError(
            f"{folder}: captions begin with {ids.bos} and end with {ids.eos}, but one id is "
            "needed for each; set them in generation_config.json"
        )
    pad = eos if ids.pad is None else ids.pad
    return TextSpec(
        vocab_size=vocabulary, bos_id=ids.bos, eos_id=eos, pad_id=pad, max_length=tables.positions
    )


def _generation(chosen: Any, most: int) -> Generation:
    """Returns how a `GenerationConfig` searches, and prints what of it has no equal here."""
    # By default 20 tokens in all, of which the first is given.
    longest = min(chosen.max_new_tokens or max((chosen.max_length or 20) - 1, 1), most)
    width = chosen.num_beams or 1
    others = {
        "do_sample": (None, False),
        "early_stopping": (None, False) if width > 1 else (None, False, True),
        "repetition_penalty": (None, 1.0),
        "num_return_sequences": (None, 1),
        "forced_bos_token_id": (None,),
        "forced_eos_token_id": (None,),
        "suppress_tokens": (None,),
        "begin_suppress_tokens": (None,),
        "bad_words_ids": (None,),
    }
    for name, neutral in others.items():
        value = getattr(chosen, name, None)
        if value not in neutral:
            print(f"not taken over: {name} = {value} of generation_config.json")
    shortest = chosen.min_new_tokens or max((chosen.min_length or 0) - 1, 0)
    return Generation(
        num_beams=width,
        max_new_tokens=longest,
        min_new_tokens=min(shortest, longest),
        length_penalty=1.0 if chosen.length_penalty is None else chosen.length_penalty,
        no_repeat_ngram_size=chosen.no_repeat_ngram_size or 0,
    )
