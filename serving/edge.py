"""The outermost layer of the app: an id for each request, a count of its answer, no surprises."""

import asyncio
import logging
import os
import re
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import logs
from serving.metrics import Metrics
from serving.problem import internal_problem
from serving.request import ClientGone

logger = logging.getLogger(__name__)

T = TypeVar("T")

REQUEST_ID = "x-request-id"
_ID_PATTERN = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# nginx's code for a client that left before its answer; it stands in the metrics alone.
CLIENT_GONE = 499

_ROUTES = {
    "/v1/captions": "captions",
    "/v1/chat/completions": "chat",
    "/v1/feedback": "feedback",
    "/v1/models": "models",
    "/healthz": "health",
    "/readyz": "health",
    "/v2": "models",
    "/v2/health/live": "health",
    "/v2/health/ready": "health",
    "/metrics": "metrics",
    "/": "page",
    "/docs": "page",
    "/openapi.json": "page",
}


CAPTIONING = frozenset({"captions", "chat", "infer"})
"""Routes that caption."""


class Edge:
    """ASGI middleware: `X-Request-Id`, metrics, and a clean 500 for what nobody foresaw."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        """Wraps `app`."""
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        token = logs.state.set(state)
        path = scope["path"]
        code = CLIENT_GONE

        async def send_with_id(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        start = time.perf_counter()
        self.metrics.request_started()
        try:
            await self.app(scope, receive, send_with_id)
        except ClientGone:
            logger.info("the client left")
        except Exception:
            logger.exception("unforeseen failure")
            if code != CLIENT_GONE:
                raise  # half an answer is out: only the server can break the connection off
            await internal_problem(request_id)(scope, receive, send_with_id)
        finally:
            route = route_of(path)
            seconds = time.perf_counter() - start
            self.metrics.request_finished(route, code, seconds)
            logs.log_request(state, route, code, seconds)
            logs.state.reset(token)


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`, or cancels it as soon as the client leaves.

    Raises:
        ClientGone: The client closed the connection.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def route_of(path: str) -> str:
    """Returns what an address is called in the metrics."""
    if path.startswith("/docs/"):
        return "page"
    if path.startswith("/v2/models/"):
        return "infer" if path.endswith("/infer") else "models"
    return _ROUTES.get(path, "other")


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get(REQUEST_ID, "")
    return given if _ID_PATTERN.fullmatch(given) else os.urandom(16).hex()
