"""What may be asked of a captioner, and what it answers."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from exports.manifest import Generation, Manifest, Rerank
from exports.text import Tokenizer
from serving.candidates import MAX_BEAMS
from serving.errors import CaptionFailed, ParameterError
from serving.group import BeamParams
from serving.limits import MAX_LENGTH_PENALTY


@dataclass(frozen=True, slots=True)
class Params:
    """How one image is captioned: the fields of `Generation`, words to begin with, the order."""

    num_beams: int
    num_captions: int
    max_new_tokens: int
    min_new_tokens: int
    length_penalty: float
    no_repeat_ngram_size: int
    prefix: str = ""
    rerank: Rerank = "none"

    @classmethod
    def of(cls, defaults: Generation, **chosen: Any) -> "Params":
        """Returns a bundle's defaults, but for the fields that are chosen."""
        return cls(**{**defaults.model_dump(), **chosen})


class Seen(NamedTuple):
    """What an operator may want to know of an image, once it is captioned.

    `distance` is that of its features from the training images', `is_strange` whether almost all of
    them are nearer; None where the bundle cannot tell. `match_s` are the seconds of reranking.
    """

    distance: float | None = None
    is_strange: bool = False
    match_s: float = 0.0


NOT_SEEN = Seen()


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption, as `Hypothesis` says, with its text, and what it was reranked by, if it was."""

    text: str
    score: float
    log_prob: float
    tokens: int
    token_ids: tuple[int, ...]
    match: float | None = None
    similarity: float | None = None
    seen: Seen = field(default=NOT_SEEN, compare=False)


Result = list[Caption] | CaptionFailed


def beam_params(params: Params, manifest: Manifest, tokenizer: Tokenizer) -> BeamParams:
    """Returns how a bundle's decoder is searched by `params`, its prompt before their prefix.

    Raises:
        ParameterError: The bundle cannot be searched like that.
    """
    text, prompt = manifest.text, manifest.prompt_ids
    prefix_ids = tuple(tokenizer.prefix_ids(params.prefix))
    writes = text.max_length - 1 - len(prompt)
    room = writes - len(prefix_ids)
    widest = min(text.vocab_size, MAX_BEAMS)
    _require(1 <= params.num_beams <= widest, "num_beams", f"1 to {widest}")
    _require(
        1 <= params.num_captions <= params.num_beams,
        "num_captions",
        f"1 to num_beams, here {params.num_beams}",
    )
    _require(params.max_new_tokens >= 1, "max_new_tokens", "1 or more")
    _require(room >= 1, "prefix", f"shorter: the model writes {writes} tokens")
    longest = min(params.max_new_tokens, room)
    _require(
        0 <= params.min_new_tokens <= longest,
        "min_new_tokens",
        f"0 to {longest}, the longest caption that these parameters allow",
    )
    _require(
        abs(params.length_penalty) <= MAX_LENGTH_PENALTY,
        "length_penalty",
        f"{-MAX_LENGTH_PENALTY:g} to {MAX_LENGTH_PENALTY:g}",
    )
    _require(params.no_repeat_ngram_size >= 0, "no_repeat_ngram_size", "0 or more")
    called = f"{manifest.name}@{manifest.version}"
    reason = "" if manifest.matcher else f", since {called} has no matcher"
    _require(params.rerank in manifest.reranks, "rerank", " or ".join(manifest.reranks) + reason)
    return BeamParams(
        num_beams=params.num_beams,
        # What is reranked is cut afterwards.
        num_captions=params.num_captions if params.rerank == "none" else params.num_beams,
        max_new_tokens=params.max_new_tokens,
        min_new_tokens=params.min_new_tokens,
        length_penalty=params.length_penalty,
        no_repeat_ngram_size=params.no_repeat_ngram_size,
        prefix_ids=(*prompt, *prefix_ids),
    )


def _require(holds: bool, name: str, allowed: str) -> None:
    if not holds:
        raise ParameterError(f"{name} must be {allowed}.")
