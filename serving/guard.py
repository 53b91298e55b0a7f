"""Nobody is let in without a key, where the server has keys; before a byte of a body is read.

Under Ray, HAProxy has read up to a MiB of it by then, see `serving.haproxy`.

Nor is a body read that could not be worked on: a server that is asked ten times what it can do must
spend its time on the tenth, not on refusing the others.

Open to all are the probes and the pages that the settings name. An admin key is asked for below
/v1/admin, and where there are no keys at all, nothing is there. Rate limits count in one process:
several replicas let through as many times more.
"""

import math
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.caller import Caller, calling
from serving.errors import (
    AdminOnly,
    CaptionError,
    HeadersTooLarge,
    RateLimited,
    Unauthorized,
)
from serving.keys import KeyRing
from serving.limits import Budget
from serving.problem import not_offered, problem

MAX_HEADER_BYTES = 32 * 1024
MAX_HEADERS = 100
_SHORT = 1024 * 1024  # bytes of a body that a connection may go on after, unread
_ADMIN = "/v1/admin"
PROBES = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
_PAGES = {"page": ("/",), "docs": ("/docs", "/openapi.json"), "metrics": ("/metrics",)}
_BELOW = {"docs": "/docs/"}


class GuardMetrics(Protocol):
    """Where the guard counts whom it turned away."""

    def request_refused(self, reason: str) -> None:
        """A request was refused: `no_key`, `wrong_key`, `not_admin` or `rate`."""


class Guard:
    """ASGI middleware: who calls, and may they?"""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing | None,
        open_pages: Collection[str],
        held_requests: Budget,
        entering: Callable[[Scope], AbstractContextManager[None]],
        metrics: GuardMetrics,
    ) -> None:
        """Wraps `app`.

        Args:
            app: What answers those who are let in.
            keys: Whom to let in; None: everybody.
            open_pages: What of `page`, `docs` and `metrics` needs no key.
            held_requests: How many requests of keys may run at once.
            entering: Around a request; raises QueueFull if it would be refused when it is read.
            metrics: Counts refusals.
        """
        self.app = app
        self._keys = keys
        self._open = {*PROBES, *(path for page in open_pages for path in _PAGES[page])}
        self._below = tuple(_BELOW[page] for page in open_pages if page in _BELOW)
        self._held_requests = held_requests
        self._entering = entering
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        request_id = scope["state"]["request_id"]
        if self._keys is None and _is_admin(scope):
            await not_offered(scope, request_id)(scope, receive, send)
            return
        with ExitStack() as stack:
            try:
                _check_size(scope)
                caller = self._caller(scope)
                stack.enter_context(calling(caller))
                if caller.name:
                    stack.enter_context(self._held_requests.share())(1)
                stack.enter_context(self._entering(scope))
            except CaptionError as error:
                if reason := _reason(error):
                    self._metrics.request_refused(reason)
                scope["state"]["error"] = error.title
                refusal = problem(error, request_id)
                if not _is_short(scope):
                    refusal.headers["Connection"] = "close"  # nobody reads the rest of the body
                answer: ASGIApp = refusal
            else:
                answer = self.app
            await answer(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        """Returns who calls; raises Unauthorized, AdminOnly or RateLimited."""
        if self._keys is None or self._is_open(scope):
            return Caller()
        presented = set(_presented(scope["headers"]))
        if not presented:
            raise Unauthorized(
                "This server asks for a key: Authorization: Bearer KEY, or X-API-Key: KEY."
            )
        found = self._keys.find(presented.pop())
        if found is None or presented:  # two that differ are none
            raise Unauthorized("The key is not known here.", wrong=True)
        key, bucket = found
        if _is_admin(scope) and not key.admin:
            raise AdminOnly("This address needs an admin key.")
        wait = bucket.take() if bucket else 0.0
        if wait > 0:
            raise RateLimited("The key's rate is used up.", retry_after=max(math.ceil(wait), 1))
        scope["state"]["key"] = key.name
        return Caller(key.name, bucket)

    def _is_open(self, scope: Scope) -> bool:
        if scope["method"] not in ("GET", "HEAD"):
            return False
        root, path = scope.get("root_path", ""), scope["path"]
        path = path.removeprefix(root) if path.startswith(f"{root}/") else path
        return path in self._open or path.startswith(self._below)


def _reason(error: CaptionError) -> str:
    if isinstance(error, Unauthorized):
        return "wrong_key" if error.wrong else "no_key"
    return {AdminOnly: "not_admin", RateLimited: "rate"}.get(type(error), "")


def _is_admin(scope: Scope) -> bool:
    # Anywhere in the path, whatever the app is mounted below: nothing else is called so.
    return _ADMIN in scope["path"]


def _presented(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[str]:
    """Yields what stands where a key may stand."""
    for name, value in headers:
        if name == b"x-api-key":
            yield value.decode("latin-1").strip()
        elif name == b"authorization":
            scheme, _, secret = value.decode("latin-1").strip().partition(" ")
            if scheme.lower() == "bearer":
                yield secret.strip()


def _is_short(scope: Scope) -> bool:
    """Returns whether a body says that it ends soon; what is not read is let go by unbounded."""
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    chunked = any(name == b"transfer-encoding" for name, _ in scope["headers"])
    return not chunked and all(one.isdigit() and int(one) <= _SHORT for one in lengths)


def _check_size(scope: Scope) -> None:
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers)
    size += len(scope.get("raw_path") or b"") + len(scope["query_string"])
    if size > MAX_HEADER_BYTES or len(headers) > MAX_HEADERS:
        raise HeadersTooLarge(
            f"The address and the headers have more than {MAX_HEADER_BYTES} bytes together, "
            f"or there are more than {MAX_HEADERS} headers."
        )
