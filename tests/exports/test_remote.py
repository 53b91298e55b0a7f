"""A registry at a URL: fetched whole or not at all, whatever the far side does."""

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from exports.bundle import Bundle
from exports.errors import BundleError, RegistryError
from exports.registry import Registry
from exports.remote import RemoteRegistry, default_cache, is_url, open_source
from exports.shadow_plan import ShadowPlan

Write = Callable[[Path], Path]
ROOT = "faulty://models"


class _Reader(BytesIO):
    """A file whose bytes are meddled with on their way."""

    def __init__(self, path: str, body: bytes) -> None:
        super().__init__(body)
        self._path = path

    def read(self, size: int | None = -1) -> bytes:
        body = super().read(size)
        return body if Faulty.meddle is None else Faulty.meddle(self._path, body)


class Faulty(MemoryFileSystem):
    """A filesystem in memory that counts what is read, and fails when it is told to."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False
    gone = False
    reads: ClassVar[list[str]] = []
    meddle: Callable[[str, bytes], bytes] | None = None

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        self._here()
        opened = super()._open(path, mode, **more)
        if "w" in mode:
            return opened
        type(self).reads.append(path.rpartition("/")[2])
        return _Reader(path, opened.getvalue())

    def info(self, path: str, **more: Any) -> Any:
        self._here()
        return super().info(path, **more)

    def ls(self, path: str, detail: bool = True, **more: Any) -> Any:
        self._here()
        return super().ls(path, detail, **more)

    def _here(self) -> None:
        if type(self).gone:
            raise ConnectionError("secret-host refuses")


fsspec.register_implementation("faulty", Faulty, clobber=True)


@pytest.fixture
def faulty() -> Iterator[type[Faulty]]:
    yield Faulty
    Faulty.store, Faulty.pseudo_dirs, Faulty.reads = {}, [""], []
    Faulty.gone, Faulty.meddle = False, None


@pytest.fixture
def local(tmp_path: Path, write: Write) -> Registry:
    """A registry with versions 1 and 2, of which 1 is in production."""
    registry = Registry(tmp_path / "local")
    source = write(tmp_path / "source")
    registry.publish(source)
    registry.publish(source)
    registry.promote("tiny", "1")
    return registry


def sync(local: Registry, url: str = ROOT) -> None:
    """Brings a registry to a URL."""
    fs, root = fsspec.url_to_fs(url)
    for path in sorted(local.root.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            fs.pipe_file(f"{root}/{path.relative_to(local.root).as_posix()}", path.read_bytes())


@pytest.fixture
def remote(tmp_path: Path, local: Registry, faulty: type[Faulty]) -> RemoteRegistry:
    sync(local)
    return RemoteRegistry(ROOT, tmp_path / "cache")


def fetch(remote: RemoteRegistry, reference: str = "tiny") -> Path:
    with remote.held(remote.find(reference).resolved) as folder:
        return folder


def kept(tmp_path: Path) -> list[str]:
    """Returns what the cache holds, hidden things too."""
    return sorted(
        path.relative_to(tmp_path / "cache").as_posix().partition("/")[2]
        for path in (tmp_path / "cache").glob("*/tiny/*")
    )


def test_it_means_what_the_same_folder_means(
    local: Registry, remote: RemoteRegistry, tmp_path: Path
) -> None:
    for reference in ("tiny", "tiny@2", "tiny@production"):
        assert remote.find(reference).resolved.reference == local.resolve(reference).reference
    assert Bundle.open(fetch(remote)).digest == Bundle.open(local.resolve("tiny").path).digest
    assert kept(tmp_path) == ["tiny/1"]
    assert remote.shadow("tiny") is None
    local.set_shadow("tiny", ShadowPlan(version="2"))
    sync(local)
    assert remote.shadow("tiny") == ShadowPlan(version="2")
    with pytest.raises(RegistryError, match="only read"):
        remote.conclude_shadow("tiny", ShadowPlan(version="2"), "promoted", promote=True)
    for reference, words in (
        ("tiny@9", "no tiny@9 in faulty://models; tiny has 1, 2, production"),
        ("other", "no other in faulty://models; other has nothing"),
        ("../tiny", "is no model name"),
        ("tiny@../1", "no tiny@../1"),
    ):
        with pytest.raises(RegistryError, match=words):
            remote.find(reference)


def test_without_an_alias_it_is_the_highest_complete_version(
    local: Registry, remote: RemoteRegistry, faulty: type[Faulty]
) -> None:
    for _ in range(9):
        local.publish(local.root / "tiny" / "1")
    sync(local)
    files, root = fsspec.url_to_fs(ROOT)
    files.rm(f"{root}/tiny/aliases.json")
    files.rm(f"{root}/tiny/11/manifest.json")  # it is copied last: 11 is on its way
    assert remote.find("tiny").resolved.version == "10"
    assert remote.versions("tiny") == [str(number) for number in range(1, 11)]


def test_what_is_here_is_not_fetched_again_but_checked(
    remote: RemoteRegistry, faulty: type[Faulty]
) -> None:
    folder = fetch(remote)
    assert "decoder.onnx" in faulty.reads
    faulty.reads.clear()
    fetch(remote)
    assert faulty.reads == ["aliases.json", "manifest.json"]
    (folder / "decoder.onnx").write_bytes(b"rotten")
    assert Bundle.open(fetch(remote)).read("decoder.onnx") == b"decoder" * 100


def test_another_bundle_under_the_same_version_is_noticed(
    local: Registry, remote: RemoteRegistry, write: Write, tmp_path: Path
) -> None:
    before = remote.find("tiny")
    assert remote.find("tiny") == before
    fetch(remote)
    shutil.rmtree(local.root / "tiny" / "1")
    manifest = Bundle.open(tmp_path / "source").manifest
    assert manifest.description != "another"
    source = tmp_path / "source" / "manifest.json"
    source.write_text(source.read_text().replace(manifest.description, "another"))
    local.publish(tmp_path / "source", version="1")
    time.sleep(0.01)
    sync(local)
    assert remote.find("tiny") != before
    assert Bundle.open(fetch(remote)).manifest.description == "another"


def _cut(path: str, body: bytes) -> bytes:
    return body[:10] if body and path.endswith("decoder.onnx") else body


def _flip(path: str, body: bytes) -> bytes:
    return body.replace(b"d", b"t") if path.endswith("decoder.onnx") else body


def _lengthen(path: str, body: bytes) -> bytes:
    return body + b"x" if path.endswith("decoder.onnx") else body


def _break(path: str, body: bytes) -> bytes:
    if path.endswith("tokenizer.json"):
        raise TimeoutError("secret-host is silent")
    return body


@pytest.mark.parametrize(
    ("meddle", "error", "words"),
    [
        (_cut, BundleError, "decoder.onnx has 10 bytes, but the manifest says 700"),
        (_flip, BundleError, "decoder.onnx has the sha256"),
        (_lengthen, BundleError, "decoder.onnx has 701 bytes, but the manifest says 700"),
        (_break, RegistryError, "faulty://models cannot be read: TimeoutError"),
    ],
)
def test_what_fails_on_its_way_leaves_nothing(
    remote: RemoteRegistry,
    faulty: type[Faulty],
    tmp_path: Path,
    meddle: Any,
    error: type[Exception],
    words: str,
) -> None:
    faulty.meddle = staticmethod(meddle)
    with pytest.raises(error, match=words) as caught:
        fetch(remote)
    assert "secret" not in str(caught.value)
    assert kept(tmp_path) == []
    faulty.meddle = None
    assert Bundle.open(fetch(remote)).manifest.version == "1"


def test_an_endless_file_is_cut_off_where_its_manifest_says(
    remote: RemoteRegistry, faulty: type[Faulty]
) -> None:
    written = []

    def endless(path: str, body: bytes) -> bytes:
        if path.endswith("encoder.onnx"):
            written.append(1)
            return b"x" * 500
        return body

    faulty.meddle = staticmethod(endless)
    with pytest.raises(BundleError, match=r"encoder.onnx has 1000 bytes"):
        fetch(remote)
    assert len(written) == 2


def test_a_file_that_is_missing_is_named(remote: RemoteRegistry) -> None:
    files, root = fsspec.url_to_fs(ROOT)
    files.rm(f"{root}/tiny/1/join.onnx")
    with pytest.raises(BundleError, match=r"tiny/1/join\.onnx is missing") as caught:
        fetch(remote)
    assert caught.value.cause == "hash"


def test_what_is_too_large_is_not_begun(
    remote: RemoteRegistry, faulty: type[Faulty], tmp_path: Path
) -> None:
    small = RemoteRegistry(ROOT, tmp_path / "cache", max_bytes=1000)
    with pytest.raises(BundleError, match="1000 are allowed") as caught:
        fetch(small)
    assert caught.value.cause == "memory"
    files, root = fsspec.url_to_fs(ROOT)
    files.pipe_file(f"{root}/tiny/aliases.json", b"{" + b" " * 2**20)
    with pytest.raises(RegistryError, match="longer than 1048576 bytes"):
        remote.find("tiny")
    files.pipe_file(f"{root}/tiny/2/manifest.json", b" " * (2**24 + 1))
    files.rm(f"{root}/tiny/aliases.json")
    with pytest.raises(BundleError, match="no manifest is so long"):
        fetch(remote)
    assert "encoder.onnx" not in faulty.reads


def test_a_slow_registry_is_given_up(
    remote: RemoteRegistry, faulty: type[Faulty], tmp_path: Path
) -> None:
    def slow(path: str, body: bytes) -> bytes:
        if path.endswith(".onnx"):
            time.sleep(0.05)
        return body

    faulty.meddle = staticmethod(slow)
    hurried = RemoteRegistry(ROOT, tmp_path / "cache", fetch_s=0.08)
    with pytest.raises(RegistryError, match=r"too slow: tiny@1, .* within 0\.08 s"):
        fetch(hurried)
    assert kept(tmp_path) == []
    assert fetch(remote).is_dir()


def test_it_vanishes_and_comes_back(remote: RemoteRegistry, faulty: type[Faulty]) -> None:
    fetch(remote)
    faulty.gone = True
    for ask in (
        lambda: remote.find("tiny"),
        lambda: remote.shadow("tiny"),
        lambda: remote.versions("tiny"),
    ):
        with pytest.raises(RegistryError, match=r"cannot be read: ConnectionError$"):
            ask()
    faulty.gone = False
    assert remote.find("tiny").resolved.version == "1"


def test_old_versions_go_unless_they_are_being_loaded(
    local: Registry, remote: RemoteRegistry, tmp_path: Path
) -> None:
    local.publish(tmp_path / "source")
    sync(local)
    for version in "123":
        fetch(remote, f"tiny@{version}")
    with remote.held(remote.find("tiny@1").resolved):
        remote.keep("tiny", {"2", "3"})
        assert kept(tmp_path) == ["tiny/1", "tiny/2", "tiny/3"]
    remote.keep("tiny", {"2", "3"})
    assert kept(tmp_path) == ["tiny/2", "tiny/3"]
    remote.keep("other", set())


def test_two_who_fetch_at_once_have_one_bundle(
    remote: RemoteRegistry, faulty: type[Faulty], tmp_path: Path
) -> None:
    both = threading.Barrier(2)

    def together(path: str, body: bytes) -> bytes:
        if path.endswith("join.onnx") and body:
            both.wait(30)
        return body

    faulty.meddle = staticmethod(together)
    other = RemoteRegistry(ROOT, tmp_path / "cache")
    folders = []
    threads = [
        threading.Thread(target=lambda one=one: folders.append(fetch(one)))
        for one in (remote, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders[0] == folders[1]
    assert Bundle.open(folders[0]).manifest.version == "1"
    assert kept(tmp_path) == ["tiny/1"]


def test_the_slower_of_two_leaves_what_the_faster_one_has(
    remote: RemoteRegistry, faulty: type[Faulty], tmp_path: Path
) -> None:
    faster: list[Path] = []
    found: list[int] = []

    def overtaken(path: str, body: bytes) -> bytes:
        if path.endswith("join.onnx") and body and not found:
            found.append(0)
            faster.append(fetch(RemoteRegistry(ROOT, tmp_path / "cache")))
            found[0] = faster[0].stat().st_ino
        return body

    faulty.meddle = staticmethod(overtaken)
    slower = fetch(remote)
    assert faster == [slower]
    assert found == [slower.stat().st_ino]
    assert kept(tmp_path) == ["tiny/1"]


CHILD = """
import os, resource, signal, sys
from pathlib import Path
from exports import remote
from exports.errors import RegistryError

