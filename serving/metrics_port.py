"""A port of the node for its metrics alone: one replica answers there, another if it dies.

The port of the captions leads to any replica, and with several nodes to any node; what one scrapes
must be the node that was meant. So each replica tries to listen here, one of them does, and the
others try again every second.
"""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4"
_AT_ONCE = 8
_PATIENCE_S = 5.0


class MetricsPort:
    """Answers `GET /metrics` on a port of its own, as soon as no other replica does."""

    def __init__(
        self, page: Callable[[], bytes], host: str, port: int, *, retry_s: float = 1.0
    ) -> None:
        """Does nothing before `start`; without a port (0), nothing then."""
        self._page, self._address, self._retry_s = page, (host, port), retry_s
        self._server: _Server | None = None
        self._closing = threading.Event()
        self._opening = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="cutline-metrics-port", daemon=True)

    @property
    def is_mine(self) -> bool:
        """Whether this process is the one that answers."""
        return self._server is not None

    def start(self) -> None:
        """Begins to listen, or to wait for its turn; never raises."""
        if self._address[1]:
            self._thread.start()

    def close(self) -> None:
        """Stops listening: the next replica may."""
        with self._opening:
            self._closing.set()
            server = self._server
        if server is not None:
            server.shutdown()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._open()
            if self._server is not None:
                logger.info("metrics of this node at %s:%d", *self._address)
                with self._server as server:
                    server.serve_forever(poll_interval=0.1)  # until `close`
                self._server = None
            self._closing.wait(self._retry_s)

    def _open(self) -> None:
        """Listens, unless another replica does or this one closes."""
        with self._opening, suppress(OSError):
            if not self._closing.is_set():
                self._server = _Server(self._address, self._page)


class _Server(ThreadingHTTPServer):
    """A few connections at once, each for a few seconds: more would be no scrape."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], page: Callable[[], bytes]) -> None:
        self.page = page
        self._room = threading.BoundedSemaphore(_AT_ONCE)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a scrape failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = _PATIENCE_S
    server: _Server
    server_version, sys_version = "cutline", ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404)
            return
        page = self.server.page()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: Any) -> None:
        """Says nothing: scrapes come every few seconds."""
