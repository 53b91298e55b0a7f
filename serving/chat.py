"""`POST /v1/chat/completions`: OpenAI's words for an image and a caption.

A captioner reads no instructions. What a conversation says in text is passed over; what counts is
the last image in it. A caption is known when the search ends, so a stream sends it in words then.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.captioner import Captioner
from serving.captioning import answered
from serving.dialects import OpenAIError
from serving.errors import MalformedRequest, ParameterError
from serving.limits import Take
from serving.openapi import documented, json_body
from serving.params import Caption, Params
from serving.request import (
    CaptionCall,
    from_base64,
    json_object,
    out_of_range,
    parameters_of,
    shown,
    whole_body,
)
from serving.schema import MAX_BEAMS, MAX_NEW_TOKENS, CaptionParameters
from serving.settings import Settings

_FORM = '{"model": "...", "messages": [...]}'
# Those of ours that OpenAI's interface has no word for.
_OURS = frozenset(CaptionParameters.model_fields) - {"num_captions", "max_new_tokens"}
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ImageUrl(BaseModel):
    """Where an image stands."""

    url: str = Field(description="`data:<type>;base64,<the file's bytes>`; no address is fetched.")


class Part(BaseModel):
    """A part of a message."""

    type: str = Field(description="`image_url`, or `text`, which is passed over.")
    image_url: ImageUrl | None = None


class Message(BaseModel):
    """One message of a conversation."""

    role: str
    content: str | list[Part] | None = None


class StreamOptions(BaseModel):
    """What a stream holds beside the caption."""

    include_usage: bool | None = None


class ResponseFormat(BaseModel):
    """What the answer must look like."""

    type: str = "text"


class ChatRequest(BaseModel):
    """A conversation, as OpenAI's interface has it, and what a captioner can do about it.

    Other fields of that interface, `temperature` among them, change nothing: the search for the
    best captions draws no lots.
    """

    model_config = ConfigDict(frozen=True)

    messages: list[Message] = Field(min_length=1, description="The last image in them counts.")
    model: str | None = Field(
        default=None,
        max_length=200,
        description="`name` or `name@version`; default: what is served.",
    )
    n: int | None = Field(default=None, ge=1, le=MAX_BEAMS, description="Captions, best first.")
    max_completion_tokens: int | None = Field(
        default=None, ge=1, description="Longest caption, in tokens; the model may end earlier."
    )
    max_tokens: int | None = Field(default=None, ge=1, description="The same, by its older name.")
    stream: bool | None = Field(default=None, description="Whether to answer by events.")
    stream_options: StreamOptions | None = None
    logprobs: bool | None = Field(default=None, description="Must not be true.")
    response_format: ResponseFormat | None = Field(default=None, description="Only `text`.")
    stop: str | list[str] | None = Field(default=None, description="Must be empty.")
    tools: list[Any] | None = Field(default=None, description="Must be empty.")


@dataclass(frozen=True, slots=True)
class ChatCall(CaptionCall):
    """A call, and what was asked of its answer."""

    asked: ChatRequest


class AnswerMessage(BaseModel):
    """A caption as a message."""

    role: str = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """One caption."""

    index: int
    message: AnswerMessage
    logprobs: None = None
    finish_reason: str = Field(description="`stop`, or `length` where the caption was cut off.")


class Usage(BaseModel):
    """Tokens of the text; an image is not counted in tokens."""

    prompt_tokens: int = Field(description="Of `prefix`: nothing else of the prompt is read.")
    completion_tokens: int = Field(description="Generated, of all captions returned.")
    total_tokens: int


class Completion(BaseModel):
    """The captions, best first."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


router = APIRouter()


@router.post(
    "/v1/chat/completions",
    tags=["other protocols"],
    summary="Caption an image in a conversation (OpenAI's interface)",
    response_model=Completion,
    responses=documented(
        *(400, 404, 408, 413, 415, 422, 429, 500, 503, 504),
        model=OpenAIError,
        media_type="application/json",
    ),
    openapi_extra=json_body(ChatRequest),
)
async def post_chat(request: Request) -> Response:
    """Returns captions of the last image in a conversation, whatever its text says."""
    captioner, call, [captions] = await answered(request, read_chat, _params)
    completion = _completion(captioner, captions, request.state.request_id)
    if not call.asked.stream:
        return Response(completion.model_dump_json(), media_type="application/json")
    options = call.asked.stream_options
    usage = bool(options and options.include_usage)
    return StreamingResponse(
        _events(completion, usage=usage),
        media_type="text/event-stream",
        headers=_STREAM_HEADERS,
    )


async def read_chat(request: Request, settings: Settings, take: Take) -> ChatCall:
    """Reads a conversation; see `read_call` for what it raises."""
    return await asyncio.to_thread(_from_body, await whole_body(request, settings, take))