how, url, cache = sys.argv[1:]
if how == "kill":
    def killed(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    remote.check_file = killed
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
registry = remote.RemoteRegistry(url, Path(cache))
try:
    with registry.held(registry.find("tiny").resolved):
        pass
except RegistryError as error:
    print(error)
"""


@contextmanager
def child(how: str, url: str, cache: Path) -> Iterator["subprocess.CompletedProcess[str]"]:
    command = [sys.executable, "-c", CHILD, how, url, str(cache)]
    yield subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_full_disk_and_a_kill_leave_nothing_that_is_taken_for_a_bundle(
    local: Registry, tmp_path: Path
) -> None:
    url, cache = f"file://{local.root}", tmp_path / "cache"
    with child("full", url, cache) as done:
        assert "cannot be kept in" in done.stdout and "File too large" in done.stdout, done
    assert kept(tmp_path) == []
    with child("kill", url, cache) as done:
        assert done.returncode == -9, done
    [stage] = kept(tmp_path)
    assert stage.startswith("tiny/.stage-")
    [path] = cache.glob("*/tiny/.stage-*")
    os.utime(path, (0, 0))
    assert Bundle.open(fetch(RemoteRegistry(url, cache))).manifest.version == "1"
    assert kept(tmp_path) == ["tiny/1"]


def test_a_cache_of_somebody_else_s_is_not_used(local: Registry, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "theirs")
    with pytest.raises(RegistryError, match="not this user's own folder"):
        fetch(RemoteRegistry(f"file://{local.root}", tmp_path / "cache"))
    assert default_cache().name == f"cutline-registry-{os.getuid()}"


def test_a_damaged_one_in_the_cache_that_is_being_loaded_stays(
    remote: RemoteRegistry, tmp_path: Path
) -> None:
    folder = fetch(remote)
    (folder / "join.onnx").write_bytes(b"rotten")
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    with pytest.raises(RegistryError, match="cannot be kept"):
        fetch(remote)
    os.close(lock)
    assert Bundle.open(fetch(remote)).read("join.onnx") == b"join"
    assert kept(tmp_path) == ["tiny/1"]


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RegistryError, match=r"nothing://x: .*nothing"):
        RemoteRegistry("nothing://x", tmp_path).find("tiny")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(RegistryError, match=r"pip install 'cutline\[remote\]'"):
        RemoteRegistry("memory://x", tmp_path).find("tiny")


def test_a_location_is_a_folder_or_a_url(tmp_path: Path) -> None:
    assert is_url("s3://bucket/models") and not is_url(tmp_path)
    assert isinstance(open_source(tmp_path), Registry)
    source = open_source("s3://bucket/models/", tmp_path)
    assert source.roots[0] == "s3://bucket/models"
