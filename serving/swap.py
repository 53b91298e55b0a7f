"""Hot swap: a thread follows the registry, loads the next bundle beside, proves it, and flips.

There is one reference, `current`. A request takes it once and keeps it to its end, so a flip
disturbs nobody; the old captioner is freed when its last request lets go of it. A bundle that does
not verify, load or give its golden captions is refused, and the one before serves on.

There are never more than two bundles in memory: the one that serves, and the next one or a shadow's
candidate. A swap takes the candidate's place, or the candidate itself if that is what it is to.
"""

import logging
import threading
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

from exports.errors import Cause, ExportsError
from exports.registry import PRODUCTION, Found
from exports.remote import open_source
from exports.shadow_plan import ShadowPlan
from serving.captioner import Captioner
from serving.decode_image import ImageLimits
from serving.loading import FORESEEN, Load, Loader, cause_of
from serving.schema import ActiveModel, ModelAnswer, SwapError
from serving.settings import Settings
from serving.shadow import Shadow, Verdict
from serving.shadow_metrics import ShadowMetrics

logger = logging.getLogger(__name__)

_TRANSIENT: tuple[Cause, ...] = ("registry", "memory", "other")  # no fault of the bundle's own


class SwapMetrics(Protocol):
    """Where the manager counts what it did."""

    shadow: ShadowMetrics

    def model_loaded(self, model: str, version: str) -> None:
        """Records that a bundle went to work."""

    def model_refused(self, cause: Cause) -> None:
        """Counts a bundle that was not put to work."""


