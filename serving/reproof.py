"""Readiness that is proved again: now and then the server captions one of its golden images.

A bundle proved itself when it was loaded; a GPU that fell over since, or memory that went bad,
would show in wrong captions alone. The image goes through the engine as any client's, one at a
time and minutes apart, so load does not feel it; an engine that is too busy for it is not broken.
An image that came of late is not encoded again: on a quiet server, it is the search that is proved.
"""

import asyncio
import logging
import time
import weakref
from collections.abc import Callable
from itertools import count
from typing import Protocol

from serving.captioner import Captioner
from serving.engine import Engine
from serving.errors import CaptionError, DeadlineExceeded, NotReady, QueueFull
from serving.params import Params

logger = logging.getLogger(__name__)

_AGAIN_S = 10.0
_BUSY = (QueueFull, DeadlineExceeded, NotReady)


class ProofMetrics(Protocol):
    """Where proofs are counted."""

    def proof_done(self, outcome: str) -> None:
        """Counts a proof: passed, failed or skipped."""


class Reproof:
    """Asks the captioner that answers for a golden caption; for one event loop."""

    def __init__(
        self,
        current: Callable[[], Captioner | None],
        engine: Engine,
        metrics: ProofMetrics,
        *,
        every_s: float,
        deadline_s: float,
    ) -> None:
        """Prepares.

        Args:
            current: Returns the captioner that answers now.
            engine: Captions.
            metrics: Is told of each proof.
            every_s: Seconds between two; 0 proves nothing. After a failed one, 10 at most.
            deadline_s: Seconds that a proof may take.
        """
        self._current, self._engine, self._metrics = current, engine, metrics
        self._every_s, self._deadline_s = every_s, deadline_s
        self._turns = count()
        self._faulty: weakref.ref[Captioner] | None = None  # it must not outlive its swap
        self._fault = ""
        self.failures = 0
        """Proofs that failed in a row."""

    @property
    def fault(self) -> str:
        """What was wrong with the last proof of the captioner that answers; "" if nothing was."""
        if self._faulty is None or self._faulty() is not self._current():
            return ""
        return self._fault

    async def run(self) -> None:
        """Proves again and again until it is cancelled."""
        while self._every_s:
            await asyncio.sleep(min(self._every_s, _AGAIN_S) if self.fault else self._every_s)
            await self.prove()

    async def prove(self) -> None:
        """Proves once; never raises."""
        captioner = self._current()
        if captioner is None or not captioner.golden_pixels:
            return
        place = next(self._turns) % len(captioner.golden_pixels)
        golden = captioner.manifest.golden[place]
        params = Params.of(captioner.manifest.defaults)
        deadline = time.monotonic() + self._deadline_s
        fault = ""
        try:
            [best, *_] = await self._engine.submit(
                captioner, captioner.golden_pixels[place], params, deadline
            )
            if best.token_ids != golden.token_ids:
                fault = f"{golden.image} is captioned {best.text!r}, not {golden.text!r}"
        except _BUSY:
            self._metrics.proof_done("skipped")
            return
        except CaptionError as error:
            fault = f"{golden.image}: {error.detail}"
        if captioner is not self._current():
            return  # swapped out meanwhile: its successor has proved itself
        if fault:
            logger.error("a proof failed: %s", fault)
            self.failures = self.failures + 1 if self.fault else 1
            self._faulty, self._fault = weakref.ref(captioner), fault
        else:
            self._faulty, self._fault, self.failures = None, "", 0
        self._metrics.proof_done("failed" if fault else "passed")
