"""A registry: a folder `<model>/<version>/` of bundles, with `<model>/aliases.json`.

A version is never changed once it is there. Two aliases move: `production` is what a bare model
name means, `previous` is what it meant before. `<model>/shadow.json`, if it is there, names a
candidate for production. No lock is needed to read, and none to publish.
"""

import re
from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout
from pydantic import BaseModel, RootModel, ValidationError

from exports.bundle import Bundle, publish_stage, staged
from exports.disk import replace_durably, settle_folder, sync_folder
from exports.errors import BundleError, RegistryError
from exports.manifest import (
    MANIFEST_FILE,
    NAME_PATTERN,
    VERSION_PATTERN,
    Manifest,
    check_name,
    check_version,
)
from exports.shadow_plan import SHADOW_FILE, ShadowPlan

DEFAULT_REGISTRY = Path(__file__).parent / "models"
PRODUCTION = "production"
PREVIOUS = "previous"
ALIASES_FILE = "aliases.json"
_LOCK_FILE = ".lock"
_LOCK_TIMEOUT_S = 30.0


class Aliases(RootModel[dict[str, str]]):
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


@dataclass(frozen=True, slots=True)
class Found:
    """What a reference stands for now; `stamp` tells another bundle under the same name."""

    resolved: Resolved
    stamp: str


class Source(Protocol):
    """A registry as a server follows it: on this machine, or at a URL."""

    @property
    def roots(self) -> tuple[str, ...]:
        """Where it is, and what is fetched: words that no client should read."""

    def find(self, reference: str) -> Found:
        """Returns what a reference stands for; raises RegistryError."""

    def held(self, resolved: Resolved) -> AbstractContextManager[Path]:
        """Gives the folder of a bundle while the block runs, fetched if need be.

        Raises:
            BundleError: What was fetched is not what its manifest says.
            RegistryError: It cannot be read, or not be kept.
        """

    def keep(self, model: str, versions: Set[str]) -> None:
        """Forgets what was fetched of other versions of a model."""

    def shadow(self, model: str) -> ShadowPlan | None:
        """Returns the model's candidate, if there is one; raises RegistryError."""

    def conclude_shadow(self, model: str, plan: ShadowPlan, verdict: str, *, promote: bool) -> bool:
        """Ends a shadow by its verdict; returns False if it has ended or changed already.

        Raises:
            ExportsError: It cannot be ended from here.
        """


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
            raise RegistryError(
                f"{root}: what is changed is a local folder, not a URL; servers follow URLs, and a"
                " folder is brought there with its aliases.json last"
            )
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
        path = self._folder(model) / ALIASES_FILE
        try:
            return Aliases.model_validate_json(path.read_bytes()).root
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

    @property
    def roots(self) -> tuple[str, ...]:
        """Its folder."""
        return (str(self.root),)

    def find(self, reference: str) -> Found:
        """Returns what a reference stands for, and a stamp that another bundle does not have.

        Raises:
            RegistryError: No such model, version or alias, or the registry cannot be read.
        """
        try:
            resolved = self.resolve(reference)
            manifest = (resolved.path / MANIFEST_FILE).stat()
        except OSError as error:
            raise RegistryError(f"{self.root} cannot be read: {error.strerror}") from error
        return Found(resolved, f"{manifest.st_ino} {manifest.st_mtime_ns}")

    @contextmanager
    def held(self, resolved: Resolved) -> Iterator[Path]:
        """Gives the bundle's own folder."""
        yield resolved.path

    def keep(self, model: str, versions: Set[str]) -> None:
        """Does nothing: nothing was fetched."""

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
            self._make_production(target)
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

    def shadow(self, model: str) -> ShadowPlan | None:
        """Returns the model's candidate and what decides about it; None if there is none.

        Raises:
            RegistryError: shadow.json is damaged.
        """
        path = self._folder(model) / SHADOW_FILE
        try:
            return ShadowPlan.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise RegistryError(f"{path} is not the plan of a shadow") from error

    def set_shadow(self, model: str, plan: ShadowPlan) -> Resolved:
        """Lets the servers of a model ask a candidate along, from now on.

        Args:
            model: The model.
            plan: Its `version` may be an alias; the version that it means is kept.

        Raises:
            BundleError: The bundle does not verify.
            RegistryError: No such version, or the disk refuses; nothing was changed.
        """
        target = self._verified(self.resolve(f"{model}@{plan.version}"))
        with self._locked(model):
            self._write_shadow(model, plan.model_copy(update={"version": target.version}))
        return target

    def stop_shadow(self, model: str) -> ShadowPlan | None:
        """Ends a shadow without a verdict, and returns what it was."""
        with self._locked(model):
            plan = self.shadow(model)
            (self._folder(model) / SHADOW_FILE).unlink(missing_ok=True)
        return plan

    def conclude_shadow(self, model: str, plan: ShadowPlan, verdict: str, *, promote: bool) -> bool:
        """Ends a shadow by its verdict; returns False if it has ended or changed already.

        Of several servers that come to a verdict, the first decides.

        Raises:
            BundleError: The bundle does not verify.
            RegistryError: The disk refuses.
        """
        target = self._verified(self.resolve(f"{model}@{plan.version}")) if promote else None
        with self._locked(model):
            if self.shadow(model) != plan or plan.verdict:
                return False
            if target is not None:
                self._make_production(target)
            self._write_shadow(model, plan.model_copy(update={"verdict": verdict}))
        return True

    def _folder(self, model: str) -> Path:
        return self.root / checked_name(model)

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
        return sorted(names, key=natural)

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

    def _make_production(self, target: Resolved) -> None:
        aliases = self.aliases(target.model)
        current = aliases.get(PRODUCTION)
        if current != target.version:
            moved = {PRODUCTION: target.version} | ({PREVIOUS: current} if current else {})
            self._replace_aliases(target.model, aliases | moved)

    def _replace_aliases(self, model: str, aliases: dict[str, str]) -> None:
        self._replace(model, ALIASES_FILE, Aliases(aliases))

    def _write_shadow(self, model: str, plan: ShadowPlan) -> None:
        self._replace(model, SHADOW_FILE, plan)

    def _replace(self, model: str, name: str, content: BaseModel) -> None:
        folder = self._folder(model)  # whoever changes it holds the lock
        replace_durably(folder / name, content.model_dump_json(indent=2).encode() + b"\n")
        settle_folder(folder)


def checked_name(model: str) -> str:
    """Returns a model's name as it is; raises RegistryError if it is none."""
    return _checked(check_name, model)


def _checked(check: Callable[[str], str], value: str) -> str:
    try:
        return check(value)
    except ValueError as error:
        raise RegistryError(str(error)) from error


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Returns a sort key under which 2 comes before 10."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts)
