"""A registry at a URL, as a server follows it: `s3://`, `memory://`, whatever fsspec can open.

It is read only. A version is copied into a folder of this machine before it is loaded, whole or not
at all: every file is hashed on its way and none may be longer than its manifest says. What the
folder holds is never believed: it is compared with the manifest at the URL each time.

Layout, aliases and names are those of a local registry. Whoever brings one to the URL copies a
version's manifest.json after its other files, and aliases.json last.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from exports.bundle import (
    MAX_MANIFEST_BYTES,
    Bundle,
    check_file,
    check_manifest_size,
    check_size,
    staged,
)
from exports.disk import folder_locked, settle_folder, sync_folder, write_durably
from exports.errors import BundleError, RegistryError
from exports.manifest import MANIFEST_FILE, VERSION_PATTERN, FileEntry, Manifest
from exports.registry import (
    ALIASES_FILE,
    PRODUCTION,
    Aliases,
    Found,
    Registry,
    Resolved,
    Source,
    check_place,
    checked_name,
    natural,
)
from exports.shadow_plan import SHADOW_FILE, ShadowPlan

MAX_BUNDLE_BYTES = 16 * 1024**3
FETCH_S = 1800.0
_CHUNK = 1024 * 1024
_MAX_SMALL_BYTES = 1024 * 1024  # of aliases.json and shadow.json
# Of these a filesystem gives those it knows; an ETag alone tells more than the others.
_STAMPS = ("ETag", "etag", "md5", "ino", "mtime", "LastModified", "last_modified", "created")


def is_url(location: Path | str) -> bool:
    """Returns whether a registry's location is a URL rather than a folder."""
    return "://" in str(location)


def open_source(location: Path | str, cache: Path | None = None) -> Source:
    """Returns the registry at a folder or a URL; nothing is read yet.

    Args:
        location: A folder, or a URL of fsspec's.
        cache: Where versions of a URL are kept; by default a folder of this user in the
            temporary folder.
    """
    if not is_url(location):
        return Registry(Path(location).absolute())
    return RemoteRegistry(str(location), cache or default_cache())


def default_cache() -> Path:
    """Returns a folder for what is fetched, of this user's own."""
    return Path(tempfile.gettempdir()) / f"cutline-registry-{os.getuid()}"


