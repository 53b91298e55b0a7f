"""Errors in the words of the protocol that a door speaks.

Within the server every error is `application/problem+json`, whoever raises it: a route, the router,
a layer around them. Under the addresses of another protocol this outermost layer turns it into what
that protocol's clients read. Status and headers stay as they are.
"""

import json
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.problem import MEDIA_TYPE
from serving.schema import Problem

Dialect = Callable[[dict[str, Any]], BaseModel]

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class OpenAIFault(BaseModel):
    """What was wrong, as the OpenAI interface has it."""

    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = None
    code: str = Field(description="Stable name of the kind of error", examples=["queue_full"])


class OpenAIError(BaseModel):
    """An error in the words of the OpenAI interface."""

    error: OpenAIFault


class InferenceError(BaseModel):
    """An error in the words of the Open Inference Protocol."""

    error: str


def openai_error(problem: dict[str, Any]) -> OpenAIError:
    """Returns a problem in OpenAI's words; `code` is the last part of the problem's type."""
    status = problem["status"]
    code = problem["type"].rpartition(":")[2].replace("-", "_")
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return OpenAIError(
        error=OpenAIFault(
            message=problem["detail"],
            type=_KINDS.get(status, kind),
            code="model_not_found" if code == "unknown_model" else code,
        )
    )


def inference_error(problem: dict[str, Any]) -> InferenceError:
    """Returns a problem in the words of the Open Inference Protocol."""
    return InferenceError(error=problem["detail"])


_MODELS: dict[Dialect | None, type[BaseModel]] = {
    openai_error: OpenAIError,
    inference_error: InferenceError,
}


def dialect_of(path: str) -> Dialect | None:
    """Returns how errors are written under an address; None leaves them as they are."""
    if path.startswith("/v1/chat/"):
        return openai_error
    if path == "/v2" or path.startswith("/v2/"):
        return inference_error
    return None


def error_of(path: str) -> type[BaseModel]:
    """Returns the model of what is written of an error under an address."""
    return _MODELS.get(dialect_of(path), Problem)


class Dialects:
    """ASGI middleware: rewrites problems under the addresses of other protocols."""

    def __init__(self, app: ASGIApp) -> None:
        """Wraps `app`."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        dialect = dialect_of(scope["path"]) if scope["type"] == "http" else None
        if dialect is None:
            await self.app(scope, receive, send)
            return
        await self.app(scope, receive, _Rewriter(send, dialect))


class _Rewriter:
    """Holds the head of a problem back until its body has come."""

    def __init__(self, send: Send, dialect: Dialect) -> None:
        self._send = send
        self._dialect = dialect
        self._head: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if Headers(raw=message["headers"]).get("content-type") == MEDIA_TYPE:
                self._head = message
                return
        elif self._head is not None:
            self._body += message.get("body", b"")
            if message.get("more_body", False):
                return
            await self._send_rewritten(self._head)
            return
        await self._send(message)

    async def _send_rewritten(self, head: Message) -> None:
        body = self._dialect(json.loads(self._body)).model_dump_json().encode()
        headers = MutableHeaders(scope=head)
        headers["content-type"] = "application/json"
        headers["content-length"] = str(len(body))
        await self._send(head)
        await self._send({"type": "http.response.body", "body": body})
