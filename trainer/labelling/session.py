"""Which photograph comes next, who is looking at it, and how much is left."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Any

from trainer.labelling.answers import Action, Answer, Answers
from trainer.labelling.proposals import Proposals

LEASE_S = 150.0  # without a sign of life; a browser wakes a hidden tab once a minute


@dataclass(frozen=True, slots=True)
class Photo:
    """A photograph: its name, which is its path relative to their folder, and its file."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work is.

    Attributes:
        labelled: Photographs that have their captions.
        begun: Photographs that have some of them.
        skipped: Photographs that are done without one.
        left: Photographs to do, of the picks as long as there are any.
        others: Photographs to do beside those.
        seconds_left: Estimate for `left`, by the pace of the last answers; None before any.
    """

    labelled: int
    begun: int
    skipped: int
    left: int
    others: int
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class _Lease:
    number: int
    until: float


class Session:
    """The work of one folder, shared by all tabs. Safe to use from several threads.

    Args:
        photos: What is to be labelled; a photograph's place here is its number.
        answers: The store.
        proposals: What models said of the photographs.
        captions_per_image: With this many a photograph is done.
        picks: Names of the photographs that come first, best first.
        clock: Seconds, for leases.
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        answers: Answers,
        proposals: Proposals,
        *,
        captions_per_image: int = 1,
        picks: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.photos = photos
        self.answers = answers
        self.proposals = proposals
        self.captions_per_image = captions_per_image
        self._numbers = {photo.name: number for number, photo in enumerate(photos)}
        self._picks: list[int] = []
        self._leases: dict[str, _Lease] = {}
        self._clock = clock
        self._lock = Lock()
        self.prefer(picks)

    def prefer(self, picks: Sequence[str]) -> None:
        """Puts these photographs first from now on; names of others are passed over."""
        self._picks = [self._numbers[name] for name in picks if name in self._numbers]

    def next_number(self, tab: str, *, beyond: bool) -> int | None:
        """Returns the photograph that a tab gets next, and leases it to the tab.

        It is one that no other tab has, as long as there is any.

        Args:
            tab: Who asks.
            beyond: Whether other photographs may follow the picks.
        """
        with self._lock:
            now = self._clock()
            taken = {
                lease.number
                for other, lease in self._leases.items()
                if other != tab and lease.until > now
            }
            numbers = list(self._open(beyond=beyond))
            free = (number for number in numbers if number not in taken)
            number = next(free, numbers[0] if numbers else None)
            self._lease(tab, number)
            return number

    def hold(self, tab: str, number: int) -> None:
        """Leases a photograph to a tab, or goes on doing so."""
        with self._lock:
            self._lease(tab, number)

    def release(self, tab: str) -> None:
        """Ends the lease of a tab."""
        with self._lock:
            self._leases.pop(tab, None)

    def answer(
        self,
        number: int,
        action: Action,
        captions: Sequence[str],
        *,
        revision: int,
        proposal: int | None = None,
        seconds: float = 0.0,
    ) -> bool:
        """Stores an answer; returns whether `revision` was the latest of the photograph.

        Raises:
            OSError: The disk refuses it.
        """
        return self.answers.add(
            Answer(
                image=self.photos[number].name,
                captions=tuple(captions),
                action=action,
                proposal=proposal,
                proposals=tuple(self.proposals.of(number) or ()),
                revision=revision + 1,
                seconds=seconds,
                when=datetime.now(UTC).isoformat(timespec="milliseconds"),
            )
        )

    def is_done(self, number: int) -> bool:
        """Says whether nothing more is asked of a photograph."""
        last = self.answers.last(self.photos[number].name)
        return last is not None and (
            last.action == "skip" or len(last.captions) >= self.captions_per_image
        )

    def shown(self, number: int) -> dict[str, Any]:
        """Returns what a page shows of a photograph."""
        photo = self.photos[number]
        last = self.answers.last(photo.name)
        return {
            "number": number,
            "name": photo.name,
            "revision": last.revision if last else 0,
            "captions": list(last.captions) if last else [],
            "action": last.action if last else None,
            "done": self.is_done(number),
            "proposals": self.proposals.of(number),
        }

    def ahead(self, number: int) -> int | None:
        """Returns the photograph that probably follows this one, to be loaded beforehand."""
        return next((other for other in self._open(beyond=False) if other != number), None)

    def recent(self) -> list[int]:
        """Returns the photographs that were answered last, oldest first, none twice."""
        names = (answer.image for answer in reversed(self.answers.recent))
        numbers = [self._numbers[name] for name in dict.fromkeys(names) if name in self._numbers]
        return numbers[::-1]

    def upcoming(self) -> Iterator[int]:
        """Yields what will be asked for: what tabs show now, then what is to do."""
        yield from [lease.number for lease in list(self._leases.values())]
        yield from self._open(beyond=True)

    def progress(self) -> Progress:
        """Returns how far the work is."""
        captioned, done = Counter[bool](), 0
        for number, photo in enumerate(self.photos):
            last = self.answers.last(photo.name)
            is_done = self.is_done(number)
            done += is_done
            if last is not None and last.captions:
                captioned[is_done] += 1
        left = sum(1 for _ in self._open(beyond=False))
        return Progress(
            labelled=captioned[True],
            begun=captioned[False],
            skipped=done - captioned[True],
            left=left,
            others=len(self.photos) - done - left,
            seconds_left=self._seconds(left),
        )

    def _seconds(self, left: int) -> float | None:
        paces = [answer.seconds for answer in self.answers.recent if answer.action != "import"]
        return median(paces) * left * self.captions_per_image if paces else None

    def _open(self, *, beyond: bool) -> Iterator[int]:
        """Yields the numbers that are not done: picks, then the others, if there is no pick left.

        Args:
            beyond: whether the others follow in any case.
        """
        picks = self._picks
        yield from (number for number in picks if not self.is_done(number))
        if beyond or not picks:
            preferred = set(picks)
            yield from (
                number
                for number in range(len(self.photos))
                if number not in preferred and not self.is_done(number)
            )

    def _lease(self, tab: str, number: int | None) -> None:
        now = self._clock()
        self._leases = {
            other: lease
            for other, lease in self._leases.items()
            if other != tab and lease.until > now
        }
        if number is not None:
            self._leases[tab] = _Lease(number, now + LEASE_S)
