"""Too many requests, clients that leave, deadlines, and a server without a bundle."""

import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from live import PATIENCE_S, Held, captions_of, check_problem, expected, head, running, until

from exports.registry import Registry
from serving import captioning
from serving.decode_image import decode_image


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_bundles):
    """A registry with version 1, which no test changes."""
    root = tmp_path_factory.mktemp("registry")
    Registry(root).publish(tiny_bundles.one)
    return root


@pytest.fixture
def held(root, tiny_captioner):
    """A server with room for one image in compute and one that waits; it captions when told to."""
    captioner = Held(tiny_captioner)
    with running(root, load=lambda _: captioner, max_rows=1, max_queue=1) as live:
        try:
            yield live, captioner
        finally:
            captioner.go_on.set()


class SlowDecoding:
    """Stands in for `decode_image`: waits to be told, and counts."""

    def __init__(self):
        self.go_on = threading.Event()
        self.now = self.most = self.count = 0
        self._lock = threading.Lock()

    def __call__(self, *arguments):
        with self._lock:
            self.now += 1
            self.count += 1
            self.most = max(self.most, self.now)
        assert self.go_on.wait(PATIENCE_S)
        with self._lock:
            self.now -= 1
        return decode_image(*arguments)


@pytest.fixture
def decoding(monkeypatch):
    decoding = SlowDecoding()
    monkeypatch.setattr(captioning, "decode_image", decoding)
    yield decoding
    decoding.go_on.set()


def post(live, photo):
    """Sends a request in one piece, so that it is read as soon as it has begun."""
    connection = socket.create_connection(("127.0.0.1", live.port))
    connection.sendall(head(len(photo)) + photo)
    return connection


def requests_running(live):
    return live.metrics()["cutline_requests_running",] - 1  # this one is one too


def test_a_client_that_leaves_frees_no_thread_that_still_decodes(root, photos, decoding):
    with running(root, decode_threads=1) as live:
        with post(live, photos[0]):
            until(lambda: decoding.now == 1)
        until(lambda: live.metrics().get(("cutline_requests_total", "499", "captions")) == 1)
        with post(live, photos[1]), ThreadPoolExecutor() as pool:
            until(lambda: requests_running(live) == 1)
            stays = pool.submit(live.caption, photos[2])
            until(lambda: requests_running(live) == 2)
            time.sleep(0.2)  # in which nothing may happen
            assert decoding.now == 1
            decoding.go_on.set()
            assert captions_of(stays.result())
    assert decoding.most == 1


def test_images_that_wait_to_be_decoded_fill_the_queue_too(root, photos, decoding):
    with running(root, decode_threads=1, max_rows=64, max_queue=2) as live:
        with post(live, photos[0]), post(live, photos[1]):
            until(lambda: requests_running(live) == 2)
            refused = live.caption(photos[2])
            check_problem(refused, 429)
            assert refused.headers["retry-after"] == "1"
        until(lambda: requests_running(live) == 0)
        decoding.go_on.set()
        assert captions_of(live.caption(photos[2]))


def test_bodies_share_a_budget_in_which_small_ones_find_room(root, photos):
    body = b"x" * 95_000
    with running(root, max_held_bytes=100_000, max_body_bytes=100_000, stall_s=30) as live:
        half_sent = [socket.create_connection(("127.0.0.1", live.port)) for _ in range(3)]
        for connection in half_sent:
            connection.sendall(head(len(body)) + body[:40_000])
        until(lambda: select.select(half_sent, [], [], 0)[0])
        [refused], _, _ = select.select(half_sent, [], [], 0)
        assert refused.recv(65536).startswith(b"HTTP/1.1 429 ")
        assert captions_of(live.caption(photos[0]))
        check_problem(live.caption(body), 429)
        for connection in half_sent:
            connection.close()
        until(lambda: requests_running(live) == 0)
        check_problem(live.caption(body), 415)


def test_a_full_queue_is_answered_429_with_retry_after(held, photos):
    live, captioner = held
    with ThreadPoolExecutor() as pool:
        first = pool.submit(live.caption, photos[0])
        assert captioner.began.wait(PATIENCE_S)
        second = pool.submit(live.caption, photos[1])
        until(lambda: live.engine.waiting == 1)
        assert live.metrics()["cutline_queue_depth",] == 1
        third = live.caption(photos[2])
        check_problem(third, 429)
        assert int(third.headers["retry-after"]) >= 1
        captioner.go_on.set()
        assert captions_of(first.result())
        assert captions_of(second.result())
    assert captions_of(live.caption(photos[2]))


