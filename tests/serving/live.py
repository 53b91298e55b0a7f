"""A real server for tests: uvicorn in a thread, a free port, the tiny bundle."""

import base64
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from exports.registry import Registry
from serving.app import create_app
from serving.decode_image import ImageLimits, decode_image
from serving.engine import Engine
from serving.metrics import Metrics
from serving.params import Params
from serving.settings import Settings
from serving.swap import ModelManager

PNG = {"content-type": "image/png"}
PATIENCE_S = 60  # for a busy machine; nothing below takes so long on a quiet one


@dataclass(frozen=True)
class Live:
    """A running server."""

    client: httpx.Client
    port: int
    registry: Registry
    manager: ModelManager
    engine: Engine

    def caption(self, body, **fields):
        """Posts a raw image; keyword arguments go to httpx."""
        fields.setdefault("headers", PNG)
        return self.client.post("/v1/captions", content=body, **fields)

    def metrics(self):
        """Returns the value of every sample by name and label values, those of `replica` aside."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        return {
            (
                sample.name,
                *sorted(v for k, v in sample.labels.items() if k != "replica"),
            ): sample.value
            for family in families
            for sample in family.samples
        }


@contextmanager
def running(root, *, load=None, wait=True, registry_of=None, **settings):
    """Runs a server over the registry at `root` until the block ends.

    Where `root` is a URL, `registry_of` is what a test changes.
    """
    chosen = {"model": "tiny", "threads": 1, "poll_s": 0.02, "provider": "cpu", **settings}
    settings = Settings(registry=root, **chosen)
    metrics = Metrics()
    manager = ModelManager(settings, metrics, load=load)
    engine = Engine(
        max_rows=settings.max_rows,
        max_queue=settings.max_queue,
        latency_target_s=settings.latency_target_s,
        metrics=metrics,
    )
    app = create_app(settings, manager, engine, metrics)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
            while wait and client.get("/readyz").status_code != 200:
                pass
            yield Live(client, port, registry_of or Registry(root), manager, engine)
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


class Held:
    """A captioner that captions when it is told to, and keeps what it was asked."""

    def __init__(self, captioner):
        self._captioner = captioner
        self.began = threading.Event()
        self.go_on = threading.Event()
        self.batches = []

    def __getattr__(self, name):
        return getattr(self._captioner, name)

    def encode(self, pixels, observer=None):
        self.batches.append(len(pixels))
        self.began.set()
        assert self.go_on.wait(PATIENCE_S)
        return self._captioner.encode(pixels, observer)


def captions_of(response):
    """Returns the captions of each image of an answer that must be one."""
    assert response.status_code == 200, response.text
    return [result["captions"] for result in response.json()["results"]]


def check_problem(response, status):
    """Returns the problem of an answer that must be one, and must give nothing away."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert set(problem) == {"type", "title", "status", "detail", "request_id"}
    assert problem["status"] == status
    assert problem["type"].startswith("urn:cutline:problem:")
    assert problem["request_id"] == response.headers["x-request-id"]
    for secret in ("Traceback", "Error(", ".py", "site-packages", "/tmp", "/work"):
        assert secret not in response.text
    return problem


def until(condition):
    """Waits for a condition."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def send(live, *parts):
    """Sends bytes as they are; returns what comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
        for part in parts:
            connection.sendall(part)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def head(length):
    """Returns the head of a request that announces `length` bytes of an image."""
    return (
        b"POST /v1/captions HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
        b"Content-Length: %d\r\n\r\n" % length
    )


def as_base64(*images):
    """Returns images as JSON has them."""
    return [base64.b64encode(image).decode() for image in images]


def expected(captioner, photo, **params):
    """Returns what the answer must say of a photo, computed without a server."""
    params = Params.of(captioner.manifest.defaults, **params)
    pixels = decode_image(photo, captioner.image_spec, ImageLimits())
    [captions] = captioner.caption_batch([pixels], [params])
    return [
        {"text": c.text, "score": c.score, "log_prob": c.log_prob, "tokens": c.tokens}
        for c in captions
    ]
