"""The manifest: what stands in a bundle, what its graphs are called and take, and who made it."""

import math
import re
from typing import Annotated, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from exports.errors import BundleError
from exports.images import ImageSpec
from exports.text import TextSpec

MANIFEST_FILE = "manifest.json"
JOIN_FILE = "join.onnx"
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
VERSION_PATTERN = re.compile(r"[0-9][A-Za-z0-9._-]{0,63}")
Evidence = Literal["itm", "clip"]
"""What tells whether a caption fits its image: the matcher's classifier, or nearness."""
Rerank = Literal["none", "itm", "clip"]
Dtype = Literal["float32", "float16"]
_SMALLEST_MATCH = 1e-9
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_FILE_PATTERN = re.compile(rf"{_PART}(/{_PART})*")


def check_name(name: str) -> str:
    """Returns a model's name as it is, or raises ValueError."""
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(
            f"{name!r} is no model name: up to 64 of a-z 0-9 . _ -, a letter or digit first"
        )
    return name


def check_version(version: str) -> str:
    """Returns a version as it is, or raises ValueError. A digit comes first, so no alias fits."""
    if not VERSION_PATTERN.fullmatch(version):
        raise ValueError(
            f"{version!r} is no version: up to 64 of A-Z a-z 0-9 . _ -, a digit first, as in 3"
        )
    return version


def _check_file(name: str) -> str:
    if not _FILE_PATTERN.fullmatch(name) or name == MANIFEST_FILE:
        raise ValueError(f"{name!r} is no name for a file of a bundle")
    return name