def test_a_full_queue_refuses_before_a_byte_of_the_body_and_keeps_the_connection(held, photos):
    live, captioner = held
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(live.caption, photos[0])]
        assert captioner.began.wait(PATIENCE_S)
        waiting.append(pool.submit(live.caption, photos[1]))
        until(lambda: live.engine.waiting == 1)
        with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
            body = photos[2]
            connection.sendall(head(len(body)))
            assert connection.recv(65536).startswith(b"HTTP/1.1 429 ")
            connection.sendall(body + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")  # nothing else is full
        captioner.go_on.set()
        assert all(captions_of(one.result()) for one in waiting)


def test_nothing_is_decoded_that_a_full_queue_refuses(root, tiny_captioner, photos, decoding):
    captioner = Held(tiny_captioner)
    decoding.go_on.set()
    with (
        running(root, load=lambda _: captioner, max_rows=64, max_queue=1) as live,
        ThreadPoolExecutor() as pool,
    ):
        first = pool.submit(live.caption, photos[0])
        assert captioner.began.wait(PATIENCE_S)
        second = pool.submit(live.caption, photos[1])
        until(lambda: live.engine.waiting == 1)
        for _ in range(10):
            check_problem(live.caption(photos[2]), 429)
        assert decoding.count == 2
        captioner.go_on.set()
        assert captions_of(first.result())
        assert captions_of(second.result())


def test_a_client_that_leaves_frees_its_place(held, photos):
    live, captioner = held
    with ThreadPoolExecutor() as pool:
        first = pool.submit(live.caption, photos[0])
        assert captioner.began.wait(PATIENCE_S)
        with socket.create_connection(("127.0.0.1", live.port)) as leaving:
            leaving.sendall(head(len(photos[1])) + photos[1])
            until(lambda: live.engine.waiting == 1)
        until(lambda: live.engine.waiting == 0)
        until(lambda: live.metrics().get(("cutline_requests_total", "499", "captions")) == 1)
        captioner.go_on.set()
        assert captions_of(first.result())
    assert captioner.batches == [1]


def test_a_deadline_is_answered_504(root, tiny_captioner, photos):
    captioner = Held(tiny_captioner)
    with running(root, load=lambda _: captioner, deadline_s=1.0) as live:
        start = time.monotonic()
        check_problem(live.caption(photos[0]), 504)
        assert time.monotonic() - start < 10
        captioner.go_on.set()
        until(lambda: live.caption(photos[0]).status_code == 200)


def test_requests_that_come_together_are_one_batch(root, tiny_captioner, photos):
    captioner = Held(tiny_captioner)
    with running(root, load=lambda _: captioner) as live, ThreadPoolExecutor() as pool:
        first = pool.submit(live.caption, photos[0])
        assert captioner.began.wait(PATIENCE_S)
        rest = [
            pool.submit(live.caption, photo, params={"num_beams": beams})
            for beams, photo in enumerate(photos[1:4], 1)
        ]
        until(lambda: live.engine.waiting == 3)
        captioner.go_on.set()
        found = [captions_of(future.result())[0] for future in (first, *rest)]
    assert captioner.batches == [1, 3]
    for beams, (photo, captions) in enumerate(zip(photos[:4], found, strict=True)):
        alone = expected(tiny_captioner, photo, num_beams=beams or 4)
        assert captions[0]["text"] == alone[0]["text"]


def test_without_a_bundle_the_server_waits_for_one(tmp_path, tiny_bundles, photos):
    (tmp_path / "models").mkdir()
    with running(tmp_path / "models", wait=False) as live:
        assert live.client.get("/healthz").status_code == 200
        check_problem(live.client.get("/readyz"), 503)
        check_problem(live.caption(photos[0]), 503)
        live.registry.publish(tiny_bundles.one)
        until(lambda: live.client.get("/readyz").status_code == 200)
        assert captions_of(live.caption(photos[0]))
