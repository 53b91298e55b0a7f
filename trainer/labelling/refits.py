"""Training beside the page: after some labels commands run one after the other in the background.

A command that fails ends its round; the page says so, and labelling goes on. `refits.jsonl` keeps
how each round went, so the newest model is found again after a restart.
"""

import json
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import Literal

from exports.errors import ExportsError
from trainer.errors import TrainerError

LOG = "refits.jsonl"
_PATIENCE_S = 10.0  # for a command that was told to end

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """A command, and what to do once it has ended well.

    Attributes:
        name: What the page calls it.
        words: The command.
        log: The file that gets what it prints.
        then: Called after it; what it raises counts as the step's failure.
    """

    name: str
    words: Sequence[str]
    log: Path
    then: Callable[[], None]


@dataclass(frozen=True, slots=True)
class State:
    """How training goes.

    Attributes:
        state: `none` before the first round.
        labels: Labelled photographs when the round began.
        message: What is being done, or what went wrong.
    """

    state: Literal["none", "running", "failed", "done"] = "none"
    labels: int = 0
    message: str = ""


class Refits:
    """Starts a round after every so many labels; never two at once.

    Args:
        folder: of `refits.jsonl`.
        every: labels between two rounds.
        steps: returns the steps of a round, given the number of labels.
    """

    def __init__(self, folder: Path, every: int, steps: Callable[[int], Sequence[Step]]) -> None:
        self._path = folder / LOG
        self._every = every
        self._steps = steps
        self._lock = Lock()
        self._thread: Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stops = False
        rounds = read_rounds(folder)
        self._state = rounds[-1] if rounds else State()

    @property
    def state(self) -> State:
        """How training goes."""
        return self._state

    def consider(self, labels: int) -> None:
        """Starts a round where enough labels were added since the last one began."""
        with self._lock:
            due = labels - self._state.labels >= self._every
            if not due or self._stops or self._state.state == "running":
                return
            self._state = State("running", labels, "starting")
            self._thread = Thread(target=self._run, args=(labels,), name="refit", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends a round under way."""
        with self._lock:
            self._stops = True
            process = self._process
        if process is not None:
            _signal(process, signal.SIGTERM)
        if self._thread is not None:
            self._thread.join()

    def _run(self, labels: int) -> None:
        state = State("done", labels, f"learnt from {labels} labels")
        for step in self._steps(labels):
            self._state = State("running", labels, step.name)
            logger.info("%s, from %d labels: %s", step.name, labels, " ".join(step.words))
            reason = self._reason_of_failure(step)
            if reason is not None:
                state = State("failed", labels, f"{step.name}: {reason}")
                logger.warning("%s (the whole output is in %s)", state.message, step.log)
                break
        if not self._stops:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(state)) + "\n")
        self._state = state

    def _reason_of_failure(self, step: Step) -> str | None:
        """Runs a step; returns None if it went well."""
        step.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with step.log.open("wb") as log:
                with self._lock:
                    if self._stops:
                        return "stopped"
                    # A session of its own: Ctrl-C in the terminal is the page's, which ends this.
                    self._process = subprocess.Popen(
                        step.words,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                code = self._wait(self._process)
            if code:
                return _last_line(step.log) or f"ended with {code}"
            step.then()
        except Exception as error:  # whatever it is, a person goes on labelling
            if not isinstance(error, (TrainerError, ExportsError, OSError)):
                logger.exception("%s failed", step.name)
            return str(error) or type(error).__name__
        finally:
            self._process = None
        return None

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        while True:
            try:
                return process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                if self._stops:  # it was told to end long ago
                    _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal to a command and to what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def read_rounds(folder: Path) -> list[State]:
    """Returns how the rounds of a folder went, oldest first."""
    path = folder / LOG
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            found.append(State(**json.loads(line)))
        except (ValueError, TypeError):
            logger.warning("%s: passed over a line that is damaged", path)
    return found


def _last_line(path: Path) -> str:
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    return next((line.strip()[:500] for line in reversed(lines) if line.strip()), "")
