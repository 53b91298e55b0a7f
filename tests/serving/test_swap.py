"""Swapping bundles: real registry and real tiny bundles; the stream of requests is in test_app."""

import shutil
import threading
import time

import pytest

from exports.registry import Registry
from serving.metrics import Metrics
from serving.settings import Settings
from serving.swap import ModelManager


@pytest.fixture
def registry(tmp_path, tiny_bundles):
    """A registry with version 1 in production, and 2 beside it."""
    registry = Registry(tmp_path / "models")
    registry.publish(tiny_bundles.one)
    registry.publish(tiny_bundles.two)
    registry.promote("tiny", "1")
    return registry


class Loaded:
    """What a swap looks at of a captioner."""

    def __init__(self, manifest):
        self.manifest, self.name, self.version = manifest, manifest.name, manifest.version


class Loader:
    """Stands in for `Captioner.load`: counts, and fails or waits when told to."""

    def __init__(self, captioner):
        self.captioner = captioner
        self.loaded = []
        self.error = None
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, path):
        self.loaded.append(path.name)
        assert self.go_on.wait(60)
        if self.error:
            raise self.error
        if path.name == "1":
            return self.captioner
        manifest = self.captioner.manifest.model_copy(update={"version": path.name})
        return Loaded(manifest)


def manager_of(registry, *, load=None, metrics=None, **settings):
    settings = {"model": "tiny", "threads": 1, "poll_s": 0.02, "provider": "cpu", **settings}
    return ModelManager(
        Settings(registry=registry.root, **settings), metrics or Metrics(), load=load
    )


def eventually(condition, *, within_s=60.0):
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_alias_is_followed_forth_and_back(registry):
    metrics = Metrics()
    manager = manager_of(registry, metrics=metrics)
    assert manager.current is None
    manager.check()
    first = manager.current
    assert (first.name, first.version) == ("tiny", "1")

    registry.promote("tiny", "2")
    manager.check()
    assert manager.current.version == "2"
    assert first.version == "1"  # whoever holds it keeps it
    del first

    registry.rollback("tiny")
    manager.check()
    assert manager.current.version == "1"
    status = manager.status()
    assert (status.desired, status.active.version, status.swaps) == ("1", "1", 3)
    assert status.last_error is None
    assert 'cutline_model_info{model="tiny",version="1"} 1.0' in metrics.page().decode()
    assert 'cutline_swaps_total{outcome="loaded"} 3.0' in metrics.page().decode()


def test_what_does_not_change_is_not_loaded_again(registry, tiny_captioner):
    load = Loader(tiny_captioner)
    manager = manager_of(registry, load=load)
    for _ in range(3):
        manager.check()
    assert load.loaded == ["1"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("flipped", "decoder.onnx has the sha256"),
        ("half-written", "which is version 3"),
        ("broken_golden", "golden"),
        ("nan", "golden"),
    ],
)
def test_a_bad_bundle_changes_nothing_and_says_why(registry, tiny_bundles, fault, reason):
    metrics = Metrics()
    manager = manager_of(registry, metrics=metrics)
    manager.check()
    good = manager.current
    registry.publish(getattr(tiny_bundles, fault, tiny_bundles.two), version="3")
    registry.promote("tiny", "3")
    folder = registry.root / "tiny" / "3"
    if fault == "flipped":
        decoder = folder / "decoder.onnx"
        body = bytearray(decoder.read_bytes())
        body[len(body) // 2] ^= 1
        decoder.write_bytes(body)
    elif fault == "half-written":
        (folder / "manifest.json").unlink()
    manager.check()

    assert manager.current is good
    error = manager.status().last_error
    assert reason in error.reason
    assert str(registry.root) not in error.reason
    if fault != "half-written":  # that is no version at all
        assert (manager.status().desired, error.version) == ("3", "3")
        assert 'cutline_swaps_total{outcome="refused"} 1.0' in metrics.page().decode()

    registry.rollback("tiny")
    manager.check()
    assert manager.status().last_error is None


def test_a_bundle_that_stands_in_another_s_place_is_refused(registry):
    manager = manager_of(registry)
    manager.check()
    good = manager.current
    shutil.copytree(registry.root / "tiny" / "2", registry.root / "tiny" / "9")
    manager.follow("tiny@9")
    manager.check()
    assert manager.current is good
    error = manager.status().last_error
    assert (error.version, "is of tiny@2, but stands under tiny@9" in error.reason) == ("9", True)


def test_a_relative_registry_keeps_its_reasons_readable(registry, monkeypatch):
    monkeypatch.chdir(registry.root)
    settings = Settings(registry=".", model="tiny@9", provider="cpu")
    manager = ModelManager(settings, Metrics())
    manager.check()
    assert (
        manager.status().last_error.reason == "no tiny@9 in the registry; tiny has 1, 2, production"
    )


def test_a_foreign_error_is_not_shown(registry):
    load = Loader(None)
    load.error = RuntimeError("/secret/path exploded")
    manager = manager_of(registry, load=load)
    manager.check()
    reason = manager.status().last_error.reason
    assert "RuntimeError" in reason
    assert "secret" not in reason


def test_a_refused_bundle_is_tried_again_later_but_not_at_once(registry, tiny_captioner):
    load = Loader(tiny_captioner)
    load.error = MemoryError()
    manager = manager_of(registry, load=load, retry_s=0.2)
    manager.check()
    manager.check()
    assert load.loaded == ["1"]
    load.error = None
    eventually(lambda: manager.check() or manager.current)
    assert load.loaded == ["1", "1"]
    assert manager.status().last_error is None


def test_a_bundle_that_appears_later_is_served(tmp_path, tiny_bundles):
    registry = Registry(tmp_path / "models")
    manager = manager_of(registry)
    manager.start()
    eventually(lambda: manager.status().last_error)
    assert manager.current is None
    registry.publish(tiny_bundles.one)
    eventually(lambda: manager.current)
    manager.close()


def test_the_old_captioner_answers_while_the_next_is_loaded(registry, tiny_captioner):
    load = Loader(tiny_captioner)
    manager = manager_of(registry, load=load)
    manager.check()
    load.go_on.clear()
    registry.promote("tiny", "2")
    manager.start()
    eventually(lambda: manager.status().loading)
    assert manager.current is tiny_captioner
    assert manager.status().active.version == "1"
    load.go_on.set()
    eventually(lambda: manager.status().swaps == 2)
    manager.close()


def test_another_reference_is_followed_at_once(registry):
    manager = manager_of(registry, poll_s=60.0)
    manager.start()
    eventually(lambda: manager.current)
    manager.follow("tiny@2")
    eventually(lambda: manager.current.version == "2")
    manager.follow("tiny@9")
    eventually(lambda: manager.status().last_error)
    assert manager.current.version == "2"
    manager.close()
