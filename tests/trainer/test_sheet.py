"""The contact sheet stands alone, shows a fair sample, and cannot be broken by a caption."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.errors import DataError
from trainer.intervals import Interval
from trainer.sheet import SheetRow, write_sheet


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (300, 600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def _captions(page: str) -> list[str]:
    return re.findall(r'<p class="caption">(.*?)</p>', page)


def test_the_page_holds_all_it_shows(photo: Path, tmp_path: Path) -> None:
    page_path = tmp_path / "out" / "sheet.html"
    rows = [SheetRow(photo, "a dog", ("a brown dog", "one dog"), score=-0.4, cider_d=1.25)]
    figures = {"CIDEr-D": Interval(0.561, 0.534, 0.589), "distinct": 0.4}
    write_sheet(page_path, rows, "Dev split", figures)
    page = page_path.read_text(encoding="utf-8")
    assert "<h1>Dev split</h1>" in page
    assert "<dt>CIDEr-D</dt><dd>0.561<small>0.534 to 0.589</small>" in page
    assert "<li>a brown dog</li><li>one dog</li>" in page
    assert "CIDEr-D 1.25" in page
    assert "score -0.40" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    encoded = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    with Image.open(io.BytesIO(base64.b64decode(encoded[0]))) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("JPEG", (256, 128))


def test_text_is_escaped(photo: Path, tmp_path: Path) -> None:
    page_path = tmp_path / "sheet.html"
    nasty = '<script>alert("$cards")</script>'
    write_sheet(page_path, [SheetRow(photo, nasty, (nasty,))], nasty, {})
    page = page_path.read_text(encoding="utf-8")
    assert page.count("<script>") == 1  # the sheet's own
    assert _captions(page) == ["&lt;script&gt;alert(&quot;$cards&quot;)&lt;/script&gt;"]


def test_a_limited_sheet_spans_worst_to_best(photo: Path, tmp_path: Path) -> None:
    page_path = tmp_path / "sheet.html"
    values = [*np.random.default_rng(1).permutation(101).tolist(), float("nan"), None]
    rows = [SheetRow(photo, f"c{value}", (), cider_d=value) for value in values]
    write_sheet(page_path, rows[:101], "t", {}, limit=5)
    page = page_path.read_text(encoding="utf-8")
    assert _captions(page) == ["c0", "c25", "c50", "c75", "c100"]
    assert "5 of 101 images, evenly spaced" in page
    write_sheet(page_path, rows[98:], "t", {})
    assert _captions(page_path.read_text(encoding="utf-8"))[-2:] == ["cnan", "cNone"]


def test_faults_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sheet\.html: a contact sheet of no images"):
        write_sheet(tmp_path / "sheet.html", [], "t", {})
    (tmp_path / "bad.jpg").write_text("no")
    with pytest.raises(DataError, match=r"bad\.jpg: not an image"):
        write_sheet(tmp_path / "sheet.html", [SheetRow(tmp_path / "bad.jpg", "x", ())], "t", {})
