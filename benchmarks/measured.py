"""What `service.py` measured, and the arithmetic of its table."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

from client import Load

OFFLINE = "engine offline"


@dataclass(slots=True)
class Measured:
    """Loads by their name and side, one a round.

    Attributes:
        sides: As they stand in the table.
        expected: The caption of each photograph.
        loads: Of each round, by load and side.
        offline: Captions a second without a server, of each round.
    """

    HEAD = ("load", "side", "captions/s", "p50 ms", "p99 ms", "errors", "same captions")

    sides: Sequence[str]
    expected: Sequence[str]
    loads: dict[str, dict[str, list[Load]]] = field(default_factory=dict)
    offline: list[float] = field(default_factory=list)

    def add(self, name: str, side: str, load: Load) -> None:
        """Keeps a round of a load."""
        self.loads.setdefault(name, {}).setdefault(side, []).append(load)

    def rate(self, name: str, side: str) -> float:
        """Returns captions a second, the median of the rounds."""
        return median(load.rate for load in self.loads[name][side])

    def rows(self) -> Iterator[list[str]]:
        """Yields the table, load by load."""
        if self.offline:
            yield ["none", OFFLINE, f"{median(self.offline):.1f}", "", "", "", ""]
        for name, by_side in self.loads.items():
            for side in self.sides:
                rounds = by_side[side]
                answers = [answer for load in rounds for answer in load.answers]
                same = sum(text_of(body) == self.expected[place] for place, body in answers)
                yield [
                    name,
                    side,
                    f"{self.rate(name, side):.1f}",
                    *(f"{1000 * median(_of(rounds, share)):.0f}" for share in (0.5, 0.99)),
                    str(sum(load.errors for load in rounds)),
                    f"{same / len(answers):.1%}" if answers else "none",
                ]

    def ratios(self, saturating: str) -> Iterator[str]:
        """Yields what is compared, in words; each is the median of the rounds' own ratios.

        Args:
            saturating: The load at which captions a second are what a side can do.
        """
        rates = {
            side: [load.rate for load in rounds] for side, rounds in self.loads[saturating].items()
        }
        if "plain" in rates:
            yield f"plain / {OFFLINE}, {saturating}: {ratio(rates['plain'], self.offline):.2f}"
            for side in self.sides:
                if side == "ray":
                    yield f"ray / plain, {saturating}: {ratio(rates[side], rates['plain']):.2f}"
                elif side != "plain":
                    yield f"plain / {side}, {saturating}: {ratio(rates['plain'], rates[side]):.2f}"
            for name, by_side in self.loads.items():
                if name.endswith("a second"):
                    plain = _of(by_side["plain"], 0.99)
                    for side in self.sides:
                        if side != "plain":
                            value = ratio(_of(by_side[side], 0.99), plain)
                            yield f"p99 of {side} / p99 of plain, {name}: {value:.2f}"

    def client_ms(self) -> float:
        """Returns what a request cost the client, in milliseconds of one core."""
        every = [load for by in self.loads.values() for rounds in by.values() for load in rounds]
        sent = sum(len(load.latencies) + load.errors for load in every)
        return 1000 * sum(load.cpu_s for load in every) / sent


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Returns the median of a / b, round by round; NaN where a round has nothing to divide by."""
    return median(a / b if b else math.nan for a, b in zip(above, below, strict=True))


def text_of(body: bytes) -> str:
    """Returns the caption in the answer of any side; empty if there is none."""
    try:
        answer = json.loads(body)
        if isinstance(answer, list):  # BentoML: a list with the caption of the one photograph
            return str(answer[0])
        if "results" in answer:
            return str(answer["results"][0]["captions"][0]["text"])
        return str(answer["text"])
    except (ValueError, LookupError, TypeError):
        return ""


def _of(rounds: Sequence[Load], share: float) -> list[float]:
    return [load.percentile(share) for load in rounds]
