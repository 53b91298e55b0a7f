"""The server in one plain process: uvicorn and nothing else."""

import http.client
import json
import logging
import math
import signal
import sys
import threading
import time
from http import HTTPStatus
from ipaddress import ip_address

import uvicorn
from fastapi import FastAPI

from serving.app import create_app
from serving.connection import Connection
from serving.engine import Engine
from serving.logs import start_log
from serving.metrics import Metrics
from serving.settings import Settings
from serving.swap import ModelManager

logger = logging.getLogger(__name__)

_PATIENCE_S = 5


def serve(settings: Settings) -> None:
    """Serves until SIGINT or SIGTERM; requests that run are finished first."""
    start_log(settings.log_format, settings.log_file)
    warn_if_open(settings)
    metrics = Metrics()
    engine = Engine(
        max_rows=settings.max_rows,
        max_queue=settings.max_queue,
        latency_target_s=settings.latency_target_s,
        metrics=metrics,
    )
    app = create_app(settings, ModelManager(settings, metrics), engine, metrics)
    server = web_server(app, settings)
    stop = threading.Event()
    # uvicorn hands a signal on to the handler before its own, once it has shut down.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=announce, args=(settings, stop), daemon=True).start()
    server.run()
    stop.set()


def web_server(app: FastAPI, settings: Settings) -> uvicorn.Server:
    """Returns uvicorn around the app."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=Connection,
            log_config=None,  # its own would come beside ours
            access_log=False,
            timeout_graceful_shutdown=math.ceil(settings.deadline_s) + 5,
        )
    )


def warn_if_open(settings: Settings) -> None:
    """Warns of a server that anybody may use who reaches its address."""
    if settings.keys_file is None and not _is_loopback(settings.host):
        logger.warning(
            "%s is open to everybody who reaches it: no keys_file is set. `python -m serving key "
            "NAME --keys-file FILE` makes a key, `up --keys-file FILE` asks for one.",
            settings.host,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def announce(settings: Settings, stop: threading.Event) -> None:
    """Waits until the server captions and prints its address; says why when that takes long."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{settings.port}"
    told, patient_until = "", time.monotonic() + _PATIENCE_S
    while not stop.wait(0.2):
        detail = _not_ready(settings)
        if not detail:
            print(f"Cutline is ready at {url}", flush=True)
            return
        if detail != told and time.monotonic() > patient_until:
            print(detail, file=sys.stderr, flush=True)
            told = detail


def _not_ready(settings: Settings) -> str:
    """Returns why the server is not ready; empty if it is."""
    # No urllib: it would ask a proxy of the environment for this machine.
    connection = http.client.HTTPConnection(settings.host, settings.port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        return "" if answer.status == HTTPStatus.OK else str(json.loads(answer.read())["detail"])
    # Nobody listens yet, or it is no answer of ours: Ray's own are no problem+json.
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return "The server starts."
    finally:
        connection.close()
