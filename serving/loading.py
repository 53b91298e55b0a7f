"""Loads bundles, and sees to it that there are never more than two in memory."""

import logging
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from exports.errors import BundleError, Cause, ExportsError
from exports.registry import Resolved, Source, check_place
from serving.captioner import Captioner
from serving.errors import BundleRejected, CaptionError
from serving.headroom import check_room

logger = logging.getLogger(__name__)

FORESEEN = (ExportsError, CaptionError)  # their words are ours
_LOOK_S = 0.01

Load = Callable[[Path], Captioner]


class Loader:
    """Loads and proves bundles, one beside another at most.

    A captioner lives until its last request lets go of it. So before one is loaded, those before
    are waited for, until but one is left. For one thread.
    """

    def __init__(self, source: Source, load: Load, *, patience_s: float) -> None:
        """Loads from `source`.

        Args:
            source: The registry.
            load: Loads and proves the bundle in a folder.
            patience_s: How long a captioner that was swapped out may still have requests.
        """
        self._source = source
        self._load = load
        self._patience_s = patience_s
        self._known: list[weakref.ref[Captioner]] = []

    @property
    def alive(self) -> int:
        """How many captioners there are in memory."""
        self._known = [known for known in self._known if known() is not None]
        return len(self._known)

    def load(self, resolved: Resolved) -> Captioner:
        """Returns a captioner that has proved itself.

        Raises:
            BundleRejected: The bundle is damaged, does not do as it promises, or has no room.
            RegistryError: It cannot be read.
        """
        try:
            self._wait_for_room()
            with self._source.held(resolved) as folder:
                check_room(folder)
                captioner = self._load(folder)
            check_place(captioner.manifest, resolved)
        except BundleError as error:
            raise BundleRejected(str(error), error.cause) from error
        self._known.append(weakref.ref(captioner))
        return captioner

    def _wait_for_room(self) -> None:
        until = time.monotonic() + self._patience_s
        while self.alive > 1:
            if time.monotonic() > until:
                raise BundleError(
                    "two bundles are in memory, and requests still hold the older one", "memory"
                )
            time.sleep(_LOOK_S)


def cause_of(error: Exception) -> Cause:
    """Returns why a bundle was not put to work, in one word."""
    if isinstance(error, (BundleError, BundleRejected)):
        return error.cause
    if isinstance(error, MemoryError):
        return "memory"
    return "registry" if isinstance(error, ExportsError) else "other"
