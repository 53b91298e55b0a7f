"""Language models of `transformers` as a start: their sizes, their tokenizer, their weights."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from logging import CRITICAL
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.utils import logging

from exports.text import TextSpec
from trainer.decoders._decoder import DecoderConfig
from trainer.errors import CheckpointError, ConfigError, DataError

M = TypeVar("M", bound=nn.Module)


def configured(
    made: Any, config: DecoderConfig, *, scratch: dict[str, Any], always: dict[str, Any]
) -> Any:
    """Returns a family's configuration: a checkpoint's where the recipe has one.

    Args:
        made: the family's class.
        config: the recipe's table.
        scratch: what it is told where there is no checkpoint.
        always: what it is told in any case.

    Raises:
        ConfigError: the checkpoint is of another family.
        CheckpointError: it cannot be read.
    """
    architecture = config.architecture
    if architecture is None and config.weights:
        architecture = read_architecture(config.weights)
    if architecture is None:
        return made(**scratch, **always)
    family = architecture.get("model_type")
    if family != made.model_type:
        raise ConfigError(
            f"{config.weights or 'architecture'}: a checkpoint of {family!r}, but the decoder is "
            f"{made.model_type!r}; name the decoder of that family (gpt2, bart, t5 or llama), or "
            "another checkpoint"
        )
    return made.from_dict({**architecture, **always})


def read_architecture(source: str) -> dict[str, Any]:
    """Returns a checkpoint's `config.json`.

    Raises:
        CheckpointError: there is none.
    """
    try:
        found, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: {_first_line(error)}") from error
    if "model_type" not in found:
        raise CheckpointError(
            f"{source}: no checkpoint of transformers (config.json is missing or names no "
            "model_type); give the folder that `save_pretrained` wrote, or a name on the hub"
        )
    return dict(found)


def read_text(
    source: str, captions: Iterable[str], *, max_length: int
) -> tuple[bytes, TextSpec, dict[str, Any]]:
    """Returns a checkpoint's `tokenizer.json`, its special ids, and its `config.json`.

    Captions begin with the id that the checkpoint's own decoder begins with: T5 and BART name it,
    language models begin with their start token, GPT-2 with the end token, which is its only one.

    Args:
        source: the folder or the name on the hub.
        captions: to be spelt with it.
        max_length: the longest caption in tokens, start and end included.

    Raises:
        CheckpointError: no tokenizer.
        ConfigError: it has no end token, or more tokens than the checkpoint embeds.
        DataError: it cannot spell a caption.
    """
    architecture = read_architecture(source)
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            backend = tokenizer.backend_tokenizer
        except Exception as error:  # of whatever kind: many libraries read tokenizers
            raise CheckpointError(
                f"{source}: no tokenizer that can be a tokenizer.json ({_first_line(error)}); "
                "save it beside the weights with tokenizer.save_pretrained"
            ) from error
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError(
            f"{source}: the tokenizer has no end token, so captions would never end; set its "
            "eos_token and save it again"
        )
    largest = max(backend.get_vocab(with_added_tokens=True).values())
    embedded = int(architecture.get("vocab_size") or len(tokenizer))
    if largest >= embedded:
        raise ConfigError(
            f"{source}: the tokenizer has the id {largest}, but the model embeds {embedded} "
            "tokens; save the tokenizer of these weights beside them"
        )
    _check_spelling(source, backend, tokenizer.unk_token_id, captions)
    starts = (architecture.get("decoder_start_token_id"), tokenizer.bos_token_id, end)
    text = TextSpec(
        vocab_size=embedded,
        bos_id=next(start for start in starts if start is not None),
        eos_id=end,
        pad_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        max_length=max_length,
    )
    return backend.to_str().encode(), text, architecture


def _check_spelling(
    source: str, backend: Any, unknown: int | None, captions: Iterable[str]
) -> None:
    for caption in captions:
        encoding = backend.encode(caption, add_special_tokens=False)
        if caption.strip() and not encoding.ids:
            raise DataError(f"{source}: the tokenizer has no token for the caption {caption!r}")
        if unknown in encoding.ids:
            start, end = encoding.offsets[encoding.ids.index(unknown)]
            raise DataError(
                f"{source}: the tokenizer cannot spell {caption[start:end]!r} in the caption "
                f"{caption!r}; leave such captions out, or choose a checkpoint of their language"
            )


def load(
    made: type[M],
    source: str,
    config: PreTrainedConfig,
    *,
    new: Sequence[str],
    ignored: tuple[str, ...] = (),
) -> M:
    """Returns a checkpoint's model, and prints what was loaded and what was not.

    Args:
        made: its class.
        source: the folder or the name on the hub.
        config: as it shall be built.
        new: parts of names of what no checkpoint has; it begins at random.
        ignored: how names of what is not used begin.

    Raises:
        CheckpointError: no weights there, tensors are missing, or of another shape.
    """
    with quiet():
        try:
            model, report = made.from_pretrained(  # type: ignore[attr-defined]
                source,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # of whatever kind: several libraries read weights
            raise CheckpointError(f"{source}: {_first_line(error)}") from error
    wanted = [name for name in model.state_dict() if not name.startswith(ignored)]
    lacking = sorted(set(report["missing_keys"]) & set(wanted))
    begun = [name for name in lacking if any(part in name for part in new)]
    missing = [name for name in lacking if name not in begun]
    misshapen = [
        f"{name}: found {tuple(found)}, the model needs {tuple(needed)}"
        for name, found, needed in sorted(report["mismatched_keys"])
    ]
    problems = [
        f"{len(names)} of {len(wanted)} tensors {what} (first {names[0]})"
        for what, names in (("missing", missing), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source}: {'; '.join(problems)}: these are weights of another architecture than "
            "its config.json says"
        )
    unused = sorted(report["unexpected_keys"])
    told = [
        f"{what}: {len(names)} (first {names[0]})"
        for what, names in (("new", begun), ("not needed", unused))
        if names
    ]
    loaded = f"loaded {len(wanted) - len(begun)} of {len(wanted)} tensors"
    print(f"{source}: {'; '.join([loaded, *told])}")
    return model


def check_sizes(config: DecoderConfig, text: TextSpec, vocabulary: int, positions: int) -> None:
    """Raises ConfigError where embeddings do not hold the tokenizer's ids or the positions.

    Args:
        config: the recipe's table.
        text: the tokenizer's.
        vocabulary: tokens embedded.
        positions: left for text.
    """
    what = config.weights or "the checkpoint"
    if text.vocab_size != vocabulary:
        raise ConfigError(
            f"{what} embeds {vocabulary} tokens, but the tokenizer has {text.vocab_size}; use the "
            "tokenizer of the checkpoint"
        )
    if config.max_length > positions:
        raise ConfigError(
            f"max_length = {config.max_length}, but {what} has {positions} positions for text; "
            "set it lower"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps `transformers` from telling of what is told in a line here."""
    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
