"""Hot swap: a thread follows the registry, loads the next bundle beside, proves it, and flips.

There is one reference, `current`. A request takes it once and keeps it to its end, so a flip
disturbs nobody; the old captioner is freed when its last request lets go of it. A bundle that does
not verify, load or give its golden captions is refused, and the one before serves on.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from exports.errors import BundleError, ExportsError
from exports.manifest import MANIFEST_FILE
from exports.registry import Registry, Resolved, check_place
from serving.captioner import Captioner
from serving.errors import BundleRejected, CaptionError
from serving.schema import ActiveModel, ModelAnswer, SwapError
from serving.settings import Settings

logger = logging.getLogger(__name__)

_FORESEEN = (ExportsError, CaptionError)  # their words are ours

Load = Callable[[Path], Captioner]


class SwapMetrics(Protocol):
    """Where the manager counts what it did."""

    def model_loaded(self, model: str, version: str) -> None:
        """Records that a bundle went to work."""

    def model_refused(self) -> None:
        """Counts a bundle that was not put to work."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A bundle on disk; `inode` and `changed` tell another one under the same name."""

    resolved: Resolved
    inode: int
    changed: int


@dataclass(frozen=True, slots=True)
class _State:
    """All that the manager knows, replaced as a whole: a reader never sees half a flip."""

    captioner: Captioner | None = None
    active: _Found | None = None
    desired: str | None = None
    loading: bool = False
    swaps: int = 0
    error: SwapError | None = None


class ModelManager:
    """Keeps the captioner that the registry asks for; `current` is what answers now."""

    def __init__(
        self, settings: Settings, metrics: SwapMetrics, *, load: Load | None = None
    ) -> None:
        """Prepares to follow `settings.model`; nothing is loaded before `start` or `check`.

        Args:
            settings: Registry, reference, pace, and how to load.
            metrics: Where swaps are counted.
            load: Loads and proves the bundle in a folder; `Captioner.load` by default.
        """
        self._registry = Registry(settings.registry.absolute())
        self._reference = settings.model
        self._poll_s = settings.poll_s
        self._retry_s = settings.retry_s
        self._metrics = metrics
        self._load = load or (
            lambda path: Captioner.load(
                path,
                threads=settings.threads,
                provider=settings.provider,
                cache_bytes=settings.cache_bytes,
            )
        )
        self._state = _State()
        self._refused: tuple[_Found, float] | None = None  # and when to try it again
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._watch, name="cutline-swap", daemon=True)

    @property
    def current(self) -> Captioner | None:
        """The captioner that answers now; take it once per request."""
        return self._state.captioner

    def start(self) -> None:
        """Starts to follow the registry; returns at once."""
        self._thread.start()

    def close(self) -> None:
        """Stops to follow; a load in progress is not waited for."""
        self._closing = True
        self._wake.set()

    def follow(self, reference: str) -> None:
        """Follows another reference from now on; returns at once and never raises."""
        self._reference = reference
        self._wake.set()

    def status(self) -> ModelAnswer:
        """Returns what should be served, what is, and why they differ."""
        state = self._state
        return ModelAnswer(
            reference=self._reference,
            desired=state.desired,
            loading=state.loading,
            swaps=state.swaps,
            active=_described(state.captioner) if state.captioner else None,
            last_error=state.error,
        )

    def check(self) -> None:
        """Looks at the registry once, and swaps if it asks for another bundle; never raises."""
        version = ""
        try:
            found = self._find()
            version = found.resolved.version
            self._set(desired=version)
            if found == self._state.active:
                self._refused = None
                self._set(error=None)
            elif self._may_try(found):
                self._refused = found, time.monotonic() + self._retry_s
                self._swap(found)
                self._refused = None
        except Exception as error:  # the watch must go on, whatever a bundle does
            self._refuse(version, error)

    def _watch(self) -> None:
        while not self._closing:
            self.check()
            self._wake.wait(self._poll_s)
            self._wake.clear()

    def _find(self) -> _Found:
        resolved = self._registry.resolve(self._reference)
        manifest = (resolved.path / MANIFEST_FILE).stat()
        return _Found(resolved, manifest.st_ino, manifest.st_mtime_ns)

    def _may_try(self, found: _Found) -> bool:
        """Returns whether to load a bundle now: one that was refused waits, lest it eat the CPU."""
        if self._refused is None:
            return True
        refused, retry_at = self._refused
        return found != refused or time.monotonic() >= retry_at

    def _swap(self, found: _Found) -> None:
        reference = found.resolved.reference
        logger.info("loading %s", reference)
        self._set(loading=True)
        try:
            captioner = self._load(found.resolved.path)
            check_place(captioner.manifest, found.resolved)
        except BundleError as error:
            self._metrics.model_refused()
            raise BundleRejected(str(error)) from error
        except Exception:
            self._metrics.model_refused()
            raise
        finally:
            self._set(loading=False)
        self._set(captioner=captioner, active=found, swaps=self._state.swaps + 1, error=None)
        self._metrics.model_loaded(found.resolved.model, found.resolved.version)
        logger.info("serving %s", reference)

    def _refuse(self, version: str, error: Exception) -> None:
        reason = self._reason(error)
        known = self._state.error
        if known is None or (known.version, known.reason) != (version, reason):
            foreign = None if isinstance(error, _FORESEEN) else error
            logger.error("not serving %s: %s", version or self._reference, error, exc_info=foreign)
        self._set(error=SwapError(version=version, reason=reason, at=_now()))

    def _reason(self, error: Exception) -> str:
        """Returns the cause for clients to read: no paths of this machine, no foreign messages."""
        if isinstance(error, _FORESEEN):
            root = str(self._registry.root)
            return str(error).replace(f"{root}/", "").replace(root, "the registry")
        return f"{type(error).__name__}; the server's log has the rest"

    def _set(self, **changes: object) -> None:
        self._state = replace(self._state, **changes)  # type: ignore[arg-type]


def _described(captioner: Captioner) -> ActiveModel:
    manifest = captioner.manifest
    return ActiveModel(
        name=captioner.name,
        version=captioner.version,
        created=manifest.created,
        description=manifest.description,
        licence=manifest.licence,
        image_height=manifest.image.height,
        image_width=manifest.image.width,
        vocabulary=manifest.text.vocab_size,
        max_length=manifest.text.max_length,
        defaults=manifest.defaults.model_dump(),
        rerank=list(manifest.reranks),
        metrics=manifest.metrics,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
