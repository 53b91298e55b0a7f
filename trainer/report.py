"""The report of a run: one page that stands alone, and its numbers beside it.

It begins with the verdict in a sentence or two and is readable without JavaScript, in light and
dark, on a phone and on paper: what each step bought, what more labels would, curves, pictures, and
who wrote the captions.
"""

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from trainer.report_parts import (
    LabelBudget,
    Overall,
    Panel,
    Provenance,
    Step,
    bounds,
    budget_section,
    compared,
    listed,
    panels_section,
    provenance_section,
    steps_section,
    verdict_words,
)
from trainer.sheet import SheetRow, card, card_style, fair_sample
from trainer.verdict import Difference

_MEANING = {
    "CIDEr-D": "CIDEr-D is 0 where a caption shares no words with those that people wrote, and 10 "
    "where it is what they all wrote."
}


@dataclass(frozen=True, slots=True)
class Report:
    """All that the page tells.

    Attributes:
        title: Of the page.
        subject: What the verdict is about, such as "The captioner".
        steps: In their order.
        overall: What all of them bought together.
        budget: What more labels would bring, where that was measured.
        panels: Curves.
        pictures: Test images with what was said of them.
        limit: Pictures shown, evenly spaced from the worst to the best.
        provenance: Of the captions.
        warnings: What a reader must know before believing the verdict.
        command: That wrote the page.
    """

    title: str
    subject: str
    steps: Sequence[Step]
    overall: Overall | None = None
    budget: LabelBudget | None = None
    panels: Sequence[Panel] = ()
    pictures: Sequence[SheetRow] = ()
    limit: int = 60
    provenance: Provenance | None = None
    warnings: Sequence[str] = ()
    command: str = ""

    @property
    def verdict(self) -> str:
        """What was reached, and what more labels would bring, in a sentence or two."""
        measured = next((step for step in reversed(self.steps) if step.figures), None)
        if measured is None:
            return f"{self.subject} was not measured."
        name, found = next(iter(measured.figures.items()))
        on = ""
        if self.provenance is not None and self.provenance.test_images:
            on = f" on {self.provenance.test_images} test images"
        sentence = f"{self.subject} reaches {name} {bounds(found)}{on}"
        if self.overall is not None:
            sentence += f", {compared(self.overall.difference, self.overall.against)}"
        further = f" {self.budget.advice.sentence}." if self.budget else ""
        return f"{sentence}.{further}"


def write_report(path: Path, report: Report) -> None:
    """Writes the page, and its numbers as JSON beside it.

    Args:
        path: Of the page, such as `report.html`; the numbers go to `report.json`.
        report: What it tells.

    Raises:
        DataError: A picture cannot be decoded.
    """
    template = Template(resources.files("trainer").joinpath("report.html").read_text("utf-8"))
    page = template.substitute(
        title=html.escape(report.title),
        verdict=html.escape(report.verdict),
        meaning=_meaning(report),
        warnings=listed("warnings", report.warnings),
        card_style=card_style(),
        sections="\n".join(_sections(report)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, page)
    numbers = json.dumps(_as_json(report), indent=2, allow_nan=False)
    _write(path.with_suffix(".json"), numbers + "\n")


def _sections(report: Report) -> Iterator[str]:
    """Yields what there is to show, each under its heading."""
    parts = {
        "What each step bought": report.steps and steps_section(report.steps),
        "What more labels would bring": report.budget and budget_section(report.budget),
        "How it trained": report.panels and panels_section(report.panels),
        "What it says": report.pictures and _pictures(report.pictures, report.limit),
        "Who wrote the captions": report.provenance and provenance_section(report.provenance),
        "How this was made": report.command
        and f'<div class="panel"><pre>{html.escape(report.command)}</pre></div>',
    }
    for heading, body in parts.items():
        if body:
            yield f"<section>\n<h2>{heading}</h2>\n{body}\n</section>"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _pictures(rows: Sequence[SheetRow], limit: int) -> str:
    shown, extent = fair_sample(rows, limit)
    cards = "\n".join(card(row) for row in shown)
    return f'<p>{extent}.</p>\n<div class="cards">\n{cards}\n</div>'


def _meaning(report: Report) -> str:
    named = {name for step in report.steps for name in step.figures}
    words = [text for name, text in _MEANING.items() if name in named]
    if named:
        words.append("In brackets: 95 % intervals, over the choice of test images.")
    return html.escape(" ".join(words))


def _as_json(report: Report) -> dict[str, Any]:
    overall, budget = report.overall, report.budget
    return {
        "title": report.title,
        "verdict": report.verdict,
        "warnings": list(report.warnings),
        "steps": [
            {
                "name": step.name,
                "seconds": step.seconds,
                "figures": {name: asdict(found) for name, found in step.figures.items()},
                "difference": _difference(step.difference, step.against),
            }
            for step in report.steps
        ],
        "overall": _difference(overall.difference, overall.against) if overall else None,
        "budget": asdict(budget.advice) if budget else None,
        "provenance": asdict(report.provenance) if report.provenance else None,
    }


def _difference(found: Difference | None, against: str) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"against": against, "verdict": verdict_words(found), **asdict(found)}
