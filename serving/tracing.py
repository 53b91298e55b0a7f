"""OpenTelemetry traces of requests; imported only where the setting `tracing` is on.

A request is one span, and each of its images has one for every stage that it passed: decode, queue,
encode, wait (encoded, but no room yet among the searches), steps, rerank. They are made when the
request is over, from the times in its timelines, so the engine knows nothing of traces. A caller's
`traceparent` (W3C Trace Context, https://www.w3.org/TR/trace-context/) is taken over. Spans hold
no part of a body and no words of an error.
"""

import os
import time
from collections.abc import Iterator

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    Span,
    SpanKind,
    Status,
    StatusCode,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.edge import CLIENT_GONE
from serving.request import ClientGone
from serving.timeline import Timeline

_TRACED = ("/v1/", "/v2/")
_SERVER_ERROR = 500
_propagator = TraceContextTextMapPropagator()


def otlp_provider() -> TracerProvider:
    """Returns what sends spans by OTLP over HTTP; `OTEL_*` variables say where, and how many."""
    named = {} if "OTEL_SERVICE_NAME" in os.environ else {SERVICE_NAME: "cutline"}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class TraceRequests:
    """ASGI middleware, within `Edge`: a span for each request of the interface."""

    def __init__(self, app: ASGIApp, *, provider: TracerProvider) -> None:
        """Wraps `app`."""
        self.app = app
        self._tracer = provider.get_tracer("cutline")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http" or not scope["path"].startswith(_TRACED):
            await self.app(scope, receive, send)
            return
        code = 0

        async def send_and_note(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        headers = Headers(scope=scope)
        state = scope["state"]
        span = self._tracer.start_span(
            scope["method"], context=_propagator.extract(headers), kind=SpanKind.SERVER
        )
        state["trace_id"] = format_trace_id(span.get_span_context().trace_id)
        try:
            await self.app(scope, receive, send_and_note)
        except Exception as error:  # `Edge`, around us, makes an answer of it
            code = code or (CLIENT_GONE if isinstance(error, ClientGone) else _SERVER_ERROR)
            raise
        finally:
            self._finish(span, scope, code)

    def _finish(self, span: Span, scope: Scope, code: int) -> None:
        state = scope["state"]
        # A path could be anything; the route that answered is one of a few.
        route = getattr(scope.get("route"), "path", "other")
        span.update_name(f"{scope['method']} {route}")
        span.set_attribute("http.request.method", scope["method"])
        span.set_attribute("http.route", route)
        span.set_attribute("cutline.request_id", state["request_id"])
        if code:
            span.set_attribute("http.response.status_code", code)
        for name in ("images", "model", "key"):
            if state.get(name) is not None:
                span.set_attribute(f"cutline.{name}", state[name])
        if code >= _SERVER_ERROR:
            span.set_status(Status(StatusCode.ERROR))
        within = set_span_in_context(span)
        since = time.time_ns() - time.monotonic_ns()
        for image, timeline in enumerate(state.get("timelines", ())):
            for name, start, end in stages(timeline):
                child = self._tracer.start_span(
                    name,
                    context=within,
                    start_time=since + int(start * 1e9),
                    attributes={"cutline.image": image},
                )
                child.end(since + int(end * 1e9))
        span.end()


def stages(timeline: Timeline) -> Iterator[tuple[str, float, float]]:
    """Yields the stages that an image came through: name, start and end."""
    searched = timeline.done - timeline.match_s
    for name, start, end in (
        ("decode", timeline.received, timeline.decoded),
        ("queue", timeline.decoded, timeline.encoding),
        ("encode", timeline.encoding, timeline.encoded),
        ("wait", timeline.encoded, timeline.joined),
        ("steps", timeline.joined, searched),
    ):
        if not end > 0:
            return
        yield name, start, end
    if timeline.match_s:
        yield "rerank", searched, timeline.done
