"""The ASGI app: captions, models, probes, metrics, documentation and the page at `/`."""

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from swagger_ui_bundle import swagger_ui_path

from serving import quality
from serving.captioner import Captioner
from serving.decode_image import ImageLimits, decode_image
from serving.edge import Edge, until_gone
from serving.engine import Engine
from serving.errors import CaptionError, DeadlineExceeded, NotReady, UnknownModel
from serving.limits import Budget
from serving.logs import noted
from serving.metrics import Metrics
from serving.metrics_port import CONTENT_TYPE, MetricsPort
from serving.node_pages import NodePages
from serving.openapi import captions_operation, describe, documented
from serving.params import Caption, Params
from serving.problem import plain_problem, problem
from serving.reproof import Reproof
from serving.request import CaptionCall, read_call
from serving.schema import (
    CaptionAnswer,
    CaptionParameters,
    CaptionsAnswer,
    Health,
    ImageAnswer,
    ModelsAnswer,
)
from serving.session import Pixels
from serving.settings import Settings
from serving.swap import ModelManager
from serving.timeline import Timeline

PAGE = Path(__file__).with_name("page.html")

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


@dataclass(frozen=True, slots=True)
class _Server:
    """What the routes work with."""

    settings: Settings
    manager: ModelManager
    engine: Engine
    metrics: Metrics
    pages: NodePages
    reproof: Reproof
    limits: ImageLimits
    decoders: ThreadPoolExecutor
    held_bytes: Budget
    held_images: Budget


