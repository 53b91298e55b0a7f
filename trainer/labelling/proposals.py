"""What models say of photographs, found ahead of the person who looks at them."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from threading import Condition, Thread

from trainer.errors import TrainerError

MOST = 3  # proposals of a photograph: what a person takes in at a glance
_AHEAD = 200  # photographs that are captioned beforehand

logger = logging.getLogger(__name__)

Caption = Callable[[Path], Sequence[str]]
"""Returns captions of a photograph, best first."""


class Proposals:
    """Captions by photograph. Those of a model are computed in a thread of their own, and kept.

    Safe to use from several threads.

    Args:
        paths: The photographs, by number.
        given: Captions that are known without a model, by number; they come first.
    """

    def __init__(
        self, paths: Sequence[Path], given: Mapping[int, Sequence[str]] | None = None
    ) -> None:
        self._paths = paths
        self._given = {number: tuple(texts) for number, texts in (given or {}).items()}
        self._found: dict[int, tuple[str, ...]] = {}
        self._caption: Caption | None = None
        self._upcoming: Callable[[], Iterator[int]] = lambda: iter(())
        self._changed = Condition()
        self._thread: Thread | None = None
        self._stops = False

    def use(self, caption: Caption) -> None:
        """Asks a model from now on; what another one said is forgotten."""
        with self._changed:
            self._caption = caption
            self._found = {}
            self._changed.notify()

    def start(self, upcoming: Callable[[], Iterator[int]]) -> None:
        """Begins to compute.

        Args:
            upcoming: yields the numbers of photographs in the order in which they are needed.
        """
        self._upcoming = upcoming
        self._thread = Thread(target=self._work, name="proposals", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the photograph that it is at."""
        with self._changed:
            self._stops = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def wake(self) -> None:
        """Says that other photographs may be needed now."""
        with self._changed:
            self._changed.notify()

    def of(self, number: int) -> list[str] | None:
        """Returns up to three captions, no two alike; None while a model has yet to speak."""
        with self._changed:
            found = self._found.get(number)
            if found is None and self._caption is not None:
                return None
            return distinct((*self._given.get(number, ()), *(found or ())))[:MOST]

    def _work(self) -> None:
        while True:
            with self._changed:
                number = None
                while not self._stops and (number := self._next()) is None:
                    self._changed.wait()
                caption = self._caption
                if self._stops or number is None or caption is None:
                    return
            texts = self._ask(caption, number)
            with self._changed:
                if caption is self._caption:  # else a new model came meanwhile
                    self._found[number] = texts

    def _next(self) -> int | None:
        if self._caption is None:
            return None
        numbers = islice(self._upcoming(), _AHEAD)
        return next((number for number in numbers if number not in self._found), None)

    def _ask(self, caption: Caption, number: int) -> tuple[str, ...]:
        try:
            return tuple(caption(self._paths[number]))
        except TrainerError as error:  # of this photograph; the page says so where it shows it
            logger.info("no proposals: %s", error)
        except Exception:  # whatever is wrong with a model, a person can label without it
            logger.exception("no proposals for %s", self._paths[number])
        return ()


def distinct(texts: Sequence[str]) -> list[str]:
    """Returns texts in their order, without empty ones and those that differ in case only."""
    return list({text.casefold(): text for text in reversed(texts) if text}.values())[::-1]
