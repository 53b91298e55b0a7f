"""Too many requests, clients that leave, deadlines, and a server without a bundle."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from live import PATIENCE_S, Held, captions_of, check_problem, expected, head, running, until

from exports.registry import Registry


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
    with running(root, load=lambda _: captioner, max_batch_size=1, max_queue=1) as live:
        try:
            yield live, captioner
        finally:
            captioner.go_on.set()


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
