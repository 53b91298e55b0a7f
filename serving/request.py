"""The three forms of a caption request, read from an untrusted connection into one value.

A body is bounded while it streams in: never more than the limit and one chunk of it is held,
whatever `Content-Length` says, and a client that falls silent is let go.
"""

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.types import Receive

from serving.errors import (
    BodyTimeout,
    ImageTooLarge,
    MalformedRequest,
    NotAnImage,
    ParameterError,
)
from serving.fetch import Fetcher
from serving.json_body import read_json
from serving.limits import Take
from serving.schema import CaptionParameters
from serving.settings import Settings

_TYPES = "image/*, multipart/form-data or application/json"
_KNOWN = tuple(CaptionParameters.model_fields)
_CHARSETS = (b"utf-8", b"us-ascii")
_FIELDS = len(_KNOWN) + 8  # of a form, beside its images; other doors have some of their own
_SLICE = 256 * 1024
_REASONS = 5  # of one refusal; the sixth mends nothing that the first five do not


class ClientGone(Exception):
    """The client closed the connection."""


@dataclass(frozen=True, slots=True)
class CaptionCall:
    """A request as the engine needs it: files and the parameters that were given."""

    images: list[bytes]
    parameters: CaptionParameters


async def read_call(request: Request, settings: Settings, take: Take) -> CaptionCall:
    """Reads a request in any of its three forms.

    Args:
        request: Its body has not been read.
        settings: Bound the body.
        take: Is told of the bytes of each part as it comes, and raises QueueFull.

    Raises:
        QueueFull: The server holds too many bytes of bodies.
        NotAnImage: The body's type is none of the three.
        MalformedRequest: The body is empty, or not what its type says.
        ImageTooLarge: The body has too many bytes.
        BodyTimeout: The body stalls.
        ParameterError: A parameter is unknown, given twice or out of range, or no image is there,
            or one is at an address that may not be fetched.
        FetchFailed: An image could not be fetched.
        ClientGone: The client closed the connection.
    """
    kind = media_type(request)
    query = _once(request.query_params.multi_items())
    if kind == "application/json":
        call, urls = await asyncio.to_thread(
            _from_json, await whole_body(request, settings, take), query, settings.max_images
        )
        return await _fetched(call, urls, settings, take) if urls else call
    if kind == "multipart/form-data":
        images, fields = await read_form(request, settings, take)
        parameters = parameters_of(query, fields)
        _check_count(len(images), settings.max_images)
        return CaptionCall(images, parameters)
    if not kind.startswith("image/"):
        found = shown(kind) if kind else "no Content-Type"
        raise NotAnImage(f"The body must be {_TYPES}; this one has {found}.")
    parameters = parameters_of(query)  # before the body: a wrong name need not cost an upload
    return CaptionCall([await whole_body(request, settings, take)], parameters)


def media_type(request: Request) -> str:
    """Returns the type that a body says it is of, in lower case and without its options."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def whole_body(request: Request, settings: Settings, take: Take) -> bytes:
    """Reads a body within the bounds of the settings; see `read_body`.

    Raises:
        MalformedRequest: It is empty.
    """
    body = await read_body(
        request.receive,
        request.headers,
        take,
        limit=settings.max_body_bytes,
        stall_s=settings.stall_s,
        total_s=settings.body_s,
    )
    if not body:
        raise MalformedRequest("The body is empty; send an image.")
    return body


async def read_body(
    receive: Receive, headers: Headers, take: Take, *, limit: int, stall_s: float, total_s: float
) -> bytes:
    """Reads a body of at most `limit` bytes, each part within `stall_s`, all within `total_s`.

    Raises:
        ImageTooLarge: More bytes than `limit`, announced or sent.
        QueueFull: `take` finds no room. What is announced counts for nothing until it is there:
            else few who never send it would keep all others out.
        BodyTimeout: A silence of `stall_s`, or `total_s` are over.
        ClientGone: The client closed the connection.
    """
    too_large = ImageTooLarge(f"The body has more than {limit} bytes, the limit of this server.")
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(total_s):
            while True:
                async with asyncio.timeout(stall_s):
                    message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                if len(body) + len(part) > limit:
                    raise too_large
                take(len(part))
                body += part
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as error:
        raise BodyTimeout(
            f"The body stopped after {len(body)} bytes; send it within {total_s:g} s "
            f"and without a pause of {stall_s:g} s."
        ) from error


def _from_json(
    body: bytes, query: dict[str, Any], max_images: int
) -> tuple[CaptionCall, list[str]]:
    """Reads `{"images": ["<base64>", ...], "urls": [...], parameter: value, ...}`.

    Returns:
        The call, and the addresses of images that come after its own.
    """
    fields = json_object(body, '{"images": ["<base64>", ...]}')
    urls = _strings(fields.pop("urls", []), "urls must be a list of addresses.")
    images = _strings(
        fields.pop("images", [] if urls else None),
        'images must be a list of base64 strings: {"images": ["..."]}.',
    )
    parameters = parameters_of(query, fields, strict=True, beside="images, urls")
    _check_count(len(images) + len(urls), max_images)
    decoded = [from_base64(image, f"images[{at}]") for at, image in enumerate(images)]
    return CaptionCall(decoded, parameters), urls


def json_object(body: bytes, form: str) -> dict[str, Any]:
    """Returns the JSON object that a body is; `form` shows one.

    Raises:
        MalformedRequest: It is not JSON.
        ParameterError: It is no object, or one in it has a key twice.
    """
    fields = read_json(body, object_pairs_hook=_once)
    if not isinstance(fields, dict):
        raise ParameterError(f"The JSON must be an object: {form}.")
    return fields


async def _fetched(
    call: CaptionCall, urls: list[str], settings: Settings, take: Take
) -> CaptionCall:
    """Returns a call with the images at some addresses too, within the bounds of a body."""
    fetcher = Fetcher(settings.fetch_hosts, private=settings.fetch_private)
    left = settings.max_body_bytes - sum(map(len, call.images))
    fetched = await fetcher.fetch(urls, take, limit=left, seconds=settings.fetch_s)
    return replace(call, images=call.images + fetched)


def _strings(value: Any, refusal: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ParameterError(refusal)
    return value


def _boundary(content_type: str) -> bytes:
    """Returns the boundary of a form's parts."""
    _, options = parse_options_header(content_type)
    # The parser decodes names and fields by whatever codec is named here, and some of Python's
    # take quadratic time.
    if options.get(b"charset", b"utf-8").lower() not in _CHARSETS:
        raise MalformedRequest("The charset of multipart/form-data must be UTF-8.")
    return options.get(b"boundary", b"\n")


