"""Never more than two bundles in memory, whoever is slow to let go of one."""

import socket
import time
import weakref

import pytest
from live import PATIENCE_S, Held, head, running, until

from exports.registry import Registry
from serving.captioner import Captioner
from serving.errors import BundleRejected
from serving.loading import Loader


@pytest.fixture
def registry(tmp_path, tiny_bundles):
    registry = Registry(tmp_path)
    for bundle in (tiny_bundles.one, tiny_bundles.two):
        registry.publish(bundle)
    registry.promote("tiny", "1")
    return registry


class Watched:
    """Loads, and counts how many captioners there are when another one is."""

    def __init__(self):
        self.alive = []
        self.most = 0
        self.loaded = []

    def __call__(self, path):
        self.alive = [one for one in self.alive if one() is not None]
        captioner = Captioner.load(path, threads=1, provider="cpu")
        self.alive.append(weakref.ref(captioner))
        self.most = max(self.most, len(self.alive))
        self.loaded.append(path.name)
        return captioner


def test_a_third_is_not_loaded_while_two_are_there(registry):
    load = Watched()
    loader = Loader(registry, load, patience_s=0.05)
    resolved = registry.resolve("tiny")
    first, second = loader.load(resolved), loader.load(resolved)
    assert loader.alive == 2
    with pytest.raises(BundleRejected, match="two bundles are in memory") as caught:
        loader.load(resolved)
    assert caught.value.cause == "memory"
    del caught, first  # freed at once: nothing of a captioner is held in a circle
    third = loader.load(resolved)
    assert load.most == loader.alive == 2
    assert second is not third


def answer_of(connection):
    """Returns an answer, whose head and body may come apart."""
    answer = b""
    while b"results" not in answer and (part := connection.recv(65536)):
        answer += part
    return answer


def test_swaps_in_quick_succession_wait_for_who_is_still_answered(registry, photos):
    """Version 1 still answers a request when 2 is loaded and 1 again is asked for."""
    load, held = Watched(), []

    def loading(path):
        captioner = load(path)
        if not held:
            held.append(Held(captioner))
            return held[0]
        return captioner

    with running(registry.root, load=loading, wait=False) as live:
        until(lambda: live.manager.current)
        with socket.create_connection(("127.0.0.1", live.port)) as waiting:
            waiting.sendall(head(len(photos[0])) + photos[0])
            captioner = held[0]
            assert captioner.began.wait(PATIENCE_S)
            registry.promote("tiny", "2")
            until(lambda: live.manager.status().swaps == 2)
            registry.promote("tiny", "1")
            until(lambda: live.manager.status().loading)
            time.sleep(0.1)  # in which nothing may be loaded
            assert load.loaded == ["1", "2"]
            captioner.go_on.set()
            assert b'"version":"1"' in answer_of(waiting)
            held.clear()
            del captioner
        until(lambda: live.manager.status().swaps == 3)
    assert load.most == 2


def test_a_half_sent_request_keeps_no_bundle(registry, photos):
    load = Watched()
    with running(registry.root, load=load) as live:
        [first] = load.alive
        with socket.create_connection(("127.0.0.1", live.port)) as slow:
            slow.sendall(head(len(photos[0])) + photos[0][:100])
            until(lambda: live.metrics()["cutline_requests_running",] == 2)
            registry.promote("tiny", "2")
            until(lambda: first() is None)
            slow.sendall(photos[0][100:])
            assert b'"version":"2"' in answer_of(slow)
