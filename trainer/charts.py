"""Charts as SVG that stands in a page and takes its colours from it.

Every colour is one of the page's CSS variables, so that a chart is readable in light and dark.
"""

import io
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.intervals import Interval
from trainer.learning_curve import LearningCurve
from trainer.verdict import Difference

Curve = Sequence[tuple[float, float]]
"""Points (epoch or step, figure)."""

COLOURS = 6
"""The page defines `--arm-0` ... `--arm-5`; further arms begin anew with other dashes."""
_WIDTH = 8.4  # inches
_DASHES = ("-", "--", ":", "-.")
_MARKED = 40  # points up to which each has a mark
_INK, _QUIET, _LINE, _GOOD, _BAD = "#010001", "#010002", "#010003", "#010004", "#010005"
# What matplotlib is told to draw in -> what the page draws in.
_VARIABLES = {
    _INK: "var(--ink)",
    _QUIET: "var(--quiet)",
    _LINE: "var(--line)",
    _GOOD: "var(--good)",
    _BAD: "var(--bad)",
    **{f"#0200{number:02x}": f"var(--arm-{number})" for number in range(COLOURS)},
}


def difference_chart(rows: Mapping[str, Difference], *, label: str) -> str:
    """Returns a dot with its interval for every row, best on top, and a line at 0."""
    ordered = sorted(rows, key=lambda name: rows[name].interval.value)
    figure, axes = _figure(height=0.9 + 0.34 * len(rows))
    axes.axvline(0, color=_QUIET, linewidth=1, linestyle="--")
    for place, name in enumerate(ordered):
        row = rows[name].interval
        colour = _GOOD if rows[name].better else _BAD if rows[name].worse else _INK
        axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2)
        axes.plot([row.value], [place], color=colour, marker="o", markersize=7)
    axes.set_yticks(range(len(ordered)), ordered)
    axes.tick_params(axis="y", length=0, labelcolor=_INK, labelsize=11)
    axes.set_ylim(-0.6, len(ordered) - 0.4)
    axes.set_xlabel(label, color=_QUIET)
    axes.grid(axis="x", color=_LINE, linewidth=0.8)
    return _svg(figure, label)


def curve_chart(arms: Mapping[str, Sequence[Curve]], *, label: str) -> str:
    """Returns for every arm its runs over the epochs, faint, and their mean.

    A single point, of an encoder that was not trained, is a dashed level.
    """
    figure, axes = _figure(height=3.6)
    for number, (name, curves) in enumerate(arms.items()):
        style = _style(number)
        mean = _mean(curves)
        if len(mean) == 1:
            axes.axhline(mean[0][1], **style | {"linestyle": (0, (4, 4))}, label=name)
            continue
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), **style, linewidth=1, alpha=0.4)
        axes.plot(
            *zip(*mean, strict=True), **style, linewidth=2, marker="o", markersize=4, label=name
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch", color=_QUIET)
    axes.set_ylabel(label, color=_QUIET)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    figure.legend(
        loc="outside upper left", ncols=4, frameon=False, labelcolor=_INK, fontsize=11, borderpad=0
    )
    return _svg(figure, label)


def interpolation_chart(
    gains: Sequence[tuple[float, Interval]], folds: Sequence[Curve], *, chosen: float, label: str
) -> str:
    """Returns gains by alpha: every fold's faint, their mean with its interval, the chosen one.

    Args:
        gains: points (alpha, gain with its interval).
        folds: of every fold, points (alpha, gain).
        chosen: an alpha of `gains`.
        label: of what is gained.
    """
    figure, axes = _figure(height=3.4)
    for fold in folds:
        axes.plot(*zip(*fold, strict=True), color=_QUIET, linewidth=1, alpha=0.4)
    axes.axhline(0, color=_QUIET, linewidth=1, linestyle="--")
    alphas = [alpha for alpha, _ in gains]
    low, high = [one.low for _, one in gains], [one.high for _, one in gains]
    axes.fill_between(alphas, low, high, color="#020001", alpha=0.15, linewidth=0)
    axes.plot(alphas, [one.value for _, one in gains], color="#020001", linewidth=2)
    best = dict(gains)[chosen]
    axes.plot([chosen], [best.value], color=_GOOD, marker="o", markersize=8)
    axes.set_xlabel("alpha: 0 is the original, 1 is fine-tuned", color=_QUIET)
    axes.set_ylabel(label, color=_QUIET)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    return _svg(figure, label)


def small_chart(lines: Mapping[str, Curve], *, label: str) -> str:
    """Returns one line a run over its steps; the page around it names figure and runs.

    Args:
        lines: By run, empty where a run has none; the number of each decides its colour.
        label: Of the chart, unlike that of any other on the page.
    """
    figure, axes = _figure(height=2.9, width=5.2)
    for number, line in enumerate(lines.values()):
        if not line:
            continue
        mark = "o" if len(line) <= _MARKED else ""
        axes.plot(*zip(*line, strict=True), **_style(number), marker=mark, markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("step", color=_QUIET)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    return _svg(figure, label)


def learning_chart(curve: LearningCurve, *, more: int, label: str) -> str:
    """Returns the measured means with their intervals, the curve, its band, and `more` labels on.

    What was measured is drawn through, what lies beyond is dashed.
    """
    first, last = curve.counts[0], curve.counts[-1]
    figure, axes = _figure(height=3.8)
    for colour, dash, start, end in ((_GOOD, "-", first, last), (_INK, "--", last, last + more)):
        labels = np.linspace(start, end, 30)
        found = [curve.at(float(count)) for count in labels]
        axes.fill_between(
            labels,
            [one.low for one in found],
            [one.high for one in found],
            color=colour,
            alpha=0.14,
            linewidth=0,
        )
        axes.plot(labels, [one.value for one in found], color=colour, linestyle=dash, linewidth=2)
    for count, mean in zip(curve.counts, curve.measured, strict=True):
        axes.plot([count, count], [mean.low, mean.high], color=_INK, linewidth=1.5, zorder=3)
        axes.plot([count], [mean.value], color=_INK, marker="o", markersize=6, zorder=3)
    axes.axvline(last, color=_LINE, linewidth=1, zorder=0)
    axes.set_xticks([*curve.counts, last + more])
    axes.tick_params(axis="x", length=0, labelcolor=_INK)
    axes.set_xlabel("labelled images", color=_QUIET)
    axes.set_ylabel(label, color=_QUIET)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    return _svg(figure, f"{label} over labels")


def _style(number: int) -> dict[str, Any]:
    dash = _DASHES[number // COLOURS % len(_DASHES)]
    return {"color": f"#0200{number % COLOURS:02x}", "linestyle": dash}


def _mean(curves: Sequence[Curve]) -> Curve:
    """Returns the mean of the curves at the epochs that all of them have."""
    by_epoch = [dict(curve) for curve in curves]
    shared = [epoch for epoch in by_epoch[0] if all(epoch in other for other in by_epoch)]
    return [(epoch, fmean(other[epoch] for other in by_epoch)) for epoch in shared]


def _figure(*, height: float, width: float = _WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[:].set_visible(False)
    axes.tick_params(color=_LINE, labelcolor=_QUIET)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    body = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text stays text. Two charts of one page may not share an id: those that are referred to are
    # salted, and the others (`axes_1`) are dropped.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(body, format="svg", transparent=True, metadata=nothing)
    text = re.sub(r' id="[\w.]+_\d+"', "", body.getvalue())
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text
