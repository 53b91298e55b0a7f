"""Errors as `application/problem+json` (RFC 9457): the one place where they become bytes."""

from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import JSONResponse

from serving.errors import CaptionError, QueueFull
from serving.schema import Problem

MEDIA_TYPE = "application/problem+json"
_TYPE_PREFIX = "urn:cutline:problem:"


class ProblemResponse(JSONResponse):
    """A problem as a response."""

    media_type = MEDIA_TYPE


def problem(error: CaptionError, request_id: str) -> ProblemResponse:
    """Returns the answer to `error`; its detail was written for clients."""
    headers = {}
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(error.retry_after)
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


def internal_problem(request_id: str) -> ProblemResponse:
    """Returns the answer to what nobody foresaw; the cause stands in the log under this id."""
    detail = f"The server failed; its log has the cause under the id {request_id}."
    return plain_problem(500, "Internal error", detail, request_id)