@dataclass(frozen=True, slots=True)
class _State:
    """All that the manager knows, replaced as a whole: a reader never sees half a flip."""

    captioner: Captioner | None = None
    active: Found | None = None
    desired: str | None = None
    loading: bool = False
    swaps: int = 0
    error: SwapError | None = None
    shadow_said: str = ""


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
        self._source = open_source(settings.registry, settings.cache)
        self._reference = settings.model
        self._poll_s = settings.poll_s
        self._retry_s = settings.retry_s
        self._metrics = metrics
        load = load or partial(
            Captioner.load,
            threads=settings.threads,
            provider=settings.provider,
            cache_bytes=settings.cache_bytes,
            proof_s=settings.proof_s,
        )
        # No request outlives its deadline by more than a step.
        self._loader = Loader(self._source, load, patience_s=settings.deadline_s + 5)
        self.shadow = Shadow(metrics.shadow, ImageLimits(max_pixels=settings.max_pixels))
        self._candidate: Found | None = None  # what the shadow asks
        self._state = _State()
        self._refused: dict[str, tuple[Found, float]] = {}  # what, and when it is tried again
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
            shadow=self.shadow.report(state.shadow_said),
        )

    def check(self) -> None:
        """Looks at the registry once, and swaps if it asks for another bundle; never raises."""
        version = ""
        try:
            found = self._source.find(self._reference)
            version = found.resolved.version
            self._set(desired=version)
            if found == self._state.active:
                self._refused.pop("swap", None)
                self._set(error=None)
            elif self._may_try("swap", found):
                self._swap(found)
                self._refused.pop("swap", None)
        except Exception as error:  # the watch must go on, whatever a bundle does
            self._refuse(version, error)

    def check_shadow(self) -> None:
        """Looks once for a candidate, loads it, and decides about it; never raises."""
        try:
            self._attend_shadow()
        except Exception as error:  # a shadow must harm nothing
            foreign = None if isinstance(error, FORESEEN) else error
            self._say_of_shadow(self._reason(error), error, foreign)

    def _watch(self) -> None:
        while not self._closing:
            self.check()
            self.check_shadow()
            self._wake.wait(self._poll_s)
            self._wake.clear()
        self.shadow.end()

    def _may_try(self, what: str, found: Found) -> bool:
        """Returns whether to load a bundle now: one that was refused waits, lest it eat the CPU.

        If it may, the next time is noted at once.
        """
        refused, retry_at = self._refused.get(what, (None, 0.0))
        if found == refused and time.monotonic() < retry_at:
            return False
        self._refused[what] = found, time.monotonic() + self._retry_s
        return True

    def _swap(self, found: Found) -> None:
        resolved = found.resolved
        candidate = self._end_shadow()
        if candidate is not None and candidate[0] == found:
            captioner = candidate[1]  # it has proved itself when it was loaded
            del candidate
        else:
            del candidate  # there is no room for three
            captioner = self._loaded(found)
        before = self._state.active
        self._set(captioner=captioner, active=found, swaps=self._state.swaps + 1, error=None)
        self._metrics.model_loaded(resolved.model, resolved.version)
        logger.info("serving %s", resolved.reference)
        if before is not None:
            self._source.keep(resolved.model, {before.resolved.version, resolved.version})

    def _loaded(self, found: Found) -> Captioner:
        logger.info("loading %s", found.resolved.reference)
        self._set(loading=True)
        try:
            return self._loader.load(found.resolved)
        except Exception as error:
            cause = cause_of(error)
            if cause != "registry":
                self._metrics.model_refused(cause)
            raise
        finally:
            self._set(loading=False)

    def _refuse(self, version: str, error: Exception) -> None:
        cause, reason = cause_of(error), self._reason(error)
        known = self._state.error
        if known is None or (known.version, known.reason) != (version, reason):
            foreign = None if isinstance(error, FORESEEN) else error
            what = version or self._reference
            logger.error("not serving %s: %s: %s", what, cause, error, exc_info=foreign)
            if cause == "registry":  # every look at it would count again
                self._metrics.model_refused(cause)
        self._set(error=SwapError(version=version, cause=cause, reason=reason, at=_now()))

    def _reason(self, error: Exception) -> str:
        """Returns the cause for clients to read: no paths of this machine, no foreign messages."""
        if isinstance(error, FORESEEN):
            words = str(error)
            for root in self._source.roots:
                words = words.replace(f"{root}/", "").replace(root, "the registry")
            return words
        return f"{type(error).__name__}; the server's log has the rest"

    def _attend_shadow(self) -> None:
        active, state = self._state.active, self._state
        if active is None or state.error is not None or state.desired != active.resolved.version:
            return  # the swap comes first
        model = active.resolved.model
        plan = self._source.shadow(model)
        if plan is None or plan.verdict or plan.version == active.resolved.version:
            self._end_shadow()
            ended = plan if plan is not None and plan.verdict else None
            self.shadow.follow(ended)
            self._set(shadow_said="")
            return
        self.shadow.follow(plan)
        if self.shadow.version is None:
            self._begin_shadow(model, plan)
        elif (
            self._candidate is not None
            and (verdict := self.shadow.verdict())
            and self._may_try("verdict", self._candidate)
        ):
            self._conclude(model, plan, verdict)

    def _begin_shadow(self, model: str, plan: ShadowPlan) -> None:
        found = self._source.find(f"{model}@{plan.version}")
        if self._loader.alive > 1 or not self._may_try("shadow", found):
            return
        try:
            captioner = self._loaded(found)
        except Exception as error:
            if cause_of(error) not in _TRANSIENT:
                self._conclude(model, plan, Verdict(False, f"refused: {self._reason(error)}"))
            raise
        self._refused.pop("shadow", None)
        self._candidate = found
        self.shadow.begin(plan, captioner)
        self._set(shadow_said="")
        logger.info("asking %s along", found.resolved.reference)

    def _end_shadow(self) -> tuple[Found, Captioner] | None:
        """Lets go of the candidate, and returns it if there was one."""
        found, self._candidate = self._candidate, None
        captioner = self.shadow.end() if found is not None else None
        return None if found is None or captioner is None else (found, captioner)

    def _conclude(self, model: str, plan: ShadowPlan, verdict: Verdict) -> None:
        """Promotes or refuses a candidate, where that was asked for and can be done from here."""
        if not plan.auto or self._reference not in (model, f"{model}@{PRODUCTION}"):
            return  # the report says it
        words = verdict.words.replace("promote:", "promoted:", 1)
        try:
            first = self._source.conclude_shadow(model, plan, words, promote=verdict.promote)
        except ExportsError as error:
            self._say_of_shadow(f"{verdict.words}; not done: {self._reason(error)}", error)
            return
        if first:
            self._metrics.shadow.ended(promoted=verdict.promote)
            logger.info("%s@%s: %s", model, plan.version, words)
        self._wake.set()  # the registry asks for something else now

    def _say_of_shadow(
        self, words: str, error: Exception | None = None, foreign: Exception | None = None
    ) -> None:
        if words != self._state.shadow_said:
            logger.warning("shadow: %s", error or words, exc_info=foreign)
        self._set(shadow_said=words)

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
