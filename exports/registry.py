"""A registry: a folder `<model>/<version>/` of bundles, with `<model>/aliases.json`.

A version is never changed once it is there. Two aliases move: `production` is what a bare model
name means, `previous` is what it meant before. No lock is needed to read, and none to publish.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import RootModel, ValidationError

from exports.bundle import Bundle, publish_stage, settle_folder, staged, sync_folder, write_durably
from exports.errors import BundleError, RegistryError
from exports.manifest import (
    MANIFEST_FILE,
    NAME_PATTERN,
    VERSION_PATTERN,
    Manifest,
    check_name,
    check_version,
)

DEFAULT_REGISTRY = Path(__file__).parent / "models"
PRODUCTION = "production"
PREVIOUS = "previous"
_ALIASES_FILE = "aliases.json"
_LOCK_FILE = ".lock"
_LOCK_TIMEOUT_S = 30.0


class _Aliases(RootModel[dict[str, str]]):
    """The content of aliases.json."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A version that a reference stands for, and the folder of its bundle."""

    model: str
    version: str
    path: Path

    @property
    def reference(self) -> str:
        """Returns `model@version`."""
        return f"{self.model}@{self.version}"


def check_place(manifest: Manifest, resolved: Resolved) -> None:
    """Raises BundleError if a manifest is of another model or version than its folders say."""
    if (manifest.name, manifest.version) != (resolved.model, resolved.version):
        raise BundleError(
            f"{resolved.path / MANIFEST_FILE} is of {manifest.name}@{manifest.version}, "
            f"but stands under {resolved.reference}"
        )


