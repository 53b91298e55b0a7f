"""What a report is made of, and how each part looks on the page."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trainer.charts import COLOURS, Curve, difference_chart, learning_chart, small_chart
from trainer.intervals import Interval
from trainer.label_budget import Advice, gain_words
from trainer.learning_curve import LearningCurve
from trainer.verdict import Difference


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the plan, and what it bought.

    Attributes:
        name: As the page calls it.
        sentence: What it did.
        seconds: It took; None where that is not known.
        figures: What it came to, the one that decides first; empty where nothing was measured.
        difference: From the step before that was measured on the same images.
        against: The name of that step.
    """

    name: str
    sentence: str
    seconds: float | None = None
    figures: Mapping[str, Interval] = field(default_factory=dict)
    difference: Difference | None = None
    against: str = ""


@dataclass(frozen=True, slots=True)
class Overall:
    """The last step against the first that was measured: all that was bought."""

    difference: Difference
    against: str


@dataclass(frozen=True, slots=True)
class Panel:
    """A figure over the steps of training, one line a run."""

    title: str
    lines: Mapping[str, Curve]


@dataclass(frozen=True, slots=True)
class LabelBudget:
    """What more labels would bring."""

    curve: LearningCurve
    advice: Advice


@dataclass(frozen=True, slots=True)
class Provenance:
    """Who wrote the captions.

    Attributes:
        learnt: How many captions were learnt from, by source: human, synthetic, web.
        images: They belong to.
        test: How many the figures were measured against, by source.
        test_images: They belong to.
    """

    learnt: Mapping[str, int]
    images: int
    test: Mapping[str, int]
    test_images: int


def verdict_words(difference: Difference) -> str:
    """Returns "better", "worse" or "no difference seen"."""
    if difference.better:
        return "better"
    return "worse" if difference.worse else "no difference seen"


def compared(difference: Difference, against: str) -> str:
    """Returns, for instance, "better than copied captions: +0.270 (+0.239 to +0.303)"."""
    gain = gain_words(difference.interval)
    if difference.better or difference.worse:
        return f"{verdict_words(difference)} than {against}: {gain}"
    return f"no different from {against} as far as can be seen: {gain}"


def bounds(found: Interval) -> str:
    """Returns, for instance, "0.561 (0.534 to 0.589)"."""
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def steps_section(steps: Sequence[Step]) -> str:
    """Returns a table of the steps, and of several the differences as a chart."""
    rows = "\n".join(_step(step) for step in steps)
    table = (
        '<table class="steps"><thead><tr><th>Step</th><th>Reached</th><th>Bought</th>'
        f"<th>Took</th></tr></thead><tbody>\n{rows}\n</tbody></table>"
    )
    bought = {step.name: step.difference for step in steps if step.difference}
    if len(bought) < 2:
        return f'<div class="panel">{table}</div>'
    chart = difference_chart(bought, label="difference from the step before")
    return f'<div class="panel">{table}</div>\n<figure class="panel wide">{chart}</figure>'


def _step(step: Step) -> str:
    figures = list(step.figures.items())
    reached = bought = took = ""
    if figures:
        first, *others = figures
        rest = "".join(f"<small>{html.escape(n)} {bounds(v)}</small>" for n, v in others)
        reached = (
            f"<b>{first[1].value:.3f}</b><small>{html.escape(first[0])}, {first[1].low:.3f} to "
            f"{first[1].high:.3f}</small>{rest}"
        )
    if step.difference is not None:
        found, words = step.difference.interval, verdict_words(step.difference)
        kind = words if words in ("better", "worse") else "same"
        bought = (
            f'<b class="{kind}">{found.value:+.3f}</b> <span class="{kind}">{words}</span>'
            f"<small>{found.low:+.3f} to {found.high:+.3f}, against {html.escape(step.against)}"
            "</small>"
        )
    if step.seconds is not None:
        took = duration(step.seconds)
    return (
        f'<tr><th scope="row">{html.escape(step.name)}<small>{html.escape(step.sentence)}</small>'
        f'</th><td data-head="Reached">{reached}</td><td data-head="Bought">{bought}</td>'
        f'<td data-head="Took">{took}</td></tr>'
    )


def duration(seconds: float) -> str:
    """Returns, for instance, "45 s", "12 min" or "2 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def budget_section(budget: LabelBudget) -> str:
    """Returns the advice with its picture."""
    advice, curve = budget.advice, budget.curve
    chart = learning_chart(curve, more=advice.more, label=advice.figure)
    return (
        f'<p class="advice">{html.escape(advice.sentence)}.</p>\n{listed("notes", advice.notes)}\n'
        f'<figure class="panel wide">{chart}<figcaption>Dots: measured, with 95 % intervals over '
        f"the {curve.images} test images. Line and band: the curve a - b n<sup>-c</sup> and its "
        "95 % interval; dashed where nothing was measured.</figcaption></figure>"
    )


def panels_section(panels: Sequence[Panel]) -> str:
    """Returns the curves of training, each run in one colour throughout."""
    runs = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    key = "".join(
        f'<li style="color: var(--arm-{number % COLOURS})">{html.escape(name)}</li>'
        for number, name in enumerate(runs)
    )
    charts = "\n".join(
        f'<figure class="panel"><figcaption>{html.escape(panel.title)}</figcaption>'
        + small_chart({name: panel.lines.get(name, ()) for name in runs}, label=panel.title)
        + "</figure>"
        for panel in panels
    )
    return f'<ul class="key">{key}</ul>\n<div class="pair">\n{charts}\n</div>'


def provenance_section(known: Provenance) -> str:
    """Returns a table of captions by who wrote them."""
    rows = []
    if known.learnt:
        rows.append(("Learnt from", known.learnt, known.images))
    if known.test:
        rows.append(("Measured on", known.test, known.test_images))
    sources = sorted(
        {"human", *known.learnt, *known.test}, key=lambda name: (name != "human", name)
    )
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("images", *sources))
    body = "\n".join(
        f'<tr><th scope="row">{name}</th><td>{images:,}</td>'
        + "".join(f"<td>{counts.get(source, 0):,}</td>" for source in sources)
        + "</tr>"
        for name, counts, images in rows
    )
    return (
        f'<div class="panel"><table><thead><tr><th>Captions by source</th>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def listed(kind: str, items: Sequence[str]) -> str:
    """Returns a list of the CSS class `kind`; nothing where there are no items."""
    rows = "".join(f"<li>{html.escape(item)}</li>" for item in items)
    return f'<ul class="{kind}">{rows}</ul>' if rows else ""
