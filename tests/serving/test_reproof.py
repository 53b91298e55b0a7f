"""Readiness: a correct caption, at loading, after a swap, and again while the server runs."""

import asyncio

import pytest
from live import PNG, captions_of, check_problem, running, until

from exports.registry import Registry
from serving.deployment import CaptionService
from serving.errors import CaptionFailed, QueueFull
from serving.reproof import Reproof
from serving.settings import Settings


@pytest.fixture
def root(tmp_path, tiny_bundles):
    registry = Registry(tmp_path)
    registry.publish(tiny_bundles.one)
    registry.publish(tiny_bundles.two)
    registry.promote("tiny", "1")
    return tmp_path


def spoil(captioner):
    """Makes a captioner give other captions to its golden images than it promises."""
    captioner.golden_pixels = [255 - pixels for pixels in captioner.golden_pixels]


def test_ready_follows_the_proofs_and_a_swap_heals(root, photos):
    with running(root, reproof_s=0.05) as live:
        until(lambda: live.metrics()["cutline_proofs_total", "passed"] >= 4)  # each golden image
        assert live.client.get("/readyz").json()["version"] == "1"

        spoil(live.manager.current)
        until(lambda: live.metrics()["cutline_ready",] == 0)
        problem = check_problem(live.client.get("/readyz"), 503)
        assert "tiny@1 fails: golden/" in problem["detail"]
        captions_of(live.caption(photos[0], headers=PNG))  # better than nothing

        live.registry.promote("tiny", "2")
        until(lambda: live.client.get("/readyz").status_code == 200)
        assert live.client.get("/readyz").json()["version"] == "2"
        passed = live.metrics()["cutline_proofs_total", "passed"]
        until(lambda: live.metrics()["cutline_proofs_total", "passed"] > passed + 3)
        found = live.metrics()
        assert found["cutline_ready",] == 1
        assert found["cutline_caption_words_count",] == 1  # proofs are no clients


class Counted:
    def __init__(self):
        self.outcomes = []

    def proof_done(self, outcome):
        self.outcomes.append(outcome)


class Answering:
    """An engine whose answer is set."""

    def __init__(self):
        self.answer = None

    async def submit(self, captioner, pixels, params, deadline):
        if isinstance(self.answer, Exception):
            raise self.answer
        [captions] = captioner.caption_batch([pixels], [params])
        return captions


def test_being_busy_is_no_fault_but_failing_is(tiny_captioner):
    metrics, engine = Counted(), Answering()
    reproof = Reproof(lambda: tiny_captioner, engine, metrics, every_s=1, deadline_s=1)
    told = []
    for answer in (None, QueueFull("full", retry_after=1), CaptionFailed("NaN."), None):
        engine.answer = answer
        asyncio.run(reproof.prove())
        told.append((reproof.fault, reproof.failures))
    assert metrics.outcomes == ["passed", "skipped", "failed", "passed"]
    assert told == [("", 0), ("", 0), ("golden/2.png: NaN.", 1), ("", 0)]


def test_serve_replaces_a_replica_that_fails_again_and_again(root, monkeypatch, tmp_path):
    monkeypatch.setattr("serving.deployment.node_folder", lambda: tmp_path / "node")
    service = CaptionService(
        Settings(registry=root, model="tiny", threads=1, provider="cpu", reproof_s=0)
    )
    service.check_health()  # before there is an app
    app = service.__serve_build_asgi_app__()
    service.check_health()
    spoil(service._manager.current)
    for _ in range(3):
        service.check_health()
        asyncio.run(app.state.server.reproof.prove())
    with pytest.raises(RuntimeError, match="is captioned"):
        service.check_health()
    service._engine.close()