def create_app(
    settings: Settings, manager: ModelManager, engine: Engine, metrics: Metrics
) -> FastAPI:
    """Returns the app; its lifespan starts the manager, and closes what works for the app."""
    decoders = ThreadPoolExecutor(settings.decode_threads, "cutline-decode")

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

    pages = NodePages(metrics.page, settings.metrics_dir)
    port = MetricsPort(pages.page, settings.metrics_host, settings.metrics_port)
    reproof = Reproof(
        lambda: manager.current,
        engine,
        metrics,
        every_s=settings.reproof_s,
        deadline_s=settings.deadline_s,
    )
    metrics.watch_queue(lambda: engine.waiting, settings.max_queue)
    app = FastAPI(
        title="Cutline",
        version="1",
        description="A photograph in, captions out.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.state.server = _Server(
        settings,
        manager,
        engine,
        metrics,
        pages,
        reproof,
        ImageLimits(max_pixels=settings.max_pixels),
        decoders,
        # A lone body always fits.
        Budget(
            max(settings.max_held_bytes, settings.max_body_bytes),
            "The server holds as many bytes of requests as it has room for.",
        ),
        # The engine counts what waits for it; images that wait to be decoded count here.
        Budget(
            settings.max_queue + settings.max_rows,
            "As many images wait already as the server has room for.",
        ),
    )
    app.include_router(_api)
    app.include_router(_pages)
    app.mount("/docs/assets", StaticFiles(directory=str(swagger_ui_path)), name="assets")
    app.add_exception_handler(CaptionError, _on_caption_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    if settings.tracing:
        from serving import tracing  # what is off costs nothing, not even its libraries

        app.add_middleware(tracing.TraceRequests, provider=tracing.otlp_provider())
    app.add_middleware(Edge, metrics=metrics)
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
    server = _server(request)
    captioner = _ready(server)
    with server.held_bytes.share() as take_bytes, server.held_images.share() as take_images:
        call = await read_call(request, server.settings, take_bytes)
        _check_model(call.parameters.model, captioner)
        params = _params(captioner, call.parameters)
        captioner.check(params)
        take_images(len(call.images))
        results = await until_gone(request.receive, _caption_all(server, captioner, call, params))
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
    return ModelsAnswer(models=[_server(request).manager.status()])


@_api.get("/healthz", tags=["probes"], summary="Is the process alive?")
async def get_health() -> Health:
    """Returns ok as long as the process answers at all."""
    return Health(status="ok")


@_api.get("/readyz", tags=["probes"], summary="Can it caption?", responses=documented(503))
async def get_ready(request: Request) -> Health:
    """Returns ready once a bundle has given the captions that it promises, and while it does."""
    server = _server(request)
    captioner = _ready(server)
    if server.reproof.fault:
        raise NotReady(f"{captioner.name}@{captioner.version} fails: {server.reproof.fault}.")
    return Health(status="ready", model=captioner.name, version=captioner.version)


@_pages.get("/metrics")
async def get_metrics(request: Request) -> Response:
    """Returns the metrics of all replicas of this node, for Prometheus."""
    page = await asyncio.to_thread(_server(request).pages.page)
    return Response(page, media_type=CONTENT_TYPE)


@_pages.get("/openapi.json")
async def get_document(request: Request) -> dict[str, Any]:
    """Returns the OpenAPI document."""
    return describe(request.app)


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
async def get_page() -> HTMLResponse:
    """Returns the page on which one drops a photograph."""
    return HTMLResponse(PAGE.read_text("utf-8"), headers=_PAGE_HEADERS)


def _server(request: Request) -> _Server:
    server: _Server = request.app.state.server
    return server


def _ready(server: _Server) -> Captioner:
    captioner = server.manager.current
    if captioner is None:
        status = server.manager.status()
        why = status.last_error.reason if status.last_error else "it is being loaded"
        raise NotReady(f"No model answers yet: {status.reference}: {why}.")
    return captioner


def _check_model(reference: str, captioner: Captioner) -> None:
    served = f"{captioner.name}@{captioner.version}"
    if reference not in ("", captioner.name, served):
        raise UnknownModel(f"{reference!a} is not served here; {served} is.")


def _params(captioner: Captioner, given: CaptionParameters) -> Params:
    chosen = given.model_dump(exclude_unset=True, exclude={"model"})
    return Params.of(captioner.manifest.defaults, **chosen)


async def _caption_all(
    server: _Server, captioner: Captioner, call: CaptionCall, params: Params
) -> list[list[Caption]]:
    """Returns the captions of each image.

    Raises:
        CaptionError: What the first image that failed met; the others are dropped.
        DeadlineExceeded: They were not there in time.
    """
    allowed = server.settings.deadline_s
    deadline = time.monotonic() + allowed
    total = len(call.images)
    timelines = [Timeline(received=time.monotonic()) for _ in call.images]
    note = noted()
    note |= {"model": f"{captioner.name}@{captioner.version}", "images": total}
    note["timelines"] = timelines

    async def one(place: int, body: bytes) -> list[Caption]:
        timeline = timelines[place - 1]
        try:
            pixels = await _decoded(server, captioner, body)
            timeline.decoded = time.monotonic()
            return await server.engine.submit(captioner, pixels, params, deadline, timeline)
        except CaptionError as error:
            if total > 1:
                error.detail = f"Image {place} of {total}: {error.detail}"
            raise

    try:
        async with asyncio.timeout(allowed), asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(at, body)) for at, body in enumerate(call.images, 1)]
    except TimeoutError as error:
        raise DeadlineExceeded(f"No captions within {allowed:g} s.") from error
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    found = [task.result() for task in tasks]
    quality.observe(server.metrics, found)
    for timeline, captions in zip(timelines, found, strict=True):
        timeline.match_s = captions[0].seen.match_s
    if server.settings.log_captions:
        note["captions"] = [[caption.text for caption in captions] for captions in found]
    return found


async def _decoded(server: _Server, captioner: Captioner, body: bytes) -> Pixels:
    """Decodes on one of the threads for it, which stays taken though the client may have left."""
    waiting = [body]

    def decode() -> Pixels:
        return decode_image(waiting.pop(), captioner.image_spec, server.limits)

    try:
        return await asyncio.get_running_loop().run_in_executor(server.decoders, decode)
    finally:
        waiting.clear()  # what is cancelled stays in the pool until its turn: not so its bytes


async def _on_caption_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, CaptionError)  # it is registered for these alone
    request.state.error = error.title
    return problem(error, request.state.request_id)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    title = HTTPStatus(error.status_code).phrase
    detail = f"{request.method} {request.url.path[:200]} is not offered here; /docs shows what is."
    return plain_problem(error.status_code, title, detail, request.state.request_id, error.headers)
