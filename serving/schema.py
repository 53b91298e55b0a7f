"""What stands in the requests and answers of the REST interface."""

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, computed_field

from exports.errors import Cause
from exports.manifest import Rerank
from serving.limits import MAX_LENGTH_PENALTY

MAX_BEAMS = 16
MAX_NEW_TOKENS = 256


# The document says so; the doors decode it by themselves.
Base64 = Annotated[str, Field(min_length=1, json_schema_extra={"format": "byte"})]


def _without_defaults(schema: dict[str, Any]) -> None:
    """Drop the defaults from a JSON schema: the real ones stand in the bundle, see /v1/models."""
    for field in schema["properties"].values():
        field.pop("default", None)


class CaptionParameters(BaseModel):
    """What one request may choose; whatever it leaves out comes from the bundle's defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_without_defaults)

    num_beams: int = Field(
        default=4, ge=1, le=MAX_BEAMS, description="Beams kept at each step; 1 is greedy search."
    )
    num_captions: int = Field(
        default=1, ge=1, le=MAX_BEAMS, description="Captions to return, at most `num_beams`."
    )
    max_new_tokens: int = Field(
        default=24, ge=1, le=MAX_NEW_TOKENS, description="Longest caption, in tokens."
    )
    min_new_tokens: int = Field(
        default=1, ge=0, le=MAX_NEW_TOKENS, description="Shortest caption, in tokens."
    )
    length_penalty: float = Field(
        default=1.0,
        ge=-MAX_LENGTH_PENALTY,
        le=MAX_LENGTH_PENALTY,
        allow_inf_nan=False,
        description="score = log_prob / tokens ** length_penalty; above 1 favours long captions.",
    )
    no_repeat_ngram_size: int = Field(
        default=0, ge=0, le=16, description="No run of so many tokens comes twice; 0 allows all."
    )
    rerank: Rerank = Field(
        default="none",
        description="What the captions found are sorted by before the best are returned: `none`, "
        "their own score; `itm`, also how well each fits the image when read together with it; "
        "`clip`, also how near the two are. Needs a bundle with a matcher.",
    )
    prefix: str = Field(
        default="", max_length=500, description="Words that each caption must begin with."
    )
    model: str = Field(
        default="", max_length=200, description="`name` or `name@version`; default: what is served."
    )


def _with_images(schema: dict[str, Any]) -> None:
    """Say that a request has images of at least one of the two kinds."""
    _without_defaults(schema)
    schema["anyOf"] = [
        {"required": [name], "properties": {name: {"minItems": 1}}} for name in ("images", "urls")
    ]


class CaptionRequest(CaptionParameters):
    """The JSON form of a request."""

    model_config = ConfigDict(json_schema_extra=_with_images)

    images: list[Base64] = Field(
        default=[],
        description="Images, each a file's bytes in base64 (RFC 4648, no data: URL).",
    )
    urls: list[str] = Field(
        default=[],
        description="Addresses of images, which come after those of `images`; only where the server"
        " is set to fetch, and from the hosts of its list alone.",
    )


class CaptionAnswer(BaseModel):
    """One caption of an image: what clients read of a `serving.params.Caption`."""

    model_config = ConfigDict(from_attributes=True)

    text: str = Field(examples=["a dog runs through the grass"])
    score: float = Field(description="log_prob / tokens ** length_penalty", examples=[-0.43])
    log_prob: float = Field(
        description="Sum of the natural log-probabilities of the generated tokens.",
        examples=[-3.4],
    )
    tokens: int = Field(description="Generated tokens, the end token included.", examples=[8])
    match: float | None = Field(
        default=None,
        description="With `rerank`: the probability that the caption belongs to the image.",
        examples=[0.93],
    )
    similarity: float | None = Field(
        default=None,
        description="With `rerank`: the cosine of the caption's and the image's embeddings.",
        examples=[0.41],
    )


class ImageAnswer(BaseModel):
    """The captions of one image, best first."""

    captions: list[CaptionAnswer]


class CaptionsAnswer(BaseModel):
    """The answer to `POST /v1/captions`: one result per image, in the order they came."""

    model: str = Field(examples=["cutline-base"])
    version: str = Field(examples=["1"])
    request_id: str
    results: list[ImageAnswer]


class ActiveModel(BaseModel):
    """The bundle that answers now."""

    name: str
    version: str
    created: str
    description: str
    licence: str
    image_height: int
    image_width: int
    vocabulary: int
    max_length: int = Field(description="Positions of the decoder, start and end tokens included.")
    defaults: dict[str, Any] = Field(description="Generation parameters a request may leave out.")
    rerank: list[Rerank] = Field(description="What the parameter `rerank` may be.")
    metrics: dict[str, Any] = Field(description="Figures of the model card.")


class SwapError(BaseModel):
    """Why the bundle that should answer does not."""

    version: str = Field(description="The version that was refused; empty if none was found.")
    cause: Cause = Field(description="The kind of fault, as the metrics name it.")
    reason: str
    at: str = Field(description="UTC time, ISO 8601")


class ShadowAnswer(BaseModel):
    """A candidate that answers along, and how it compares with the version that answers."""

    version: str
    share: float = Field(description="Of the requests, those that the candidate may be asked too.")
    loaded: bool = Field(description="Whether it is asked now.")
    requests: int = Field(description="Requests that both have answered.")
    agreed: int = Field(description="Those with the same first caption.")
    failed: int = Field(description="Those for which the candidate had none; part of `requests`.")
    dropped: int = Field(
        description="Those not asked, or not to the end: live requests came first."
    )
    overlap: float | None = Field(description="Mean F1 of the words of both captions.")
    score: float | None = Field(description="The candidate's mean score.")
    live_score: float | None = Field(description="The mean score of the version that answers.")
    seconds: float | None = Field(description="The candidate's median seconds a request.")
    live_seconds: float | None = Field(
        description="The same of the version that answers, where a request was alone."
    )
    slowdown: float | None = Field(description="`seconds` over `live_seconds`.")
    verdict: str = Field(description="How it ended or would end; empty while that is open.")


class ModelAnswer(BaseModel):
    """One model of this server: what it should serve and what it does."""

    reference: str = Field(description="What this server follows in the registry.")
    desired: str | None = Field(description="The version that the reference names now.")
    loading: bool
    swaps: int = Field(description="Versions put to work since the start.")
    active: ActiveModel | None
    last_error: SwapError | None
    shadow: ShadowAnswer | None


class ListedModel(BaseModel):
    """A model in the words of the OpenAI interface."""

    id: str = Field(description="What `model` may be in a request.", examples=["cutline-base"])
    object: str = Field(default="model", examples=["model"])
    created: int = Field(description="Seconds since 1970, UTC")
    owned_by: str = Field(default="cutline", examples=["cutline"])


class ModelsAnswer(BaseModel):
    """The answer to `GET /v1/models`; `object` and `data` are what OpenAI's clients read."""

    models: list[ModelAnswer]

    @computed_field(examples=["list"])
    def object(self) -> str:
        """The kind of answer."""
        return "list"

    @computed_field
    def data(self) -> list[ListedModel]:
        """The models that answer now."""
        active = (model.active for model in self.models)
        return [ListedModel(id=one.name, created=_seconds(one.created)) for one in active if one]


def _seconds(created: str) -> int:
    """Returns a time in ISO 8601 as seconds since 1970; 0 where it is none."""
    try:
        return int(datetime.fromisoformat(created).timestamp())
    except ValueError:
        return 0


class Health(BaseModel):
    """The answer to the probes."""

    status: str = Field(examples=["ok"])
    model: str | None = None
    version: str | None = None


class Problem(BaseModel):
    """An error, RFC 9457 (`application/problem+json`)."""

    type: str = Field(
        description="Stable name of the kind of error",
        examples=["urn:cutline:problem:undecodable-image"],
    )
    title: str = Field(description="The same for every error of the type")
    status: int = Field(examples=[400])
    detail: str = Field(description="What was wrong with this request")
    request_id: str
