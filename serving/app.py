"""The ASGI app: captions, models, probes, metrics, documentation and the page at `/`."""

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import Scope
from swagger_ui_bundle import swagger_ui_path

from serving import chat, feedback, v2
from serving.captioning import Server, answered, ready_captioner, server_of
from serving.chat import ChatRequest
from serving.decode_image import ImageLimits
from serving.dialects import Dialects, InferenceError, OpenAIError, error_of
from serving.edge import CAPTIONING, Edge, route_of
from serving.engine import Engine
from serving.errors import CaptionError, NotReady
from serving.feedback import FeedbackRequest
from serving.feedback_store import FeedbackStore
from serving.guard import PROBES, Guard
from serving.keys import KeyRing
from serving.limits import Budget
from serving.metrics import Metrics
from serving.metrics_port import CONTENT_TYPE, MetricsPort
from serving.node_pages import NodePages
from serving.openapi import captions_operation, describe, documented
from serving.problem import not_offered, problem
from serving.reproof import Reproof
from serving.request import read_call
from serving.schema import (
    CaptionAnswer,
    CaptionsAnswer,
    Health,
    ImageAnswer,
    ModelsAnswer,
)
from serving.settings import Settings
from serving.swap import ModelManager
from serving.tensors import InferRequest

PAGE = Path(__file__).with_name("page.html")

# What routes read by themselves, and how they say what was wrong.
_BODIES = (ChatRequest, InferRequest, FeedbackRequest, OpenAIError, InferenceError)