class RemoteRegistry:
    """The registry at `root`, a URL, whose bundles are fetched into `cache`."""

    def __init__(
        self,
        root: str,
        cache: Path,
        *,
        max_bytes: int = MAX_BUNDLE_BYTES,
        fetch_s: float = FETCH_S,
    ) -> None:
        """Points to a registry; nothing is read yet.

        Args:
            root: A URL of fsspec's.
            cache: A folder for this and other registries; made when it is needed.
            max_bytes: Of a bundle, at most.
            fetch_s: How long the copy of a bundle may take.
        """
        self.root = root.rstrip("/")
        self._own = cache
        self._cache = cache / hashlib.sha256(self.root.encode()).hexdigest()[:16]
        self._max_bytes = max_bytes
        self._fetch_s = fetch_s
        self._opened: tuple[Any, str] | None = None

    @property
    def roots(self) -> tuple[str, ...]:
        """Its URL, and the folder of what is fetched."""
        return self.root, str(self._cache)

    def find(self, reference: str) -> Found:
        """Returns what a reference stands for; asks for little, since it is called often.

        Raises:
            RegistryError: No such model, version or alias, or the registry cannot be read.
        """
        model, at, wanted = reference.partition("@")
        checked_name(model)
        self._forget_listings()
        aliases = self.aliases(model)
        meant = aliases.get(wanted if at else PRODUCTION)
        asked = meant or wanted
        candidates = [asked] if meant or at else self._named(model)[::-1]
        for version in candidates:  # the highest that is complete, without a look at the others
            if not VERSION_PATTERN.fullmatch(version):
                continue
            info = self._info(f"{model}/{version}/{MANIFEST_FILE}")
            if info is not None:
                stamp = " ".join(str(info[name]) for name in ("size", *_STAMPS) if info.get(name))
                return Found(Resolved(model, version, self._cache / model / version), stamp)
        known = ", ".join((*self.versions(model), *sorted(aliases))) or "nothing"
        words = f"{reference} (which is version {meant})" if meant else reference
        raise RegistryError(f"no {words} in {self.root}; {model} has {known}")

    def aliases(self, model: str) -> dict[str, str]:
        """Returns version by alias; raises RegistryError if aliases.json cannot be read."""
        body = self._small(f"{checked_name(model)}/{ALIASES_FILE}")
        try:
            return {} if body is None else Aliases.model_validate_json(body).root
        except ValidationError as error:
            raise RegistryError(
                f"{self.root}/{model}/{ALIASES_FILE} is not a table of alias to version"
            ) from error

    def versions(self, model: str) -> list[str]:
        """Returns the complete versions of a model, 2 before 10; none for an unknown model."""
        return [
            name for name in self._named(model) if self._info(f"{model}/{name}/{MANIFEST_FILE}")
        ]

    @contextmanager
    def held(self, resolved: Resolved) -> Iterator[Path]:
        """Fetches a bundle unless it is here, and keeps other processes from removing it.

        Raises:
            BundleError: What came is not what the manifest says.
            RegistryError: It did not come, not in time, or there is no room for it here.
        """
        folder = self._fetched(resolved)
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise RegistryError(f"{folder} is gone again: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield folder
        finally:
            os.close(lock)

    def keep(self, model: str, versions: Set[str]) -> None:
        """Removes what was fetched of other versions, unless a process is loading it."""
        folder = self._cache / model
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        for name in names:
            if VERSION_PATTERN.fullmatch(name) and name not in versions:
                _remove(folder / name)

    def shadow(self, model: str) -> ShadowPlan | None:
        """Returns the model's candidate, if there is one; raises RegistryError."""
        body = self._small(f"{checked_name(model)}/{SHADOW_FILE}")
        try:
            return None if body is None else ShadowPlan.model_validate_json(body)
        except ValidationError as error:
            raise RegistryError(
                f"{self.root}/{model}/{SHADOW_FILE} is not the plan of a shadow"
            ) from error

    def conclude_shadow(self, model: str, plan: ShadowPlan, verdict: str, *, promote: bool) -> bool:
        """Raises RegistryError: nothing is changed at a URL."""
        raise RegistryError(f"{self.root} is only read from here")

    def _named(self, model: str) -> list[str]:
        """Returns every name in the place of a version, complete or not, sorted naturally."""
        fs, root = self._filesystem()
        with self._asking():
            try:
                paths = fs.ls(f"{root}/{model}", detail=False)
            except FileNotFoundError:
                return []
        names = [str(path).rstrip("/").rpartition("/")[2] for path in paths]
        return sorted((name for name in names if VERSION_PATTERN.fullmatch(name)), key=natural)

    def _fetched(self, resolved: Resolved) -> Path:
        """Returns the folder of a bundle that is here, and is the one at the URL."""
        place = f"{resolved.model}/{resolved.version}"
        manifest_json = self._small(f"{place}/{MANIFEST_FILE}", MAX_MANIFEST_BYTES)
        if manifest_json is None:
            raise RegistryError(f"no {resolved.reference} in {self.root}")
        manifest = Manifest.from_json(manifest_json)
        check_place(manifest, Resolved(resolved.model, resolved.version, Path(place)))
        total = sum(entry.size for entry in manifest.files.values())
        if total > self._max_bytes:
            words = f"{resolved.reference} has {total} bytes; {self._max_bytes} are allowed"
            raise BundleError(words, "memory")
        folder = resolved.path
        if _is_whole(folder, manifest_json):
            return folder
        try:
            self._make_folder(folder.parent)
            with staged(folder.parent, {}) as stage:
                self._copy(place, manifest, stage)
                write_durably(stage / MANIFEST_FILE, manifest_json)
                sync_folder(stage)
                with folder_locked(folder.parent):
                    # Another was faster: whoever has that one, and has yet to hold it, keeps it.
                    if _is_whole(folder, manifest_json):
                        return folder
                    _remove(folder)  # a damaged one, or one that was replaced at the URL
                    stage.rename(folder)
                    settle_folder(folder.parent)
        except OSError as error:
            if _is_whole(folder, manifest_json):  # another process was faster
                return folder
            words = f"{resolved.reference} cannot be kept in {folder.parent}: {error.strerror}"
            raise RegistryError(words) from error
        return folder

    def _copy(self, place: str, manifest: Manifest, stage: Path) -> None:
        until = time.monotonic() + self._fetch_s
        for name, entry in manifest.files.items():
            path = stage / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._copy_file(f"{place}/{name}", name, entry, path, until)
        for folder in {(stage / name).parent for name in manifest.files}:
            sync_folder(folder)

    def _copy_file(
        self, source: str, name: str, entry: FileEntry, path: Path, until: float
    ) -> None:
        digest, size = hashlib.sha256(), 0
        with path.open("wb") as target:
            for chunk in self._chunks(source):
                if time.monotonic() > until:
                    raise RegistryError(
                        f"{self.root} is too slow: {place_of(source)} did not come within"
                        f" {self._fetch_s:g} s"
                    )
                size += len(chunk)
                if size > entry.size:
                    check_size(name, size, entry)
                digest.update(chunk)
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
        check_file(name, size, digest.hexdigest(), entry)

    def _chunks(self, path: str) -> Iterator[bytes]:
        """Yields a file's bytes.

        Raises:
            BundleError: There is no such file.
            RegistryError: It cannot be read.
        """
        fs, root = self._filesystem()
        with self._asking():
            try:
                source = fs.open(f"{root}/{path}", "rb")
            except FileNotFoundError as error:
                raise BundleError(
                    f"{path} is missing, but its manifest lists it", "hash"
                ) from error
        try:
            while True:
                with self._asking():
                    chunk = source.read(_CHUNK)
                if not chunk:
                    return
                yield chunk
        finally:
            with suppress(Exception):  # what it could still say is of no interest
                source.close()

    def _small(self, path: str, limit: int = _MAX_SMALL_BYTES) -> bytes | None:
        """Returns the bytes of a small file, or None if there is none."""
        fs, root = self._filesystem()
        with self._asking():
            try:
                with fs.open(f"{root}/{path}", "rb") as file:
                    body = bytes(file.read(limit + 1))
            except FileNotFoundError:
                return None
        if len(body) > limit:
            check_manifest_size(len(body))
            raise RegistryError(f"{self.root}/{path} is longer than {limit} bytes")
        return body

    def _info(self, path: str) -> dict[str, Any] | None:
        fs, root = self._filesystem()
        with self._asking():
            try:
                return dict(fs.info(f"{root}/{path}"))
            except FileNotFoundError:
                return None

    def _forget_listings(self) -> None:
        fs, _ = self._filesystem()
        fs.invalidate_cache()

    def _filesystem(self) -> tuple[Any, str]:
        if self._opened is None:
            try:
                from fsspec.core import url_to_fs  # here: most servers need it not
            except ImportError as error:
                raise RegistryError(
                    f"{self.root}: a registry at a URL needs fsspec: pip install 'cutline[remote]'"
                ) from error
            try:
                fs, root = url_to_fs(self.root)
            except (ImportError, ValueError) as error:  # no such protocol, or no package for it
                raise RegistryError(f"{self.root}: {error}") from error
            except Exception as error:
                raise self._unreadable(error) from error
            self._opened = fs, str(root).rstrip("/")
        return self._opened

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turns whatever a filesystem raises into a RegistryError: they share no base."""
        try:
            yield
        except (BundleError, RegistryError):
            raise
        except Exception as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> RegistryError:
        return RegistryError(f"{self.root} cannot be read: {type(error).__name__}")

    def _make_folder(self, folder: Path) -> None:
        self._own.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._own.is_symlink() or self._own.stat().st_uid != os.getuid():
            raise RegistryError(f"{self._own} is not this user's own folder: name another as cache")
        folder.mkdir(parents=True, exist_ok=True)


def place_of(path: str) -> str:
    """Returns a path in a registry as a person names it: `model@version, file`."""
    model, version, name = path.split("/", 2)
    return f"{model}@{version}, {name}"


def _is_whole(folder: Path, manifest_json: bytes) -> bool:
    try:
        return Bundle.open(folder).digest == hashlib.sha256(manifest_json).hexdigest()
    except BundleError:
        return False


def _remove(folder: Path) -> None:
    """Removes a fetched bundle unless a process is loading it; a name at a time is no bundle."""
    with suppress(FileNotFoundError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = Path(tempfile.mkdtemp(prefix=".stage-", dir=folder.parent))
            folder.rename(gone / folder.name)
            shutil.rmtree(gone, ignore_errors=True)
        except BlockingIOError:
            return
        finally:
            os.close(lock)
