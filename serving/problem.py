"""Errors as `application/problem+json` (RFC 9457): the one place where they become bytes."""

from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import JSONResponse
from starlette.types import Scope

from serving.errors import AdminOnly, CaptionError, QueueFull, RateLimited, Unauthorized
from serving.schema import Problem

MEDIA_TYPE = "application/problem+json"
_TYPE_PREFIX = "urn:cutline:problem:"
_CHALLENGE = 'Bearer realm="cutline"'  # RFC 6750


class ProblemResponse(JSONResponse):
    """A problem as a response."""

    media_type = MEDIA_TYPE


def problem(error: CaptionError, request_id: str) -> ProblemResponse:
    """Returns the answer to `error`; its detail was written for clients."""
    headers = {}
    if isinstance(error, QueueFull | RateLimited):
        headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = _CHALLENGE + (
            ', error="invalid_token"' if error.wrong else ""
        )
    elif isinstance(error, AdminOnly):
        headers["WWW-Authenticate"] = f'{_CHALLENGE}, error="insufficient_scope"'
    elif error.status == HTTPStatus.REQUEST_TIMEOUT:
        headers["Connection"] = "close"  # nobody is left to send the rest of the body
    return plain_problem(error.status, error.title, error.detail, request_id, headers)


def plain_problem(
    status: int,
    title: str,
    detail: str,
    request_id: str,
    headers: Mapping[str, str] | None = None,
) -> ProblemResponse:
    """Returns a problem that is not one of our own errors, such as 404 or 405 of the router."""
    body = Problem(
        type=_TYPE_PREFIX + title.lower().replace(" ", "-"),
        title=title,
        status=status,
        detail=detail,
        request_id=request_id,
    )
    return ProblemResponse(body.model_dump(), status_code=status, headers=headers)


def not_offered(
    scope: Scope,
    request_id: str,
    status: int = HTTPStatus.NOT_FOUND,
    headers: Mapping[str, str] | None = None,
) -> ProblemResponse:
    """Returns the answer to an address or a method that is not there."""
    detail = f"{scope['method']} {scope['path'][:200]} is not offered here; /docs shows what is."
    return plain_problem(status, HTTPStatus(status).phrase, detail, request_id, headers)


def internal_problem(request_id: str) -> ProblemResponse:
    """Returns the answer to what nobody foresaw; the cause stands in the log under this id."""
    detail = f"The server failed; its log has the cause under the id {request_id}."
    return plain_problem(500, "Internal error", detail, request_id)