# The page and its script are one file: nothing else may load or run, wherever the page is shown.
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def create_app(
    settings: Settings, manager: ModelManager, engine: Engine, metrics: Metrics
) -> FastAPI:
    """Returns the app; its lifespan starts the manager, and closes what works for the app."""
    decoders = ThreadPoolExecutor(settings.decode_threads, "cutline-decode")
    bodies = 2 if settings.keys_file else 1  # a key may hold half of what there is at most

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        manager.start()
        pages.start()
        port.start()
        proofs = asyncio.create_task(reproof.run())
        yield
        proofs.cancel()
        manager.close()
        await asyncio.to_thread(port.close)
        await asyncio.to_thread(pages.close)
        await asyncio.to_thread(engine.close)
        decoders.shutdown(wait=False, cancel_futures=True)

    def deadline() -> float:
        return time.monotonic() + settings.deadline_s

    def entering(scope: Scope) -> AbstractContextManager[None]:
        captions = scope["method"] == "POST" and route_of(scope["path"]) in CAPTIONING
        return engine.entering(deadline()) if captions else nullcontext()

    pages = NodePages(metrics.page, settings.metrics_dir)
    port = MetricsPort(pages.page, settings.metrics_host, settings.metrics_port)
    reproof = Reproof(
        lambda: manager.current,
        engine,
        metrics,
        every_s=settings.reproof_s,
        deadline_s=settings.deadline_s,
    )
    metrics.watch_queue(lambda: engine.waiting, lambda: engine.places(deadline()))
    app = FastAPI(
        title="Cutline",
        version="1",
        description="A photograph in, captions out.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.state.server = Server(
        settings=settings,
        manager=manager,
        engine=engine,
        metrics=metrics,
        pages=pages,
        reproof=reproof,
        limits=ImageLimits(max_pixels=settings.max_pixels),
        decoders=decoders,
        held_bytes=Budget(
            max(settings.max_held_bytes, settings.max_body_bytes * bodies),  # a lone body fits
            "The server holds as many bytes of requests as it has room for.",
        ),
        # The engine bounds what waits for it; this, all that are in memory, by callers' shares.
        held_images=Budget(
            settings.max_queue + settings.max_rows,
            "As many images wait already as the server has room for.",
        ),
        feedback=(
            FeedbackStore(settings.feedback_dir, settings.feedback_bytes)
            if settings.feedback_dir
            else None
        ),
    )
    for router in (_api, chat.router, v2.router, feedback.router):
        app.include_router(router)
    app.include_router(_pages)
    app.mount("/docs/assets", StaticFiles(directory=str(swagger_ui_path)), name="assets")
    app.add_exception_handler(CaptionError, _on_caption_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    if settings.tracing:
        from serving import tracing  # what is off costs nothing, not even its libraries

        app.add_middleware(tracing.TraceRequests, provider=tracing.otlp_provider())
    app.add_middleware(
        Guard,
        keys=KeyRing(settings.keys_file) if settings.keys_file else None,
        open_pages=settings.open_pages,
        held_requests=Budget(
            2 * (settings.max_queue + settings.max_rows),
            "As many requests of this key run already as the server has room for.",
        ),
        entering=entering,
        metrics=metrics,
    )
    app.add_middleware(Edge, metrics=metrics)
    app.add_middleware(Dialects)
    return app


_api = APIRouter()
_pages = APIRouter(include_in_schema=False)


@_api.post(
    "/v1/captions",
    tags=["captions"],
    summary="Caption images",
    response_model=CaptionsAnswer,
    responses=documented(400, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra=captions_operation(),
)
async def post_captions(request: Request) -> Response:
    """Returns the best captions of one or more images.

    Send one image as the raw body, or several as multipart/form-data or JSON. A parameter may stand
    in the query, in the form or in the JSON; the body wins over the query.
    """
    captioner, _, results = await answered(request, read_call)
    answer = CaptionsAnswer(
        model=captioner.name,
        version=captioner.version,
        request_id=request.state.request_id,
        results=[
            ImageAnswer(captions=[CaptionAnswer.model_validate(caption) for caption in one])
            for one in results
        ],
    )
    body = answer.model_dump_json(exclude_none=True)  # no match where none was asked for
    return Response(body, media_type="application/json")


@_api.get("/v1/models", tags=["captions"], summary="What is served, and why not something else")
async def get_models(request: Request) -> ModelsAnswer:
    """Returns the model that this server follows, the version that answers, and the last error."""
    return ModelsAnswer(models=[server_of(request).manager.status()])


@_api.get("/healthz", tags=["probes"], summary="Is the process alive?")
async def get_health() -> Health:
    """Returns ok as long as the process answers at all."""
    return Health(status="ok")


@_api.get("/readyz", tags=["probes"], summary="Can it caption?", responses=documented(503))
async def get_ready(request: Request) -> Health:
    """Returns ready once a bundle has given the captions that it promises, and while it does."""
    server = server_of(request)
    captioner = ready_captioner(server)
    if server.reproof.fault:
        raise NotReady(f"{captioner.name}@{captioner.version} fails: {server.reproof.fault}.")
    return Health(status="ready", model=captioner.name, version=captioner.version)


@_pages.get("/metrics")
async def get_metrics(request: Request) -> Response:
    """Returns the metrics of all replicas of this node, for Prometheus."""
    page = await asyncio.to_thread(server_of(request).pages.page)
    return Response(page, media_type=CONTENT_TYPE)


@_pages.get("/openapi.json")
async def get_document(request: Request) -> dict[str, Any]:
    """Returns the OpenAPI document."""
    keys = server_of(request).settings.keys_file
    return describe(request.app, _BODIES, error_of=error_of, open_to_all=PROBES if keys else None)


@_pages.get("/docs")
async def get_docs() -> HTMLResponse:
    """Returns Swagger UI; its files come from this server, its addresses are relative."""
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Cutline: the interface",
        swagger_js_url="docs/assets/swagger-ui-bundle.js",
        swagger_css_url="docs/assets/swagger-ui.css",
        swagger_favicon_url="docs/assets/favicon-32x32.png",
    )


@_pages.get("/")
async def get_page(request: Request) -> HTMLResponse:
    """Returns the page on which one drops a photograph."""
    page = PAGE.read_text("utf-8")
    if server_of(request).feedback is not None:
        page = page.replace("<body>", "<body data-feedback>")
    return HTMLResponse(page, headers=_PAGE_HEADERS)


async def _on_caption_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, CaptionError)  # it is registered for these alone
    request.state.error = error.title
    return problem(error, request.state.request_id)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return not_offered(request.scope, request.state.request_id, error.status_code, error.headers)
