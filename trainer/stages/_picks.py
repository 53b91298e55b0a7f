"""Picks as a table for programs and a contact sheet for people.

The sheet holds everything it shows and works without JavaScript.
"""

import csv
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

from trainer.acquisition._pool import Pick
from trainer.sheet import thumbnail

COLUMNS = (
    *("image", "rank", "method", "cluster", "typicality", "score", "reason"),
    "proposal",
)


@dataclass(frozen=True, slots=True)
class Named:
    """A pick with its file.

    Attributes:
        image: The file.
        name: As the table gives it: relative to the images' folder, where it is below it.
        pick: What was picked, and why.
        proposal: What a captioner says of it; empty without one.
    """

    image: Path
    name: str
    pick: Pick
    proposal: str


def write_table(path: Path, rows: Sequence[Named]) -> None:
    """Writes picks as CSV, best first, with the columns of `COLUMNS`; ranks count from 1."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for rank, row in enumerate(rows, start=1):
            pick = row.pick
            figures = [f"{value:.6f}" for value in (pick.typicality, pick.score)]
            why = [pick.reason, row.proposal]
            table.writerow([row.name, rank, pick.method, pick.cluster, *figures, *why])
    temporary.replace(path)


def write_picks(
    path: Path, rows: Sequence[Named], title: str, figures: Mapping[str, str], *, limit: int
) -> None:
    """Writes a contact sheet, best first.

    Args:
        path: The HTML file, replaced at once when it exists.
        rows: The picks.
        title: Heading of the page.
        figures: What else is known, by name.
        limit: Picks shown, about 12 kB each.

    Raises:
        DataError: An image cannot be decoded any more.
    """
    shown = rows[:limit]
    extent = f"{len(rows)} images"
    if len(shown) < len(rows):
        extent = f"the first {limit} of {extent}"
    template = Template(resources.files("trainer").joinpath("picks.html").read_text("utf-8"))
    page = template.substitute(
        title=html.escape(title),
        extent=extent,
        figures="\n".join(_figure(name, value) for name, value in figures.items()),
        cards="\n".join(_card(rank, row) for rank, row in enumerate(shown, start=1)),
    )
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def _figure(name: str, value: str) -> str:
    return f'<div class="figure"><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>'


def _card(rank: int, row: Named) -> str:
    pick = row.pick
    width, height, source = thumbnail(row.image)
    tags = (
        f"cluster {pick.cluster}",
        f"typicality {pick.typicality:.2f}",
        f"score {pick.score:.3f}",
    )
    said = f'<p class="proposal">{html.escape(row.proposal)}</p>' if row.proposal else ""
    return (
        f'<article class="card"><img src="{source}" width="{width}" height="{height}" '
        f'alt="pick {rank}"><div class="body">'
        f'<p class="rank">{rank}<span>{html.escape(pick.method)}</span></p>'
        f'<p class="reason">{html.escape(pick.reason)}</p>{said}'
        f'<p class="tags">{"".join(f"<span>{tag}</span>" for tag in tags)}</p>'
        f'<p class="file">{html.escape(row.name)}</p></div></article>'
    )