class Registry:
    """Bundles by model and version in the folder `root`."""

    def __init__(self, root: Path | str = DEFAULT_REGISTRY) -> None:
        """Points to a registry; nothing is read yet.

        Raises:
            RegistryError: `root` is a URL.
        """
        if "://" in str(root):
            raise RegistryError(f"{root}: a registry is a local folder, not a URL")
        self.root = Path(root)

    def models(self) -> list[str]:
        """Returns the names of the models that have a version, sorted."""
        if not self.root.is_dir():
            raise RegistryError(f"there is no registry at {self.root}")
        names = [path.name for path in self.root.iterdir() if NAME_PATTERN.fullmatch(path.name)]
        return sorted(name for name in names if self.versions(name))

    def versions(self, model: str) -> list[str]:
        """Returns the complete versions of a model, 2 before 10; none for an unknown model."""
        return [name for name in self._taken(model) if self._is_complete(model, name)]

    def aliases(self, model: str) -> dict[str, str]:
        """Returns version by alias.

        Raises:
            RegistryError: aliases.json is damaged.
        """
        path = self._folder(model) / _ALIASES_FILE
        try:
            return _Aliases.model_validate_json(path.read_bytes()).root
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError) as error:
            raise RegistryError(f"{path} is not a table of alias to version") from error

    def resolve(self, reference: str) -> Resolved:
        """Returns what `name`, `name@3` or `name@production` stands for.

        A bare name is its production alias or, where there is none, its highest version.

        Raises:
            RegistryError: No such model, version or alias; the message lists what there is.
        """
        model, at, wanted = reference.partition("@")
        versions = self._known_versions(model)
        aliases = self.aliases(model)
        version = aliases.get(wanted, wanted) if at else aliases.get(PRODUCTION, versions[-1])
        if version not in versions:
            known = ", ".join((*versions, *sorted(aliases)))
            asked = reference if version == wanted else f"{reference} (which is version {version})"
            raise RegistryError(f"no {asked} in {self.root}; {model} has {known}")
        return Resolved(model, version, self._folder(model) / version)

    def publish(
        self, bundle_path: Path | str, *, model: str | None = None, version: str | None = None
    ) -> Resolved:
        """Verifies a bundle and copies it in under a version of its own, all or nothing.

        The copy's manifest carries the name and the version that it stands under. Publishing does
        not move an alias.

        Args:
            bundle_path: The bundle's folder.
            model: The model to publish under; the manifest's own name by default.
            version: A version that is free; one more than the highest integer by default.

        Raises:
            BundleError: The bundle does not verify.
            RegistryError: The version is taken, or the disk refuses; nothing was changed.
        """
        bundle = Bundle.open(bundle_path)
        manifest, files = bundle.manifest, bundle.files()
        model = _checked(check_name, manifest.name if model is None else model)
        if version is not None:
            _checked(check_version, version)
        with self._changing(f"cannot publish {model} to {self.root}"):
            folder = self._folder(model)
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.root)
            with staged(folder, files) as stage:
                for candidate in (version,) if version is not None else self._free(model):
                    placed = manifest.model_copy(update={"name": model, "version": candidate})
                    with suppress(FileExistsError):  # another publisher was faster
                        publish_stage(stage, placed, folder / candidate)
                        return Resolved(model, candidate, folder / candidate)
        raise RegistryError(f"{model}@{version} exists already; a version is never overwritten")

    def promote(self, model: str, version: str) -> Resolved:
        """Makes a version, or what an alias stands for, production; the old one becomes previous.

        Raises:
            BundleError: The bundle does not verify.
            RegistryError: No such version, or the disk refuses; the aliases are as they were.
        """
        target = self._verified(self.resolve(f"{model}@{version}"))
        with self._locked(model):
            aliases = self.aliases(model)
            current = aliases.get(PRODUCTION)
            if current != target.version:
                moved = {PRODUCTION: target.version} | ({PREVIOUS: current} if current else {})
                self._replace_aliases(model, aliases | moved)
        return target

    def rollback(self, model: str) -> Resolved:
        """Swaps production and previous.

        Raises:
            BundleError: The previous bundle does not verify.
            RegistryError: There is no previous version; the aliases are as they were.
        """
        with self._locked(model):
            aliases = self.aliases(model)
            if not {PRODUCTION, PREVIOUS} <= aliases.keys():
                raise RegistryError(f"{model} has no previous version to go back to")
            target = self._verified(self.resolve(f"{model}@{PREVIOUS}"))
            moved = {PRODUCTION: target.version, PREVIOUS: aliases[PRODUCTION]}
            self._replace_aliases(model, aliases | moved)
        return target

    def _folder(self, model: str) -> Path:
        return self.root / _checked(check_name, model)

    def _known_versions(self, model: str) -> list[str]:
        versions = self.versions(model)
        if not versions:
            known = ", ".join(self.models()) or "no model at all"
            raise RegistryError(f"no model {model!r} in {self.root}; it has {known}")
        return versions

    def _taken(self, model: str) -> list[str]:
        """Returns every name in the place of a version, complete or not, sorted naturally."""
        folder = self._folder(model)
        if not folder.is_dir():
            return []
        names = [path.name for path in folder.iterdir() if VERSION_PATTERN.fullmatch(path.name)]
        return sorted(names, key=_natural)

    def _is_complete(self, model: str, version: str) -> bool:
        return (self._folder(model) / version / MANIFEST_FILE).is_file()

    def _free(self, model: str) -> Iterator[str]:
        numbers = [int(name) for name in self._taken(model) if name.isdecimal()]
        return (str(number) for number in count(max(numbers, default=0) + 1))

    def _verified(self, resolved: Resolved) -> Resolved:
        check_place(Bundle.open(resolved.path).manifest, resolved)
        return resolved

    @contextmanager
    def _locked(self, model: str) -> Iterator[None]:
        """Holds the one lock of the registry, under which aliases change."""
        self._known_versions(model)  # no lock file is made where no model is
        with self._changing(f"cannot change the aliases of {model} in {self.root}"):
            try:
                with FileLock(self.root / _LOCK_FILE, timeout=_LOCK_TIMEOUT_S):
                    yield
            except Timeout as error:
                raise RegistryError(
                    f"another process has held {self.root / _LOCK_FILE} for {_LOCK_TIMEOUT_S:.0f} s"
                ) from error

    @contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RegistryError(f"{what}: {error.strerror}; nothing was changed") from error

    def _replace_aliases(self, model: str, aliases: dict[str, str]) -> None:
        folder = self._folder(model)
        # One name for all writers: they hold the lock, and what a killed one left is overwritten.
        temporary = folder / f".{_ALIASES_FILE}.tmp"
        try:
            write_durably(temporary, _Aliases(aliases).model_dump_json(indent=2).encode() + b"\n")
            temporary.replace(folder / _ALIASES_FILE)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        settle_folder(folder)


def _checked(check: Callable[[str], str], value: str) -> str:
    try:
        return check(value)
    except ValueError as error:
        raise RegistryError(str(error)) from error


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Returns a sort key under which 2 comes before 10."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts)
