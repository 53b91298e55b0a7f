"""A server follows its registry, be it far away, slow, or gone for a while; and clocks jump."""

import time

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from live import captions_of, running, until
from test_loading import Watched

from exports.registry import Registry


class Far(MemoryFileSystem):
    """A filesystem in memory that goes away, or is slow, when it is told to."""

    protocol = "far"
    cachable = False
    gone = False
    slow_s = 0.0

    def _open(self, path, mode="rb", **more):
        if type(self).gone:
            raise ConnectionError("secret-host refuses")
        time.sleep(type(self).slow_s)
        return super()._open(path, mode, **more)


fsspec.register_implementation("far", Far, clobber=True)


@pytest.fixture
def registry(tmp_path, tiny_bundles):
    registry = Registry(tmp_path / "local")
    registry.publish(tiny_bundles.one)
    registry.publish(tiny_bundles.two)
    registry.promote("tiny", "1")
    return registry


@pytest.fixture
def sync(registry):
    """Brings the registry to far://models, aliases last."""
    files, root = fsspec.url_to_fs("far://models")

    def sync():
        paths = [path for path in registry.root.rglob("*") if path.is_file()]
        for path in sorted(paths, key=lambda path: path.name == "aliases.json"):
            if not path.name.startswith("."):
                place = path.relative_to(registry.root).as_posix()
                files.pipe_file(f"{root}/{place}", path.read_bytes())

    sync()
    yield sync
    Far.gone, Far.slow_s = False, 0.0
    files.rm(root, recursive=True)


@pytest.fixture
def far(registry, sync, tmp_path):
    """A server that follows far://models."""
    load = Watched()
    where = {"cache": tmp_path / "cache", "registry_of": registry}
    with running("far://models", load=load, retry_s=0.1, **where) as live:
        yield live, load


def error_of(live):
    return live.client.get("/v1/models").json()["models"][0]["last_error"]


def test_a_registry_at_a_url_is_followed_forth_and_back(far, registry, sync, photos, tmp_path):
    live, load = far
    assert live.caption(photos[0]).json()["version"] == "1"
    registry.promote("tiny", "2")
    sync()
    until(lambda: live.caption(photos[0]).json()["version"] == "2")
    registry.publish(registry.root / "tiny" / "1")
    registry.promote("tiny", "3")
    sync()
    until(lambda: live.caption(photos[0]).json()["version"] == "3")
    until(lambda: not list((tmp_path / "cache").glob("*/tiny/1")))

    def kept():
        return {path.name for path in (tmp_path / "cache").glob("*/tiny/*")}

    until(lambda: kept() == {"2", "3"})  # what serves, and what a rollback asks for
    registry.rollback("tiny")
    sync()
    until(lambda: live.caption(photos[0]).json()["version"] == "2")
    assert load.most == 2


def test_while_it_is_gone_or_slow_the_server_captions(far, registry, sync, photos):
    live, _ = far
    Far.gone = True
    until(lambda: error_of(live))
    error = error_of(live)
    assert (error["cause"], error["reason"]) == (
        "registry",
        "the registry cannot be read: ConnectionError",
    )
    assert captions_of(live.caption(photos[0]))
    assert live.client.get("/readyz").status_code == 200
    Far.gone = False
    until(lambda: error_of(live) is None)
    registry.promote("tiny", "2")
    sync()
    Far.slow_s = 0.05
    answered = 0
    while live.manager.current.version == "1":
        assert captions_of(live.caption(photos[answered % len(photos)]))
        answered += 1
    assert answered > 2


def test_a_version_that_came_damaged_is_refused_until_it_is_whole(far, registry, sync, photos):
    live, _ = far
    files, root = fsspec.url_to_fs("far://models")
    files.pipe_file(f"{root}/tiny/2/decoder.onnx", b"half")
    files.pipe_file(f"{root}/tiny/aliases.json", b'{"production": "2"}')
    until(lambda: error_of(live))
    error = error_of(live)
    assert (error["cause"], error["version"]) == ("hash", "2")
    assert error["reason"].startswith("decoder.onnx has 4 bytes")
    assert live.caption(photos[0]).json()["version"] == "1"
    registry.promote("tiny", "2")
    sync()
    until(lambda: live.caption(photos[0]).json()["version"] == "2")


def test_a_clock_that_jumps_changes_nothing(registry, photos, tiny_bundles, monkeypatch):
    """Deadlines, waits, retries and swaps go by a clock that nobody can set."""
    real = time.time
    with running(registry.root, retry_s=0.2, deadline_s=20.0) as live:
        for turn, jump in enumerate((10**9, -(10**9), 3600.0, -3600.0, 0.0)):
            monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
            began = time.monotonic()
            assert captions_of(live.caption(photos[turn]))
            registry.promote("tiny", "12"[turn % 2 == 0])
            until(lambda turn=turn: live.manager.current.version == "12"[turn % 2 == 0])
            assert time.monotonic() - began < 20
        registry.publish(tiny_bundles.broken_golden, version="3")
        registry.promote("tiny", "3")
        until(lambda: live.manager.status().last_error)
        refused = live.metrics()["cutline_bundles_refused_total", "golden"]
        monkeypatch.setattr(time, "time", lambda: real() - 10**9)
        until(
            lambda: live.metrics()["cutline_bundles_refused_total", "golden"] > refused
        )  # it is tried again, though the clock says that the time has not come
        assert captions_of(live.caption(photos[0]))
