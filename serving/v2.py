"""The Open Inference Protocol, version 2 (`/v2/...`): what KServe and Triton clients speak."""

import asyncio
from dataclasses import dataclass
from importlib.metadata import version as version_of

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from serving.captioner import Captioner
from serving.captioning import answered, check_model, ready_captioner, server_of
from serving.dialects import InferenceError
from serving.errors import MalformedRequest, ParameterError
from serving.limits import Take
from serving.openapi import documented, json_body
from serving.request import CaptionCall, parameters_of, whole_body
from serving.settings import Settings
from serving.tensors import (
    BINARY_OUTPUT,
    INPUTS,
    JSON_LENGTH,
    OUTPUTS,
    InferAnswer,
    InferRequest,
    TensorSpec,
    Wanted,
    read_infer,
    write_infer,
)

_CODES = (400, 404, 408, 413, 415, 422, 429, 500, 503, 504)


class ServerMetadata(BaseModel):
    """What this server is."""

    name: str = "cutline"
    version: str
    extensions: list[str] = ["binary_tensor_data"]


class ServerLive(BaseModel):
    """The server runs."""

    live: bool = True


class ServerReady(BaseModel):
    """A model answers."""

    ready: bool = True


class ModelReady(BaseModel):
    """This model answers."""

    name: str
    ready: bool = True


class ModelMetadata(BaseModel):
    """The tensors of a model."""

    name: str
    versions: list[str]
    platform: str = "onnxruntime_onnx"
    inputs: list[TensorSpec] = Field(description="One image file for each element.")
    outputs: list[TensorSpec] = Field(description="[images, captions of each], best first.")


@dataclass(frozen=True, slots=True)
class InferCall(CaptionCall):
    """A call, and what its answer shall hold."""

    wanted: Wanted


router = APIRouter(tags=["other protocols"])


def _errors(*codes: int) -> dict[int | str, dict[str, object]]:
    return documented(*codes, model=InferenceError, media_type="application/json")


@router.get("/v2", summary="What is this server? (Open Inference Protocol)")
async def get_server() -> ServerMetadata:
    """Returns name, version and extensions."""
    return ServerMetadata(version=version_of("cutline"))


@router.get("/v2/health/live", summary="Is the process alive? (Open Inference Protocol)")
async def get_live() -> ServerLive:
    """Returns true as long as the process answers at all."""
    return ServerLive()


@router.get(
    "/v2/health/ready",
    summary="Can it caption? (Open Inference Protocol)",
    responses=_errors(503),
)
async def get_server_ready(request: Request) -> ServerReady:
    """Returns true once a bundle has given the captions that it promises."""
    ready_captioner(server_of(request))
    return ServerReady()


@router.get("/v2/models/{model}", summary="A model's tensors", responses=_errors(404, 503))
async def get_model(request: Request, model: str) -> ModelMetadata:
    """Returns what the model takes and gives."""
    return _metadata(_captioner(request, model))


@router.get(
    "/v2/models/{model}/versions/{version}",
    summary="A model version's tensors",
    responses=_errors(404, 503),
)
async def get_model_version(request: Request, model: str, version: str) -> ModelMetadata:
    """Returns what the model takes and gives."""
    return _metadata(_captioner(request, f"{model}@{version}"))


@router.get(
    "/v2/models/{model}/ready", summary="Does this model answer?", responses=_errors(404, 503)
)
async def get_model_ready(request: Request, model: str) -> ModelReady:
    """Returns true if it is the one that is served."""
    return ModelReady(name=_captioner(request, model).name)


@router.get(
    "/v2/models/{model}/versions/{version}/ready",
    summary="Does this model version answer?",
    responses=_errors(404, 503),
)
async def get_model_version_ready(request: Request, model: str, version: str) -> ModelReady:
    """Returns true if it is the one that is served."""
    return ModelReady(name=_captioner(request, f"{model}@{version}").name)


@router.post(
    "/v2/models/{model}/infer",
    summary="Caption images (Open Inference Protocol)",
    response_model=InferAnswer,
    responses=_errors(*_CODES),
    openapi_extra=json_body(InferRequest),
)
async def post_infer(request: Request, model: str) -> Response:
    """Returns captions and scores of one or more images.

    Tensors may stand in the JSON or, as bytes, behind it, both ways.
    """
    return await _infer(request, model)


@router.post(
    "/v2/models/{model}/versions/{version}/infer",
    summary="Caption images by one version (Open Inference Protocol)",
    response_model=InferAnswer,
    responses=_errors(*_CODES),
    openapi_extra=json_body(InferRequest),
)
async def post_infer_version(request: Request, model: str, version: str) -> Response:
    """Returns captions and scores of one or more images, if this version is served."""
    return await _infer(request, f"{model}@{version}")


def _captioner(request: Request, reference: str) -> Captioner:
    captioner = ready_captioner(server_of(request))
    check_model(reference, captioner)
    return captioner


def _metadata(captioner: Captioner) -> ModelMetadata:
    return ModelMetadata(
        name=captioner.name, versions=[captioner.version], inputs=INPUTS, outputs=OUTPUTS
    )


async def _infer(request: Request, reference: str) -> Response:
    _captioner(request, reference)  # before the body: a wrong name need not cost an upload

    async def read(request: Request, settings: Settings, take: Take) -> InferCall:
        if request.headers.get("content-encoding", "identity") != "identity":
            raise MalformedRequest("Compressed bodies are not read here; leave Content-Encoding.")
        body = await whole_body(request, settings, take)
        json_length = request.headers.get(JSON_LENGTH)
        return await asyncio.to_thread(_call, body, json_length, reference, settings.max_images)

    captioner, call, results = await answered(request, read)
    body, headers = write_infer((captioner.name, captioner.version), call.wanted, results)
    return Response(body, headers=headers)


def _call(body: bytes, json_length: str | None, reference: str, max_images: int) -> InferCall:
    images, given, wanted = read_infer(body, json_length)
    if "model" in given:
        raise ParameterError("The address names the model; leave out the parameter model.")
    if not 1 <= len(images) <= max_images:
        raise ParameterError(
            f"A request holds 1 to {max_images} images; this one has {len(images)}."
        )
    parameters = parameters_of({}, {**given, "model": reference}, strict=True, beside=BINARY_OUTPUT)
    return InferCall(images, parameters, wanted)
