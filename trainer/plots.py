"""The log of a run as curves, one small plot for each figure; and what folds have come to."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trainer.runlog import read_log

CURVES = "curves.png"

_COLUMNS = 3
_PANEL, _PLOT, _MARGIN = (4.4, 2.4), (3.4, 1.65), (0.75, 0.45)  # inches; margins left and below
_BLUE, _GREY = "#1f5fa8", "#707070"
_LAST = ("lr", "gradient_norm")  # of the figures of every step; the losses come before them
_BOUNDS = {"probe/caption_cider": ("probe/caption_low", "probe/caption_high")}
_SMOOTHED = 200  # points from which on a moving mean is drawn over the curve

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # steps and values


def plot_log(folder: Path) -> None:
    """Draws what `log.jsonl` of a run holds into `curves.png` beside it; nothing if it is empty.

    Losses come first, then learning rate and gradient norm, then what is measured after epochs.
    A dashed line shows what was measured at step 0, a band the 95 % interval of the caption probe.
    """
    curves = _curves(read_log(folder))
    bounds = {name for pair in _BOUNDS.values() for name in pair}
    names = sorted((name for name in curves if name not in bounds), key=_place)
    if not names:
        return
    columns = min(_COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    width, height = _PANEL[0] * columns, _PANEL[1] * rows
    figure = Figure(figsize=(width, height), dpi=100)
    canvas = FigureCanvasAgg(figure)
    last_step = max(float(steps[-1]) for steps, _ in curves.values())
    for place, name in enumerate(names):
        row, column = divmod(place, columns)
        left, bottom = _PANEL[0] * column + _MARGIN[0], height - _PANEL[1] * (row + 1) + _MARGIN[1]
        axes = figure.add_axes((left / width, bottom / height, _PLOT[0] / width, _PLOT[1] / height))
        band = [curves[bound] for bound in _BOUNDS.get(name, ()) if bound in curves]
        _draw(axes, name, curves[name], band)
        axes.set_xlim(0, max(1.0, last_step))
        if place + columns >= len(names):
            axes.set_xlabel("step")
    partial = folder / f"{CURVES}.partial"
    canvas.print_png(str(partial))
    partial.replace(folder / CURVES)


def plot_folds(
    path: Path,
    folds: Mapping[int, Sequence[float]],
    means: Mapping[int, tuple[float, float, float]],
    *,
    baseline: tuple[float, float, float],
    chosen: int,
) -> None:
    """Draws how folds fared over the epochs: each faintly, their mean with a band, the best marked.

    Args:
        path: the picture, PNG.
        folds: by epochs, the figure of each fold.
        means: by epochs, the figure of all and the bounds of its 95 % interval.
        baseline: a figure to beat, with its bounds.
        chosen: the best number of epochs.
    """
    figure = Figure(figsize=(7.2, 4.2), dpi=100, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    epochs = list(means)
    single = "o" if len(epochs) == 1 else ""
    for curve in zip(*folds.values(), strict=True):
        axes.plot(epochs, curve, color=_BLUE, linewidth=0.8, alpha=0.35, marker=single)
    value, low, high = (np.array(row) for row in zip(*means.values(), strict=True))
    axes.fill_between(epochs, low, high, color=_BLUE, alpha=0.15, linewidth=0)
    axes.plot(epochs, value, color=_BLUE, linewidth=2, marker="o", markersize=4, label="mean")
    axes.axhspan(*baseline[1:], color=_GREY, alpha=0.12, linewidth=0)
    axes.axhline(
        baseline[0], color=_GREY, linestyle="--", linewidth=1, label="nearest neighbour's caption"
    )
    axes.axvline(chosen, color=_GREY, linestyle=":", linewidth=1, label=f"best: {chosen} epochs")
    axes.set_title("CIDEr-D of images not trained on", loc="left", fontsize=10, fontweight="bold")
    axes.set_title(f"{means[chosen][0]:.3g}", loc="right", fontsize=9, color=_GREY)
    axes.set_xlabel("epochs")
    axes.set_ylim(bottom=0)
    axes.locator_params("x", integer=True)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    partial = path.with_name(f"{path.name}.partial")
    canvas.print_png(str(partial))
    partial.replace(path)


def _curves(rows: Sequence[dict[str, float]]) -> dict[str, Curve]:
    """Returns the curves by name, in the order in which the names turn up."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                points.setdefault(name, []).append((row["step"], value))
    return {name: _columns(found) for name, found in points.items()}


def _columns(points: list[tuple[float, float]]) -> Curve:
    steps, values = np.array(points, np.float64).T
    return steps, values


def _place(name: str) -> tuple[bool, int, bool]:
    """Returns a sort key: every step's figures, `loss` first, then those with a slash."""
    rank = _LAST.index(name) + 1 if name in _LAST else 0
    return "/" in name, rank, name != "loss"


def _draw(axes: Axes, name: str, curve: Curve, band: Sequence[Curve]) -> None:
    steps, values = curve
    measured = "/" in name
    window = len(values) // 50
    noisy = not measured and len(values) >= _SMOOTHED
    axes.plot(
        steps,
        values,
        color=_BLUE,
        linewidth=0.8 if noisy else 1.5,
        alpha=0.35 if noisy else 1.0,
        marker="o" if measured or len(values) == 1 else "",
        markersize=3.5,
        clip_on=False,
    )
    if noisy:
        mean = np.convolve(values, np.full(window, 1 / window), "valid")
        middles = steps[window // 2 :][: len(mean)]
        axes.plot(middles, mean, color=_BLUE, linewidth=1.5)
    if band:
        (_, low), (_, high) = band
        axes.fill_between(steps, low, high, color=_BLUE, alpha=0.15, linewidth=0)
    title = f"{values[-1]:.3g}"
    if measured and steps[0] == 0:
        axes.axhline(values[0], color=_GREY, linestyle="--", linewidth=1)
        title = f"start {values[0]:.3g}, now {title}"
    axes.set_title(name, loc="left", fontsize=10, fontweight="bold")
    axes.set_title(title, loc="right", fontsize=9, color=_GREY)
    axes.yaxis.set_major_formatter("{x:.6g}")  # the usual one puts powers of ten onto the title
    axes.locator_params("y", nbins=5)
    axes.locator_params("x", nbins=5, integer=True)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
