"""The contact sheet of an evaluation: one HTML file with images, captions and references.

The file holds everything it shows, so it can be mailed or archived. Sorting, filtering and the
full references need a browser with JavaScript; without it the cards still stand, worst first.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

from trainer.errors import DataError
from trainer.intervals import Interval
from trainer.photos import load_thumbnail

_LONG_SIDE = 256  # pixels of a thumbnail
_QUALITY = 70


@dataclass(frozen=True, slots=True)
class SheetRow:
    """One image of the sheet.

    Attributes:
        image: The image file.
        caption: What the model said.
        references: What people said.
        score: The model's own score of the caption (mean log-probability), if known.
        cider_d: CIDEr-D of the caption, if known.
    """

    image: Path
    caption: str
    references: tuple[str, ...]
    score: float | None = None
    cider_d: float | None = None


def write_sheet(
    path: Path,
    rows: Sequence[SheetRow],
    title: str,
    figures: Mapping[str, Interval | float],
    *,
    limit: int = 200,
) -> None:
    """Writes a contact sheet, worst CIDEr-D first.

    Args:
        path: The HTML file, replaced when it exists.
        rows: The evaluated images.
        title: Heading of the page.
        figures: Corpus figures by name, shown with their intervals.
        limit: Images shown (about 12 kB each); of more, evenly spaced ones from the worst to
            the best are shown, so that the sheet is a fair picture of the whole.

    Raises:
        DataError: There are no rows, or an image cannot be decoded.
    """
    if not rows:
        raise DataError(f"{path}: a contact sheet of no images")
    ordered = sorted(rows, key=_worst_first)
    if len(ordered) > limit:
        places = np.linspace(0, len(ordered) - 1, limit).round().astype(int)
        shown = [ordered[place] for place in places]
        extent = f"{limit} of {len(ordered)} images, evenly spaced from the worst to the best"
    else:
        shown, extent = ordered, f"{len(ordered)} images"
    template = Template(resources.files("trainer").joinpath("sheet.html").read_text("utf-8"))
    page = template.substitute(
        title=html.escape(title),
        extent=extent,
        figures="\n".join(_figure(name, value) for name, value in figures.items()),
        cards="\n".join(_card(row) for row in shown),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _worst_first(row: SheetRow) -> float:
    return float("inf") if row.cider_d is None or np.isnan(row.cider_d) else row.cider_d


def _figure(name: str, value: Interval | float) -> str:
    if isinstance(value, Interval):
        number, bounds = value.value, f"{value.low:.3f} to {value.high:.3f}"
    else:
        number, bounds = value, ""
    return (
        f'<div class="figure"><dt>{html.escape(name)}</dt>'
        f"<dd>{number:.3f}<small>{bounds}</small></dd></div>"
    )


def _card(row: SheetRow) -> str:
    tags = []
    if row.cider_d is not None:
        tags.append(f'<span class="cider">CIDEr-D {row.cider_d:.2f}</span>')
    if row.score is not None:
        tags.append(f"<span>score {row.score:.2f}</span>")
    references = "".join(f"<li>{html.escape(text)}</li>" for text in row.references)
    cider = "" if row.cider_d is None else f"{row.cider_d:.6f}"
    score = "" if row.score is None else f"{row.score:.6f}"
    width, height, source = thumbnail(row.image)
    return (
        f'<article class="card" data-cider="{cider}" data-score="{score}">'
        f'<img src="{source}" width="{width}" height="{height}" alt="{html.escape(row.caption)}">'
        f'<div class="body"><p class="caption">{html.escape(row.caption) or "(no words)"}</p>'
        f'<p class="tags">{"".join(tags)}</p><ul>{references}</ul>'
        f'<p class="file">{html.escape(row.image.name)}</p></div></article>'
    )


def thumbnail(path: Path) -> tuple[int, int, str]:
    """Returns width, height and data URI of a small JPEG of the whole image."""
    pixels = load_thumbnail(path, _LONG_SIDE)
    body = io.BytesIO()
    Image.fromarray(pixels).save(body, "JPEG", quality=_QUALITY)
    uri = "data:image/jpeg;base64," + base64.b64encode(body.getvalue()).decode()
    return pixels.shape[1], pixels.shape[0], uri
