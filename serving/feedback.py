"""`POST /v1/feedback`: what a caption should have said, kept as labels for the trainer.

Off unless the server has a folder for it. The server keeps no photograph of other requests, so one
must come with the correction; the id of the request that it is about is kept as a mere note.
"""

import asyncio
from dataclasses import dataclass
from typing import Any
from unicodedata import category

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.captioning import decoded, ready_captioner, server_of
from serving.decode_image import sniff
from serving.errors import FeedbackOff, NotAnImage, ParameterError
from serving.feedback_store import FeedbackStore, Note
from serving.limits import Take
from serving.openapi import documented, form_or_json
from serving.request import (
    from_base64,
    json_object,
    media_type,
    out_of_range,
    read_form,
    shown,
    whole_body,
)
from serving.schema import Base64
from serving.settings import Settings

_LONGEST = 500  # letters of a caption
_FORM = '{"image": "<base64>", "correction": "..."}'
_SUFFIXES = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif",
}


class FeedbackFields(BaseModel):
    """What is said of one image's caption; a correction, a rating, or both."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    correction: str = Field(
        default="", max_length=_LONGEST, description="What the caption should have said."
    )
    rating: int | None = Field(
        default=None, ge=1, le=5, description="How good the caption was: 1, wrong, to 5, right."
    )
    caption: str = Field(default="", max_length=_LONGEST, description="The caption it is about.")
    request_id: str = Field(
        default="", max_length=128, description="Of the answer that held the caption."
    )
    model: str = Field(
        default="", max_length=200, description="Who gave the caption: `name@version`."
    )


class FeedbackRequest(FeedbackFields):
    """The JSON form of feedback."""

    image: Base64 = Field(description="The image file's bytes in base64 (RFC 4648, no data: URL).")


class FeedbackAnswer(BaseModel):
    """Where feedback was kept."""

    image: str = Field(description="The name that the photograph has in the folder.")
    revision: int = Field(description="How many times this photograph has had feedback.")
    request_id: str


@dataclass(frozen=True, slots=True)
class _Feedback:
    image: bytes
    fields: FeedbackFields


router = APIRouter()


@router.post(
    "/v1/feedback",
    tags=["captions"],
    summary="Correct a caption",
    status_code=201,
    response_model=FeedbackAnswer,
    responses=documented(400, 404, 408, 413, 415, 422, 429, 500, 503, 507),
    openapi_extra=form_or_json(FeedbackFields, FeedbackRequest),
)
async def post_feedback(request: Request) -> Response:
    """Keeps a correction or a rating, and the photograph that it is about, on the server's disk.

    Send the photograph along, as multipart/form-data or JSON: the server keeps none of those it
    captions. Answers 404 on a server that takes no feedback, which is the default.
    """
    server = server_of(request)
    store = server.feedback
    if store is None:
        raise FeedbackOff("This server keeps no feedback; its operator has to set feedback_dir.")
    captioner = ready_captioner(server)
    with server.held_bytes.share() as take_bytes, store.waiting.share() as take_place:
        feedback = await _read(request, server.settings, take_bytes)
        take_place(1)
        await decoded(server, captioner, feedback.image)  # what a trainer cannot read is no label
        loop = asyncio.get_running_loop()
        name, revision = await loop.run_in_executor(store.thread, _keep, store, feedback)
    answer = FeedbackAnswer(image=name, revision=revision, request_id=request.state.request_id)
    return Response(answer.model_dump_json(), status_code=201, media_type="application/json")


async def _read(request: Request, settings: Settings, take: Take) -> _Feedback:
    kind = media_type(request)
    if kind == "application/json":
        return await asyncio.to_thread(_from_json, await whole_body(request, settings, take))
    if kind == "multipart/form-data":
        images, fields = await read_form(request, settings, take)
        if len(images) != 1:
            raise _one_image(len(images))
        return _Feedback(images[0], _checked(fields))
    found = shown(kind) if kind else "no Content-Type"
    raise NotAnImage(
        f"Feedback must be multipart/form-data or application/json; this one has {found}."
    )


def _from_json(body: bytes) -> _Feedback:
    fields = json_object(body, _FORM)
    image = fields.pop("image", None)
    if not isinstance(image, str):
        raise _one_image(0)
    return _Feedback(from_base64(image, "image"), _checked(fields, strict=True))


def _one_image(found: int) -> ParameterError:
    return ParameterError(
        f"Feedback needs the photograph itself, as image; here are {found}. The server keeps none "
        "of those it captions, so a request_id alone does not find it."
    )


def _checked(fields: dict[str, Any], *, strict: bool = False) -> FeedbackFields:
    try:
        given = FeedbackFields.model_validate(fields, strict=strict)
    except ValidationError as error:
        raise out_of_range(error) from error
    texts = {name: _cleaned(text) for name, text in given if isinstance(text, str)}
    cleaned = given.model_copy(update=texts)
    if not cleaned.correction and cleaned.rating is None:
        raise ParameterError("Feedback needs a correction or a rating; this one has neither.")
    return cleaned


def _cleaned(text: str) -> str:
    """Returns a text in one line, without control characters and needless blanks."""
    kept = (letter for letter in text if letter.isspace() or category(letter) != "Cc")
    return " ".join("".join(kept).split())


def _keep(store: FeedbackStore, feedback: _Feedback) -> tuple[str, int]:
    suffix = _SUFFIXES[sniff(feedback.image) or ""]
    return store.add(feedback.image, suffix, Note(**feedback.fields.model_dump()))
