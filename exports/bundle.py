"""A bundle on disk: written atomically, and never believed before every byte is verified.

Writing goes to a hidden folder beside the target, is flushed to the disk, and appears under its
name by one rename. So a folder under a version's name is complete, whenever the writer was killed.
"""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from exports.disk import settle_folder, sync_folder, write_durably
from exports.errors import BundleError
from exports.manifest import MANIFEST_FILE, FileEntry, Manifest
from exports.text import Tokenizer

_log = logging.getLogger(__name__)
MAX_MANIFEST_BYTES = 16 * 1024 * 1024
_STAGE_PREFIX = ".stage-"
# A stage this young may belong to a writer that has not locked it yet.
_STAGE_GRACE_S = 60.0
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


def write_bundle(target: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Manifest:
    """Writes a bundle to the folder `target`, all or nothing, and returns its full manifest.

    Args:
        target: The folder to make; its parents are made too.
        manifest: The manifest, `files` still empty.
        files: The content of every file of the bundle by its relative posix path.

    Raises:
        BundleError: `target` exists, a file that the manifest names is not given, or the disk
            refuses (full, read-only). Nothing is left under `target` then.
    """
    manifest = with_files(manifest, files)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with staged(target.parent, files) as stage:
            publish_stage(stage, manifest, target)
    except FileExistsError as error:
        raise BundleError(f"{target} exists already; a bundle is never overwritten") from error
    except OSError as error:
        raise BundleError(
            f"cannot write {target}: {error.strerror}; nothing was changed"
        ) from error
    return manifest


def with_files(manifest: Manifest, files: Mapping[str, bytes]) -> Manifest:
    """Returns `manifest` with the hash and size of `files`.

    Raises:
        BundleError: A file that the manifest names is missing, or a file's name is not allowed.
    """
    entries = {
        name: FileEntry(sha256=hashlib.sha256(body).hexdigest(), size=len(body))
        for name, body in sorted(files.items())
    }
    full = Manifest.from_json(manifest.model_copy(update={"files": entries}).to_json())
    _check_required(full)
    return full


@contextmanager
def staged(parent: Path, files: Mapping[str, bytes]) -> Iterator[Path]:
    """Yields a hidden folder in `parent` with `files` flushed to the disk; removes it afterwards.

    `publish_stage` moves it to its place before. What killed writers left behind goes too.
    """
    _sweep(parent)
    stage = Path(tempfile.mkdtemp(prefix=_STAGE_PREFIX, dir=parent))
    lock = os.open(stage, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # gone with the process: marks the stage as being written
        stage.chmod(0o755)  # mkdtemp keeps others out; a server runs as another user
        for name, body in files.items():
            path = stage / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, body)
        for folder in {path.parent for path in (stage / name for name in files)}:
            sync_folder(folder)
        yield stage
    finally:
        os.close(lock)
        shutil.rmtree(stage, ignore_errors=True)


def publish_stage(stage: Path, manifest: Manifest, target: Path) -> None:
    """Writes the manifest into `stage` and renames it to `target`.

    Raises:
        FileExistsError: `target` is taken. Of two writers at once exactly one gets it.
        OSError: The disk refuses; `target` is not there.
    """
    if target.is_symlink() or target.exists():
        raise FileExistsError(errno.EEXIST, "exists already", str(target))
    write_durably(stage / MANIFEST_FILE, manifest.to_json())
    sync_folder(stage)
    try:
        stage.rename(target)
    except OSError as error:
        if error.errno in _TAKEN:
            raise FileExistsError(errno.EEXIST, "exists already", str(target)) from error
        raise
    settle_folder(target.parent)


class Bundle:
    """A verified bundle, its files in memory: what was hashed is what is read.

    Attributes:
        path: The folder that it was read from.
        manifest: Its manifest.
        digest: The sha256 of manifest.json, which pins every other file.
    """

    def __init__(self, path: Path, manifest_json: bytes, files: dict[str, bytes]) -> None:
        """Use `Bundle.open`."""
        self.path = path
        self.manifest = Manifest.from_json(manifest_json)
        self.digest = hashlib.sha256(manifest_json).hexdigest()
        self._files = files

    @classmethod
    def open(cls, path: Path | str) -> "Bundle":
        """Reads and verifies the bundle in the folder `path`.

        Raises:
            BundleError: No manifest, or a file that is missing, extra, a symbolic link, of another
                size or of another sha256. The message names the file.
        """
        path = Path(path)
        if not path.is_dir():
            raise BundleError(f"{path} is not a folder, so no bundle")
        try:
            return cls._open(path)
        except BundleError as error:
            raise BundleError(f"{path}: {error}", error.cause) from error
        except OSError as error:
            what = f"{error.filename or path}: {error.strerror}"
            raise BundleError(what, "registry") from error

    @classmethod
    def _open(cls, path: Path) -> "Bundle":
        found = _regular_files(path)
        if MANIFEST_FILE not in found:
            raise BundleError(f"no {MANIFEST_FILE}: not a bundle, or a half-written one")
        manifest_json = read_manifest(path)
        manifest = Manifest.from_json(manifest_json)
        _check_required(manifest)
        for name in sorted(found - manifest.files.keys() - {MANIFEST_FILE}):
            raise BundleError(f"{name} is there, but {MANIFEST_FILE} does not list it", "hash")
        files = {}
        for name, entry in manifest.files.items():
            if name not in found:
                raise BundleError(f"{name} is missing, but {MANIFEST_FILE} lists it", "hash")
            files[name] = _verified(name, path / name, entry)
        return cls(path, manifest_json, files)

    def read(self, name: str) -> bytes:
        """Returns the verified bytes of a file.

        Raises:
            BundleError: The bundle has no such file.
        """
        if name not in self._files:
            raise BundleError(f"{self.path} has no {name}; it has {', '.join(sorted(self._files))}")
        return self._files[name]

    def files(self) -> dict[str, bytes]:
        """Returns the verified bytes of every file but the manifest, by name."""
        return dict(self._files)

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer.

        Raises:
            BundleError: The tokenizer does not fit the manifest.
        """
        return Tokenizer(self.read(self.manifest.tokenizer_file), self.manifest.text)


def _check_required(manifest: Manifest) -> None:
    for name in manifest.required_files():
        if name not in manifest.files:
            raise BundleError(f"the manifest speaks of {name}, but it is not among the files")


def _regular_files(path: Path) -> set[str]:
    """Returns the relative posix path of every file below; refuses all but files and folders."""
    found = set()
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            entry = Path(folder, name)
            relative = entry.relative_to(path).as_posix()
            mode = entry.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise BundleError(
                    f"{relative} is a symbolic link; a bundle holds plain files only", "hash"
                )
            if stat.S_ISREG(mode):
                found.add(relative)
            elif not stat.S_ISDIR(mode):
                raise BundleError(f"{relative} is neither a file nor a folder", "hash")
    return found


def read_manifest(path: Path) -> bytes:
    """Returns the bytes of the manifest of the bundle in the folder `path`, not verified.

    Raises:
        BundleError: It is longer than any manifest.
        OSError: It cannot be read.
    """
    return _read(path / MANIFEST_FILE, check_manifest_size)


def check_manifest_size(size: int) -> None:
    """Raises BundleError if a manifest of `size` bytes is too long to be one."""
    if size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{MANIFEST_FILE} has {size} bytes: no manifest is so long")


def check_file(name: str, size: int, digest: str, entry: FileEntry) -> None:
    """Raises BundleError if a file's size and sha256 are not those of the manifest's entry."""
    check_size(name, size, entry)
    if digest != entry.sha256:
        raise BundleError(
            f"{name} has the sha256 {digest[:16]}..., but the manifest says {entry.sha256[:16]}...:"
            " damaged or tampered with",
            "hash",
        )


def check_size(name: str, size: int, entry: FileEntry) -> None:
    """Raises BundleError if a file's size is not that of the manifest's entry."""
    if size != entry.size:
        raise BundleError(f"{name} has {size} bytes, but the manifest says {entry.size}", "hash")


def _read(path: Path, check: Callable[[int], None]) -> bytes:
    """Returns the bytes of a file whose size, checked before it is read, is as it should be."""
    # O_NOFOLLOW: a link put in place after the look at the folder is refused all the same.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        check(os.fstat(file.fileno()).st_size)
        return file.read()


def _verified(name: str, path: Path, entry: FileEntry) -> bytes:
    body = _read(path, lambda size: check_size(name, size, entry))
    check_file(name, len(body), hashlib.sha256(body).hexdigest(), entry)
    return body


def _sweep(parent: Path) -> None:
    """Removes the stages of writers that died; those of living ones are locked."""
    for stage in parent.glob(f"{_STAGE_PREFIX}*"):
        with suppress(OSError):
            if time.time() - stage.stat().st_mtime < _STAGE_GRACE_S:
                continue
            descriptor = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stage, ignore_errors=True)
            finally:
                os.close(descriptor)