FileName = Annotated[str, AfterValidator(_check_file)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderSpec(_Strict):
    """The encoder graph: uint8 images (B, H, W, 3) to the decoder's memory.

    Each output is (B, ...); `outputs` names them in the graph's order, with the image's embedding
    where there is a matcher.
    """

    file: FileName = "encoder.onnx"
    input: str = "images"
    outputs: tuple[str, ...] = Field(min_length=1)


class DecoderSpec(_Strict):
    """The decode-step graph, with its tensors by name.

    `cache` names keys and values by turns: k.0 v.0 k.1 v.1 ...; `heads` and `head_dim` are its own.
    What a graph changes in place goes in as `name` and comes out as `next_name(name)`. `dtype` is
    that of `memory` and `cache`, in whichever graph they stand; all other floats are float32.
    """

    file: FileName = "decoder.onnx"
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    memory: tuple[str, ...] = Field(min_length=1)
    cache: tuple[str, ...]
    dtype: Dtype = "float32"

    @model_validator(mode="after")
    def _two_caches_a_layer(self) -> "DecoderSpec":
        if len(self.cache) != 2 * self.layers:
            raise ValueError(
                f"cache names {len(self.cache)} tensors, but {self.layers} layers have "
                f"{2 * self.layers}: a key and a value each"
            )
        return self


class Reranking(_Strict):
    """How what a matcher says of captions weighs against what the search says.

    The captions of an image are sorted by

        itm    w * score + (1 - w) * log(match)
        clip   w * score + (1 - w) * similarity / temperature

    where `score` is the search's own, log_prob / tokens ** length_penalty. All three terms are
    log-probabilities, the last up to a constant of the image (its softmax over captions), so this
    is a product of two experts, and w = 1 is the search alone. `itm_weight` and `clip_weight` are
    the w of each.
    """

    temperature: float = Field(gt=0, allow_inf_nan=False)
    itm_weight: float = Field(default=0.5, ge=0, le=1)
    clip_weight: float = Field(default=0.5, ge=0, le=1)

    def rank(self, evidence: Evidence, score: float, match: float, similarity: float) -> float:
        """Returns what captions are sorted by, the highest first.

        Args:
            evidence: `itm` or `clip`.
            score: the search's.
            match: the graph's, a probability; taken for 1e-9 where it is less.
            similarity: the graph's, a cosine.
        """
        weight = self.weight(evidence)
        itm = evidence == "itm"
        other = math.log(max(match, _SMALLEST_MATCH)) if itm else similarity / self.temperature
        return weight * score + (1 - weight) * other

    def weight(self, evidence: Evidence) -> float:
        """Returns the search's share in the rank."""
        return self.itm_weight if evidence == "itm" else self.clip_weight


class MatcherSpec(_Strict):
    """The matcher graph: captions and encoded images to how well they fit.

    `memory` names the encoder's outputs that it reads a caption with, `image_embedding` the one
    that no other graph takes.
    """

    file: FileName = "matcher.onnx"
    memory: tuple[str, ...] = Field(min_length=1)
    image_embedding: str = "image_embedding"
    reranking: Reranking


def next_name(name: str) -> str:
    """Returns the name of the output that is an input after the step, in the same memory."""
    return f"{name}.next"


def encoded_name(name: str) -> str:
    """Returns the name under which the join graph takes an output of the encoder."""
    return f"encoded_{name}"


class Generation(_Strict):
    """How captions are searched for: beam search, with transformers' names and meanings."""

    num_beams: int = Field(default=4, ge=1)
    num_captions: int = Field(default=1, ge=1)
    max_new_tokens: int = Field(default=24, ge=1)
    min_new_tokens: int = Field(default=1, ge=0)
    length_penalty: float = Field(default=1.0, allow_inf_nan=False)
    no_repeat_ngram_size: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _is_possible(self) -> "Generation":
        if self.num_captions > self.num_beams:
            raise ValueError(f"num_captions {self.num_captions} exceeds num_beams {self.num_beams}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {self.max_new_tokens}"
            )
        return self


class Golden(_Strict):
    """A picture of the bundle and the best caption that the bundle must give it by its defaults.

    `match` and `similarity` are what the matcher must say of the two, if the bundle has one.
    """

    image: FileName
    token_ids: tuple[int, ...]
    text: str
    score: float
    match: float | None = None
    similarity: float | None = None


class FileEntry(_Strict):
    """The sha256 of a file, in lower-case hexadecimal, and its size in bytes."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Manifest(_Strict):
    """Everything that a reader of a bundle may rely on.

    `files` lists every file of the bundle but the manifest itself; it is empty until the bundle is
    written. `metrics` and `provenance` are free JSON: figures with their intervals, and the
    resolved recipe, data, base weights and parity report.

    `prompt_ids` stand between bos and whatever is written. A prefix that is asked for comes after
    them. They are no part of a caption: neither its text nor its ids have them, no score counts
    them, and a matcher does not read them.
    """

    schema_version: Literal[2] = 2
    name: Annotated[str, AfterValidator(check_name)]
    version: Annotated[str, AfterValidator(check_version)]
    created: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)$")
    description: str
    licence: str
    image: ImageSpec
    text: TextSpec
    encoder: EncoderSpec
    decoder: DecoderSpec
    matcher: MatcherSpec | None = None
    join_file: FileName = JOIN_FILE
    tokenizer_file: FileName = "tokenizer.json"
    prompt_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    defaults: Generation = Generation()
    golden: tuple[Golden, ...] = ()
    metrics: dict[str, JsonValue] = {}
    provenance: dict[str, JsonValue] = {}
    files: dict[FileName, FileEntry] = {}

    @model_validator(mode="after")
    def _graphs_fit(self) -> "Manifest":
        memory, encoded = set(self.decoder.memory), set(self.encoder.outputs)
        if self.matcher is None:
            if encoded != memory:
                raise ValueError("encoder.outputs and decoder.memory name different tensors")
            return self
        if self.matcher.image_embedding in memory:
            raise ValueError("matcher.image_embedding must not be one of decoder.memory")
        if encoded != memory | {self.matcher.image_embedding}:
            raise ValueError(
                "encoder.outputs must be decoder.memory and matcher.image_embedding, no more"
            )
        if not memory.issuperset(self.matcher.memory):
            raise ValueError("matcher.memory names tensors that decoder.memory does not")
        return self

    @model_validator(mode="after")
    def _prompt_fits(self) -> "Manifest":
        if max(self.prompt_ids, default=0) >= self.text.vocab_size:
            raise ValueError("prompt_ids has an id outside of text.vocab_size")
        if len(self.prompt_ids) > self.text.max_length - 2:
            raise ValueError(
                f"prompt_ids leave no room for a word in {self.text.max_length} tokens"
            )
        return self

    @property
    def reranks(self) -> tuple[Rerank, ...]:
        """By what the captions of an image may be sorted."""
        return ("none",) if self.matcher is None else get_args(Rerank)

    def required_files(self) -> tuple[str, ...]:
        """Returns the files that the manifest's own fields speak of, without repetition."""
        matcher = () if self.matcher is None else (self.matcher.file,)
        named = (self.encoder.file, self.decoder.file, *matcher, self.join_file)
        pictures = (golden.image for golden in self.golden)
        return tuple(dict.fromkeys((*named, self.tokenizer_file, *pictures)))

    def to_json(self) -> bytes:
        """Returns the manifest as the bytes of manifest.json."""
        return self.model_dump_json(indent=2).encode() + b"\n"

    @classmethod
    def from_json(cls, body: bytes) -> "Manifest":
        """Reads manifest.json.

        Raises:
            BundleError: Not JSON, a missing, misspelt or wrong field; the message names the first.
        """
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole file"
            raise BundleError(f"{MANIFEST_FILE}: {where}: {first['msg']}") from error
