"""What waits for the engine, in an order that is fair to those who ask.

Each caller has a line of its own, first come, first served. Whose turn it is follows from what each
was given so far, counted in rows: the one that was given least is next (start-time fair queueing:
Goyal, Vin and Cheng, 1996, https://doi.org/10.1145/248156.248171). So one who sends a thousand
images delays another's single one by a turn, not by a thousand. With one caller, or where the
server knows none, it is a plain queue.

Departures: 1. what counts is what was taken, not what was sent, so who cancels pays nothing;
2. a full queue makes room for a newcomer at the cost of the longest line; 3. who is announced has a
place before it comes, so that nothing is prepared which a full queue would refuse.
"""

from collections import Counter, deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """An image that waits."""

    @property
    def caller_name(self) -> str:
        """Whose it is."""

    @property
    def rows(self) -> int:
        """Beams that it may come to."""


W = TypeVar("W", bound=Waiting)


class FairQueue(Generic[W]):
    """A queue of lines, one a caller; whoever uses it from several threads locks it."""

    def __init__(self) -> None:
        """Starts empty."""
        self._lines: dict[str, deque[tuple[int, W]]] = {}  # only those where somebody waits
        self._given: dict[str, float] = {}  # rows, by caller, from a common start
        self._now = 0.0  # what the caller had been given who was served last
        self._numbers = count()
        self._size = 0
        self._announced: Counter[str] = Counter()  # by caller

    def __len__(self) -> int:
        """Returns how many wait."""
        return self._size

    @property
    def claimed(self) -> int:
        """Returns how many wait or are announced."""
        return self._size + self._announced.total()

    def announce(self, caller_name: str) -> None:
        """Keeps a place for one that is yet to come."""
        self._announced[caller_name] += 1

    def arrived(self, caller_name: str) -> None:
        """Gives up the place of one that was announced: it comes now, or never will."""
        self._announced[caller_name] -= 1
        if not self._announced[caller_name]:
            del self._announced[caller_name]

    def append(self, one: W) -> None:
        """Puts one at the end of its caller's line."""
        name = one.caller_name
        if name not in self._lines:
            self._lines[name] = deque()
            # Who did not ask for a while has saved up nothing.
            self._given[name] = max(self._given.get(name, 0.0), self._now)
        self._lines[name].append((next(self._numbers), one))
        self._size += 1

    def remove(self, one: W) -> None:
        """Takes one out, wherever it stands; does nothing if it is not there."""
        line = self._lines.get(one.caller_name, ())
        for entry in line:
            if entry[1] is one:
                self._drop(entry)
                return

    def first(self) -> W:
        """Returns whose turn it is; somebody must wait."""
        name = min(self._lines, key=lambda name: (self._given[name], self._lines[name][0][0]))
        return self._lines[name][0][1]

    def take(self, wanted: Callable[[W], bool]) -> list[W]:
        """Takes those who are `wanted`, asked of each in turn; the others keep their place."""
        taken = []
        for entry in self._in_turn():
            one = entry[1]
            if wanted(one):
                name = one.caller_name
                self._now = max(self._now, self._given[name])
                self._given[name] += one.rows
                self._drop(entry)
                taken.append(one)
        self._forget()
        return taken

    def has_better_right(self, caller_name: str) -> bool:
        """Returns whether a line and its announced are fewer than the longest line by over one."""
        own = len(self._lines.get(caller_name, ())) + self._announced[caller_name]
        return own + 1 < max(map(len, self._lines.values()), default=0)

    def make_room(self, newcomer: W) -> W | None:
        """Takes out the last of the longest line, if the newcomer has a better right.

        Returns:
            Who has to go, or None: then the newcomer has no better right than anybody here.
        """
        if not self.has_better_right(newcomer.caller_name):
            return None
        entry = max(self._lines.values(), key=len)[-1]
        self._drop(entry)
        return entry[1]

    def _in_turn(self) -> list[tuple[int, W]]:
        """Returns all in the order in which they would be served."""
        lines = {name: iter(line) for name, line in self._lines.items()}
        heads = [(self._given[name], *next(line), name) for name, line in lines.items()]
        heapify(heads)
        order = []
        while heads:
            given, number, one, name = heappop(heads)
            order.append((number, one))
            following = next(lines[name], None)
            if following is not None:
                heappush(heads, (given + one.rows, *following, name))
        return order

    def _drop(self, entry: tuple[int, W]) -> None:
        name = entry[1].caller_name
        self._lines[name].remove(entry)
        self._size -= 1
        if not self._lines[name]:
            del self._lines[name]

    def _forget(self) -> None:
        """Forgets those who wait for nothing and have no lead that could be held against them."""
        if not self._lines:
            self._given.clear()
            self._now = 0.0
        for name in [name for name in self._given if name not in self._lines]:
            if self._given[name] <= self._now:
                del self._given[name]