async def read_form(
    request: Request, settings: Settings, take: Take
) -> tuple[list[bytes], dict[str, Any]]:
    """Reads multipart/form-data: the parts named `image`, each a file, and the others by name.

    Raises:
        MalformedRequest: The body is no form.
        ParameterError: A part other than `image` is there twice.
    """
    boundary = _boundary(request.headers["content-type"])
    body = await whole_body(request, settings, take)
    malformed = MalformedRequest("The body is not valid multipart/form-data.")
    if b"--%b--" % boundary not in body:
        raise malformed  # the parser would drop a part that is cut off, and say nothing
    most = settings.max_images + _FIELDS
    if body.count(b"--%b" % boundary) > most + 1:  # before the parser makes an object of each
        raise ParameterError(f"The form has more than {most} parts.")
    parser = MultiPartParser(request.headers, _slices(body), max_files=most, max_fields=most)
    parser.spool_max_size = settings.max_body_bytes  # parts stay in memory: no disk is needed
    try:
        form = await parser.parse()
    except (MultiPartException, UnicodeError) as error:
        raise malformed from error
    try:
        items = form.multi_items()
        images = [await _file(item).read() for name, item in items if name == "image"]
        return images, _once(pair for pair in items if pair[0] != "image")
    finally:
        await form.close()


async def _slices(body: bytes) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(body), _SLICE):
        yield body[start : start + _SLICE]
        await asyncio.sleep(0)  # the parser is slow: let other requests have a turn


def _file(part: UploadFile | str) -> UploadFile:
    if isinstance(part, str):
        raise ParameterError("The part image must be a file: it needs a filename.")
    return part


def parameters_of(
    query: dict[str, Any],
    fields: dict[str, Any] | None = None,
    *,
    strict: bool = False,
    beside: str = "image",
) -> CaptionParameters:
    """Returns the parameters of the query and of the body's `fields`, which win over it.

    Args:
        query: Names and strings.
        fields: Names and values.
        strict: Whether values keep their JSON types: then "4" is no number.
        beside: What else may stand there, for the words about a name that may not.
    """
    fields = fields or {}
    for name in (*query, *fields):
        if name not in _KNOWN:
            known = ", ".join((*_KNOWN, beside))
            raise ParameterError(f"There is no parameter {shown(name)}; there are {known}.")
        if isinstance(fields.get(name), UploadFile):
            raise ParameterError(f"{name} must not be a file.")
    try:
        from_query = CaptionParameters.model_validate(query)
        from_fields = CaptionParameters.model_validate(fields, strict=strict)
    except ValidationError as error:
        raise out_of_range(error) from error
    return from_query.model_copy(update=from_fields.model_dump(exclude_unset=True))


def out_of_range(error: ValidationError) -> ParameterError:
    """Returns what a client hears of values that do not fit their model: each by its place."""
    reasons = (
        f"{'.'.join(map(str, item['loc'])) or 'the body'}: {item['msg']}"
        for item in error.errors(include_url=False, include_context=False, include_input=False)
    )
    return ParameterError("; ".join(islice(reasons, _REASONS)) + ".")


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a dict of pairs whose names all differ."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ParameterError(f"{shown(name)} is given twice.")
        found[name] = value
    return found


def _check_count(count: int, limit: int) -> None:
    if not 1 <= count <= limit:
        raise ParameterError(f"A request holds 1 to {limit} images; this one has {count}.")


def from_base64(text: str, name: str) -> bytes:
    """Returns the bytes that stand in base64 under a name.

    Raises:
        MalformedRequest: They do not.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedRequest(f"{name} is not valid base64 (RFC 4648).") from error


def shown(name: str) -> str:
    """Returns a client's own words, short and in ASCII, to show them back."""
    return ascii(name if len(name) <= 60 else name[:60] + "...")
