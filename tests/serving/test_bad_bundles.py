"""Every kind of bad bundle, promoted while requests flow: none fails, and the cause is named."""

import json
import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import httpx
import pytest
from live import PNG, captions_of, expected, running, until

from exports.bundle import Bundle, write_bundle
from exports.errors import BundleError
from exports.manifest import FileEntry
from exports.registry import Registry
from serving import headroom
from serving.captioner import Captioner
from serving.errors import BundleRejected


def changed(bundle, target, *, files=None, **fields):
    """Writes a copy of a bundle in which all hashes are right, but not all that is in it."""
    opened = Bundle.open(bundle)
    manifest = opened.manifest.model_copy(update={"files": {}, **fields})
    write_bundle(target, manifest, opened.files() | (files or {}))
    return target


def load(path):
    """Loads as a server does, but for a bundle that is too slow, whatever its speed."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    slow = {"proof_s": 0.0} if manifest.get("description") == "slow" else {}
    return Captioner.load(path, threads=1, provider="cpu", **slow)


class Faults:
    """Each method makes what version `version` is, and returns words of the reason."""

    def __init__(self, registry, bundles, scratch):
        self.registry, self.bundles, self.scratch = registry, bundles, scratch

    def _publish(self, version, bundle=None):
        self.registry.publish(bundle or self.bundles.two, version=version)
        return self.registry.root / "tiny" / version

    def _publish_changed(self, version, **changes):
        source = changed(self.bundles.two, self.scratch / version, **changes)
        return self._publish(version, source)

    def flipped_bit(self, version):
        path = self._publish(version) / "decoder.onnx"
        body = bytearray(path.read_bytes())
        body[len(body) // 2] ^= 1
        path.write_bytes(body)
        return "hash", "decoder.onnx has the sha256"

    def longer_file(self, version):
        path = self._publish(version) / "decoder.onnx"
        path.write_bytes(path.read_bytes() + b"x")
        return "hash", "decoder.onnx has"

    def extra_file(self, version):
        (self._publish(version) / "extra.bin").write_bytes(b"")
        return "hash", "extra.bin is there"

    def missing_file(self, version):
        (self._publish(version) / "encoder.onnx").unlink()
        return "hash", "encoder.onnx is missing"

    def symbolic_link(self, version):
        path = self._publish(version) / "encoder.onnx"
        path.unlink()
        path.symlink_to(self.bundles.two / "encoder.onnx")
        return "hash", "symbolic link"

    def misspelt_manifest(self, version):
        path = self._publish(version) / "manifest.json"
        path.write_text(path.read_text().replace('"licence"', '"license"'))
        return "manifest", "licence: Field required"

    def no_json(self, version):
        (self._publish(version) / "manifest.json").write_bytes(b"{")
        return "manifest", "manifest.json: the whole file"

    def endless_manifest(self, version):
        with (self._publish(version) / "manifest.json").open("r+b") as file:
            file.truncate(2**40)  # a hole: it takes no room on the disk
        return "manifest", "no manifest is so long"

    def another_s_place(self, version):
        shutil.copytree(self.registry.root / "tiny" / "2", self.registry.root / "tiny" / version)
        return "manifest", f"is of tiny@2, but stands under tiny@{version}"

    def truncated_graph(self, version):
        whole = Bundle.open(self.bundles.two).read("decoder.onnx")
        self._publish_changed(version, files={"decoder.onnx": whole[: len(whole) // 2]})
        return "onnx", "the decoder is no ONNX file: it is cut off"

    def wrong_graph(self, version):
        encoder = Bundle.open(self.bundles.two).read("encoder.onnx")
        self._publish_changed(version, files={"decoder.onnx": encoder})
        return "onnx", "the decoder has the inputs"

    def nan_weights(self, version):
        self._publish(version, self.bundles.nan)
        return "golden", "not finite"

    def other_captions(self, version):
        self._publish(version, self.bundles.broken_golden)
        return "golden", "but the manifest promises"

    def other_match(self, version):
        self._publish(version, self.bundles.broken_match)
        return "golden", "golden/1.png"

    def no_golden_images(self, version):
        self._publish_changed(version, golden=())
        return "golden", "without golden captions there is no proof"

    def too_large(self, version):
        path = self._publish(version) / "manifest.json"
        manifest = json.loads(path.read_bytes())
        manifest["files"]["weights.bin"] = FileEntry(sha256="0" * 64, size=10**14).model_dump()
        path.write_text(json.dumps(manifest))
        return "memory", "of memory are left"

    def too_slow(self, version):
        self._publish_changed(version, description="slow")
        return "slow", "3 golden images took"

    def half_written(self, version):
        self._publish(version)
        return "registry", f"(which is version {version})"


KINDS = [name for name in vars(Faults) if not name.startswith("_")]


@pytest.fixture(scope="module")
def registry(tmp_path_factory, tiny_bundles):
    registry = Registry(tmp_path_factory.mktemp("registry"))
    registry.publish(tiny_bundles.one)
    registry.publish(tiny_bundles.two)
    registry.promote("tiny", "1")
    return registry


@pytest.fixture(scope="module")
def live(registry):
    with running(registry.root, load=load) as live:
        yield live


@contextmanager
def requests(live, photos, texts, *, clients=2):
    """Sends requests while the block runs; every one must be answered by version 1, and rightly."""
    stop = threading.Event()
    answered = [0] * clients

    def stream(which):
        with httpx.Client(base_url=live.client.base_url, timeout=60) as client:
            while not stop.is_set():
                at = answered[which] % len(photos)
                response = client.post("/v1/captions", content=photos[at], headers=PNG)
                assert captions_of(response)[0][0]["text"] == texts[at]
                assert response.json()["version"] == "1"
                answered[which] += 1

    with ThreadPoolExecutor(clients) as pool:
        streams = [pool.submit(stream, which) for which in range(clients)]
        try:
            yield answered
        finally:
            stop.set()
        for one in streams:
            one.result()


def point(registry, aliases):
    """Replaces the aliases as a whole."""
    path = registry.root / "tiny" / "aliases.json"
    path.with_suffix(".new").write_text(json.dumps(aliases))
    path.with_suffix(".new").replace(path)


def refusals(live):
    return {
        key[1]: value
        for key, value in live.metrics().items()
        if key[0] == "cutline_bundles_refused_total"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_it_changes_nothing_and_says_why(
    kind, live, registry, tiny_bundles, tiny_captioner, photos, tmp_path, caplog
):
    version = str(10 + KINDS.index(kind))
    texts = [expected(tiny_captioner, photo)[0]["text"] for photo in photos]
    before = refusals(live)
    # The alias as a publisher moves it who does not look: `promote` would refuse most of these.
    good = {"production": "1"}
    cause, words = getattr(Faults(registry, tiny_bundles, tmp_path), kind)(version)
    if kind == "half_written":
        (registry.root / "tiny" / version / "manifest.json").unlink()
    with caplog.at_level(logging.ERROR), requests(live, photos, texts) as answered:
        point(registry, {"production": version})
        until(lambda: live.manager.status().last_error)
        seen = list(answered)
        until(lambda: all(now > then + 3 for now, then in zip(answered, seen, strict=True)))
        error = live.client.get("/v1/models").json()["models"][0]["last_error"]
        point(registry, good)
        until(lambda: live.manager.status().last_error is None)
    assert (error["cause"], words in error["reason"]) == (cause, True), error
    assert error["version"] == ("" if cause == "registry" else version)
    assert str(registry.root) not in error["reason"]
    assert refusals(live) == before | {cause: before[cause] + 1}
    assert any(f": {cause}: " in record.getMessage() for record in caplog.records)
    assert live.manager.status().swaps == 1


def test_a_registry_that_vanishes_for_a_while_harms_nobody(
    live, registry, tiny_captioner, photos, tmp_path
):
    texts = [expected(tiny_captioner, photo)[0]["text"] for photo in photos]
    away = tmp_path / "away"
    with requests(live, photos, texts) as answered:
        registry.root.rename(away)
        until(lambda: live.manager.status().last_error)
        assert live.manager.status().last_error.cause == "registry"
        assert live.client.get("/readyz").status_code == 200
        seen = sum(answered)
        until(lambda: sum(answered) > seen + 10)
        away.rename(registry.root)
        until(lambda: live.manager.status().last_error is None)
    assert live.manager.status().swaps == 1


def test_a_registry_that_cannot_be_read_is_no_surprise(live, registry, monkeypatch):
    def failing(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Registry, "versions", failing)
    monkeypatch.setattr(Registry, "_taken", failing)
    monkeypatch.setattr(Registry, "resolve", lambda *_: failing(0))
    until(lambda: live.manager.status().last_error)
    error = live.manager.status().last_error
    assert (error.cause, error.reason) == (
        "registry",
        "the registry cannot be read: Input/output error",
    )
    monkeypatch.undo()
    until(lambda: live.manager.status().last_error is None)


def test_memory_that_runs_out_in_a_graph_is_told_from_a_bad_graph(tiny_bundles, monkeypatch):
    words = "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc"
    for error, cause in (
        (RuntimeError(words), "memory"),
        (MemoryError(), "memory"),
        (RuntimeError("no such operator"), "onnx"),
    ):

        def failing(*_, error=error):
            raise error

        monkeypatch.setattr(Captioner, "_golden_answers", failing)
        with pytest.raises(BundleRejected, match="do not run") as caught:
            Captioner.load(tiny_bundles.one, threads=1)
        assert caught.value.cause == cause


def test_what_is_left_is_the_least_that_anybody_allows(tmp_path, monkeypatch, tiny_bundles):
    group = tmp_path / "memory"
    group.mkdir()
    for name, text in (
        ("memory.limit_in_bytes", "1000000"),
        ("memory.usage_in_bytes", "900000"),
        ("memory.stat", "cache 5\ninactive_file 50000\n"),
    ):
        (group / name).write_text(text)
    monkeypatch.setattr(headroom, "_GROUPS", tmp_path)
    assert headroom.free_bytes() == 150_000
    size = sum(entry.size for entry in Bundle.open(tiny_bundles.one).manifest.files.values())
    monkeypatch.setattr(headroom, "free_bytes", lambda: 3 * size)
    headroom.check_room(tiny_bundles.one)
    monkeypatch.setattr(headroom, "free_bytes", lambda: 3 * size - 1)
    with pytest.raises(BundleError, match="memory are left") as caught:
        headroom.check_room(tiny_bundles.one)
    assert caught.value.cause == "memory"
    monkeypatch.setattr(headroom, "free_bytes", lambda: None)
    headroom.check_room(tiny_bundles.one)


def test_a_server_keeps_its_captions_when_it_loads_as_it_should(tiny_bundles):
    with pytest.raises(BundleRejected, match="golden images took") as caught:
        partial(Captioner.load, threads=1, proof_s=0.0)(tiny_bundles.one)
    assert caught.value.cause == "slow"
