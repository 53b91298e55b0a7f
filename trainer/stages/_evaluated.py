"""What `python -m trainer evaluate` wrote, read back."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError
from trainer.intervals import Interval
from trainer.sheet import SheetRow

SHOWN = ("CIDEr-D", "BLEU-4", "ROUGE-L", "distinct")


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The folder of an evaluation.

    Attributes:
        folder: It was read from.
        model: Name of what was evaluated.
        figures: With their intervals, CIDEr-D first.
        copied_figures: Of the captions of nearest labelled images; empty where none were given.
        rows: The images with their captions; CIDEr-D is nan where it has no value.
        copied: (n,), CIDEr-D of the captions of nearest labelled images, or None.
        sources: How many references each source wrote.
    """

    folder: Path
    model: str
    figures: dict[str, Interval]
    copied_figures: dict[str, Interval]
    rows: list[SheetRow]
    copied: NDArray[np.float64] | None
    sources: dict[str, int]

    @property
    def images(self) -> list[Path]:
        """The image files, in order."""
        return [row.image for row in self.rows]

    @property
    def scores(self) -> NDArray[np.float64]:
        """(n,), CIDEr-D of each image."""
        return np.array([row.cider_d for row in self.rows], np.float64)


def read_evaluation(folder: Path) -> Evaluated:
    """Returns what an evaluation found.

    Raises:
        DataError: The folder holds none, or one that does not tell enough.
    """
    try:
        report = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
        body = (folder / "captions.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in body.splitlines()]
        copied = [_number(line["neighbour"]["cider_d"]) for line in lines if "neighbour" in line]
        return Evaluated(
            folder=folder,
            model=report["model"],
            figures=_figures(report["figures"]),
            copied_figures=_figures(report.get("neighbours", {})),
            rows=[_row(line) for line in lines],
            copied=np.array(copied) if copied else None,
            sources=_sources(lines),
        )
    except OSError as error:
        raise DataError(
            f"{folder}: no evaluation ({error.filename} is missing); give the folder that "
            "`python -m trainer evaluate` wrote"
        ) from error
    except (KeyError, json.JSONDecodeError) as error:
        raise DataError(
            f"{folder}: its captions.jsonl and figures.json do not tell enough ({error}); evaluate "
            "again"
        ) from error


def _figures(found: dict[str, list[float | None]]) -> dict[str, Interval]:
    """Returns the figures that a report shows and that have a value."""
    return {
        name: Interval(*(_number(bound) for bound in found[name]))
        for name in SHOWN
        if name in found and None not in found[name]
    }


def _row(line: dict[str, Any]) -> SheetRow:
    return SheetRow(
        Path(line["file"]),
        line["caption"],
        tuple(line["references"]),
        line["score"],
        _number(line["cider_d"]),
    )


def _sources(lines: list[dict[str, Any]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for line in lines:
        counts[line["source"]] += len(line["references"])
    return dict(counts)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
