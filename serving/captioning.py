"""From a request to captions: the one way in, whatever the door's own words are.

A door gives a function that reads its form of a request. Everything else is the same for all: the
bounds on bytes and images held, the model's name, the parameters, the threads that decode, the
engine, the deadline, and a client that leaves.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from fastapi import Request

from serving import quality
from serving.caller import caller
from serving.captioner import Captioner
from serving.decode_image import ImageLimits, decode_image
from serving.edge import until_gone
from serving.engine import Engine
from serving.errors import CaptionError, DeadlineExceeded, NotReady, UnknownModel
from serving.feedback_store import FeedbackStore
from serving.limits import Budget, Take
from serving.logs import noted
from serving.metrics import Metrics
from serving.node_pages import NodePages
from serving.params import Caption, Params
from serving.reproof import Reproof
from serving.request import CaptionCall
from serving.schema import CaptionParameters
from serving.session import Pixels
from serving.settings import Settings
from serving.swap import ModelManager
from serving.timeline import Timeline

Call = TypeVar("Call", bound=CaptionCall)


@dataclass(frozen=True, slots=True)
class Server:
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
    feedback: FeedbackStore | None


def server_of(request: Request) -> Server:
    """Returns what the routes of the app work with."""
    server: Server = request.app.state.server
    return server


def ready_captioner(server: Server) -> Captioner:
    """Returns the captioner that answers now; take it once per request.

    Raises:
        NotReady: None does yet.
    """
    captioner = server.manager.current
    if captioner is None:
        status = server.manager.status()
        why = status.last_error.reason if status.last_error else "it is being loaded"
        raise NotReady(f"No model answers yet: {status.reference}: {why}.")
    return captioner


def check_model(reference: str, captioner: Captioner) -> None:
    """Raises UnknownModel where a request names another model or version than the one served."""
    served = f"{captioner.name}@{captioner.version}"
    if reference not in ("", captioner.name, served):
        raise UnknownModel(f"{reference!a} is not served here; {served} is.")


def params_of(captioner: Captioner, given: CaptionParameters) -> Params:
    """Returns how to caption: what was given, and the bundle's defaults for the rest."""
    chosen = given.model_dump(exclude_unset=True, exclude={"model"})
    return Params.of(captioner.manifest.defaults, **chosen)


def params_of_call(captioner: Captioner, call: CaptionCall) -> Params:
    """Returns how to caption the images of a call."""
    return params_of(captioner, call.parameters)


async def answered(
    request: Request,
    read: Callable[[Request, Settings, Take], Awaitable[Call]],
    choose: Callable[[Captioner, Call], Params] = params_of_call,
) -> tuple[Captioner, Call, list[list[Caption]]]:
    """Reads a request and captions its images.

    Args:
        request: Its body has not been read.
        read: Reads the door's form of a request; see `read_call`.
        choose: Returns how to caption what it read.

    Returns:
        Who captioned, what was read, and the captions of each image.

    Raises:
        CaptionError: Any of its kinds; nothing was captioned.
        ClientGone: The client closed the connection.
    """
    server = server_of(request)
    ready_captioner(server)
    with server.held_bytes.share() as take_bytes, server.held_images.share() as take_images:
        call = await read(request, server.settings, take_bytes)
        # Taken only now: whoever sends slowly must not keep a captioner that was swapped out.
        captioner = ready_captioner(server)
        check_model(call.parameters.model, captioner)
        params = choose(captioner, call)
        captioner.check(params)
        take_images(len(call.images))
        caller().charge(len(call.images) - 1)  # the guard took one
        shadow, work = server.manager.shadow, caption_all(server, captioner, call.images, params)
        with shadow.live() as turn:
            results = await until_gone(request.receive, work)
        asked = replace(call, images=[])
        shadow.offer(call.images, lambda candidate: choose(candidate, asked), results[0], turn)
        return captioner, call, results


async def caption_all(
    server: Server, captioner: Captioner, images: Sequence[bytes], params: Params
) -> list[list[Caption]]:
    """Returns the captions of each image.

    Raises:
        CaptionError: What the first image that failed met; the others are dropped.
        DeadlineExceeded: They were not there in time.
    """
    allowed = server.settings.deadline_s
    deadline = time.monotonic() + allowed
    total = len(images)
    timelines = [Timeline(received=time.monotonic()) for _ in images]
    note = noted()
    note |= {"model": f"{captioner.name}@{captioner.version}", "images": total}
    note["timelines"] = timelines

    async def one(place: int, body: bytes) -> list[Caption]:
        timeline = timelines[place - 1]
        try:
            with server.engine.place(deadline):
                pixels = await decoded(server, captioner, body)
            timeline.decoded = time.monotonic()
            return await server.engine.submit(captioner, pixels, params, deadline, timeline)
        except CaptionError as error:
            if total > 1:
                error.detail = f"Image {place} of {total}: {error.detail}"
            raise

    try:
        async with asyncio.timeout(allowed), asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(at, body)) for at, body in enumerate(images, 1)]
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


async def decoded(server: Server, captioner: Captioner, body: bytes) -> Pixels:
    """Decodes on one of the threads for it, which stays taken though the client may have left."""
    waiting = [body]

    def decode() -> Pixels:
        return decode_image(waiting.pop(), captioner.image_spec, server.limits)

    try:
        return await asyncio.get_running_loop().run_in_executor(server.decoders, decode)
    finally:
        waiting.clear()  # what is cancelled stays in the pool until its turn: not so its bytes