def _from_body(body: bytes) -> ChatCall:
    fields = json_object(body, _FORM)
    try:
        asked = ChatRequest.model_validate(fields, strict=True)
    except ValidationError as error:
        raise out_of_range(error) from error
    _refuse_what_cannot_be(asked)
    ours = {name: fields[name] for name in _OURS & fields.keys() if fields[name] is not None}
    return ChatCall([_last_image(asked.messages)], parameters_of({}, ours, strict=True), asked)


def _refuse_what_cannot_be(asked: ChatRequest) -> None:
    """Raises ParameterError for what would change the answer's meaning, were it passed over."""
    wanted = asked.response_format.type if asked.response_format else "text"
    refused = {
        "logprobs": (asked.logprobs, "there are none; /v1/captions gives each caption's"),
        "tools": (asked.tools, "a captioner calls none"),
        "stop": (asked.stop, "a caption ends where the model ends it"),
        "response_format": (wanted != "text", "a caption is plain text"),
    }
    for name, (value, why) in refused.items():
        if value:
            raise ParameterError(f"{name} is not offered here: {why}. Leave it out.")


def _last_image(messages: list[Message]) -> bytes:
    """Returns the bytes of the image in the last message that has one."""
    for message in reversed(messages):
        parts = message.content if isinstance(message.content, list) else []
        for part in parts:
            if part.type not in ("text", "image_url", "refusal"):
                raise ParameterError(f"A part of the type {shown(part.type)} is not read here.")
        urls = [part.image_url for part in parts if part.type == "image_url"]
        if len(urls) > 1:
            raise ParameterError(
                f"A message holds {len(urls)} images; send one a request, or all to /v1/captions."
            )
        if urls:
            return _bytes_of(urls[0])
    raise ParameterError(
        "No message holds an image; its content needs a part "
        '{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,..."}}.'
    )


def _bytes_of(image: ImageUrl | None) -> bytes:
    """Returns the bytes that stand in a `data:` URL (RFC 2397), which must be in base64."""
    if image is None:
        raise ParameterError("image_url must be an object with the key url.")
    scheme, _, rest = image.url.partition(":")
    if scheme.lower() in ("http", "https"):
        raise ParameterError(
            "This address takes no image by URL; put its bytes into the request: "
            "data:image/jpeg;base64,..."
        )
    head, comma, text = rest.partition(",")
    if scheme.lower() != "data" or not comma or not head.lower().endswith(";base64"):
        raise MalformedRequest("url must be data:<type>;base64,<the image's bytes in base64>.")
    return from_base64(text, "The data of url")


def _params(captioner: Captioner, call: ChatCall) -> Params:
    """Returns how to caption: `n` widens the search, and a large `max_tokens` asks for no more."""
    asked, defaults = call.asked, captioner.manifest.defaults
    chosen = call.parameters.model_dump(exclude_unset=True, exclude={"model"})
    captions = asked.n or 1
    chosen["num_captions"] = captions
    chosen.setdefault("num_beams", max(defaults.num_beams, captions))
    longest = asked.max_completion_tokens or asked.max_tokens
    if longest is not None:
        chosen["max_new_tokens"] = min(longest, MAX_NEW_TOKENS)
        chosen.setdefault("min_new_tokens", min(defaults.min_new_tokens, longest))
    return Params.of(defaults, **chosen)


def _completion(captioner: Captioner, captions: list[Caption], request_id: str) -> Completion:
    end = captioner.manifest.text.eos_id
    choices = [
        Choice(
            index=index,
            message=AnswerMessage(content=caption.text),
            finish_reason="stop" if caption.token_ids[-1:] == (end,) else "length",
        )
        for index, caption in enumerate(captions)
    ]
    prompt = len(captions[0].token_ids) - captions[0].tokens  # the words of `prefix`
    generated = sum(caption.tokens for caption in captions)
    return Completion(
        id=f"chatcmpl-{request_id}",
        created=int(time.time()),
        model=f"{captioner.name}@{captioner.version}",
        choices=choices,
        usage=Usage(
            prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated
        ),
    )


def _events(completion: Completion, *, usage: bool) -> Iterator[str]:
    """Yields server-sent events: each caption word by word, its end, what it cost, and `[DONE]`."""
    head = {
        "id": completion.id,
        "object": "chat.completion.chunk",
        "created": completion.created,
        "model": completion.model,
    }

    def event(index: int, delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return _event({**head, "choices": [choice], **({"usage": None} if usage else {})})

    for choice in completion.choices:
        yield event(choice.index, {"role": "assistant", "content": ""})
        for at, word in enumerate(choice.message.content.split(" ")):
            yield event(choice.index, {"content": f" {word}" if at else word})
        yield event(choice.index, {}, choice.finish_reason)
    if usage:
        yield _event({**head, "choices": [], "usage": completion.usage.model_dump()})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
