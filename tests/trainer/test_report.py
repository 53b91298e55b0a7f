"""The page of a report: it stands alone, is well formed, and begins with what was found."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from test_learning_curve import measured, power

from trainer.intervals import Interval
from trainer.label_budget import advice_of
from trainer.learning_curve import fit
from trainer.report import Report, write_report
from trainer.report_parts import (
    LabelBudget,
    Overall,
    Panel,
    Provenance,
    Step,
    compared,
    duration,
    verdict_words,
)
from trainer.sheet import SheetRow
from trainer.verdict import Difference

SVG = "{http://www.w3.org/2000/svg}"
NASTY = '<script>alert("$verdict & co")</script>'
FOUND = {"CIDEr-D": Interval(0.561, 0.534, 0.589), "BLEU-4": Interval(0.2, 0.1, 0.3)}
BETTER = Difference(Interval(0.27, 0.239, 0.303), 0.0002)
SAME = Difference(Interval(0.01, -0.02, 0.04), 0.6)
WORSE = Difference(Interval(-0.1, -0.2, -0.05), 0.001)


def steps() -> list[Step]:
    return [
        Step("copied captions", "Of the nearest image.", figures=FOUND),
        Step("fine-tuning", "Trained.", 754.0, FOUND, BETTER, "copied captions"),
        Step("pseudo-labels", NASTY, 44.0, FOUND, SAME, "fine-tuning"),
        Step("SCST", "Rewarded.", 7500.0, FOUND, WORSE, "pseudo-labels"),
        Step("export", "To ONNX.", 12.0),
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Report:
    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for number in range(60):  # as detailed as photographs are
        pixels = np.random.default_rng(number).normal(128, 40, (60, 80, 3)).clip(0, 255)
        path = folder / f"{number}.jpg"
        picture = Image.fromarray(pixels.astype(np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        picture.save(path)
        rows.append(SheetRow(path, f"caption {number}", (NASTY, "one dog"), -0.4, number / 6))
    curve = fit(measured(power, np.random.default_rng(5), images=500, runs=3, luck=0.005))
    return Report(
        title=f"Holiday {NASTY}",
        subject="The captioner",
        steps=steps(),
        overall=Overall(BETTER, "copied captions"),
        budget=LabelBudget(curve, advice_of(curve)),
        panels=[
            Panel("Loss", {"first": [(1.0, 5.0), (2.0, 4.0)], "second": [(1.0, 4.0), (2.0, 3.0)]}),
            Panel("CIDEr-D on dev", {"second": [(float(n), n / 9) for n in range(60)]}),
        ],
        pictures=rows,
        provenance=Provenance({"human": 100, "synthetic": 1630}, 800, {"human": 500}, 100),
        warnings=[f"Beware of {NASTY}"],
        command="python -m trainer report x",
    )


@pytest.fixture(scope="module")
def path(whole: Report, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    write_report(path, whole)
    return path


@pytest.fixture(scope="module")
def page(path: Path) -> ElementTree.Element:
    """The page, read as XML: every tag is closed and every attribute quoted."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>\n")
    return ElementTree.fromstring(text.removeprefix("<!doctype html>"))


def words(element: ElementTree.Element | None) -> str:
    assert element is not None
    return " ".join("".join(element.itertext()).split())


def test_the_verdict_stands_on_top(page: ElementTree.Element, whole: Report) -> None:
    assert words(page.find("body/main/h1")) == whole.verdict
    assert re.fullmatch(
        r"The captioner reaches CIDEr-D 0\.561 \(0\.534 to 0\.589\) on 100 test images, better "
        r"than copied captions: \+0\.270 \(\+0\.239 to \+0\.303\)\. 30 more labels: about \+\S+ "
        r"\(\+\S+ to \+\S+\) CIDEr-D\.",
        whole.verdict,
    )


def test_without_figures_it_says_that_nothing_was_measured() -> None:
    assert Report("t", "The encoder", [Step("a", "b")]).verdict == "The encoder was not measured."
    found = Report("t", "The encoder", [Step("a", "b", figures=FOUND), Step("c", "d")])
    assert found.verdict == "The encoder reaches CIDEr-D 0.561 (0.534 to 0.589)."


def test_a_difference_is_called_what_it_is() -> None:
    assert [verdict_words(one) for one in (BETTER, SAME, WORSE)] == [
        "better",
        "no difference seen",
        "worse",
    ]
    lucky = Difference(Interval(0.1, 0.01, 0.2), 0.3)  # one of many tests
    assert verdict_words(lucky) == "no difference seen"
    assert compared(WORSE, "x") == "worse than x: -0.100 (-0.200 to -0.050)"
    assert compared(SAME, "x").startswith("no different from x as far as can be seen: +0.010 (-0.0")


def test_the_table_tells_what_each_step_bought(page: ElementTree.Element) -> None:
    table = page.find(".//table[@class='steps']")
    assert table is not None
    rows = [[words(cell) for cell in row] for row in table.findall("tbody/tr")]
    assert [row[0] for row in rows][:2] == [
        "copied captionsOf the nearest image.",
        "fine-tuningTrained.",
    ]
    assert rows[0][1].startswith("0.561CIDEr-D, 0.534 to 0.589BLEU-4 0.200 (0.100 to 0.300)")
    assert rows[0][2:] == ["", ""]
    assert rows[1][2:] == ["+0.270 better+0.239 to +0.303, against copied captions", "13 min"]
    assert rows[2][2].startswith("+0.010 no difference seen")
    assert rows[3][2:] == ["-0.100 worse-0.200 to -0.050, against pseudo-labels", "2 h 05 min"]
    assert rows[4][1:] == ["", "", "12 s"]
    kinds = [one.get("class") for one in table.iter("b")]
    assert [kind for kind in kinds if kind] == ["better", "same", "worse"]


def test_a_duration_is_readable() -> None:
    assert [duration(s) for s in (0.4, 89, 95, 3600, 5400)] == [
        "0 s",
        "89 s",
        "2 min",
        "60 min",
        "1 h 30 min",
    ]


def test_it_stands_alone_and_is_small(path: Path, page: ElementTree.Element) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000
    assert len(page.findall(".//article")) == 60
    assert "<script" not in text
    assert not re.search(r'(?:src|href)="(?!#|data:)', text)
    assert "url(http" not in text and "@import" not in text
    ids = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(ids) == len(set(ids)) > 0
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_what_others_wrote_stays_text(page: ElementTree.Element) -> None:
    assert not list(page.iter("script"))
    assert words(page.find("head/title")) == f"Holiday {NASTY}"
    assert words(page.find(".//ul[@class='warnings']")) == f"Beware of {NASTY}"
    assert NASTY in words(page.find(".//article")) and NASTY in words(page.find(".//table"))


def test_its_charts_take_their_colours_from_the_page(path: Path, page: ElementTree.Element) -> None:
    charts = [ElementTree.tostring(one, encoding="unicode") for one in page.iter(f"{SVG}svg")]
    assert len(charts) == 4  # differences, labels, two curves
    assert not re.search(r"#[0-9a-f]{6}\b", "".join(charts))
    text = path.read_text(encoding="utf-8")
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used <= set(re.findall(r"(--[\w-]+):", text))
    _, labels, first, second = charts
    for count in (25, 50, 75, 100, 130):
        assert f">{count}</" in labels
    assert "stroke-dasharray" in labels  # what lies beyond
    assert "var(--arm-0)" in first and "var(--arm-1)" in first
    assert "var(--arm-0)" not in second and "var(--arm-1)" in second
    key = page.findall(".//ul[@class='key']/li")
    assert [(words(one), one.get("style")) for one in key] == [
        ("first", "color: var(--arm-0)"),
        ("second", "color: var(--arm-1)"),
    ]


def test_the_advice_stands_over_its_picture(page: ElementTree.Element, whole: Report) -> None:
    assert whole.budget is not None
    assert words(page.find(".//p[@class='advice']")) == f"{whole.budget.advice.sentence}."
    assert words(page.find(".//ul[@class='notes']")) == "".join(whole.budget.advice.notes)


def test_who_wrote_the_captions(page: ElementTree.Element) -> None:
    table = page.findall(".//table")[-1]
    assert [[words(cell) for cell in row] for row in table.iter("tr")] == [
        ["Captions by source", "images", "human", "synthetic"],
        ["Learnt from", "800", "100", "1,630"],
        ["Measured on", "100", "500", "0"],
    ]


def test_only_what_there_is_gets_a_heading(tmp_path: Path, page: ElementTree.Element) -> None:
    assert len(page.findall(".//h2")) == 6
    write_report(tmp_path / "r.html", Report("t", "The captioner", steps()[:2]))
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert re.findall("<h2>(.*)</h2>", text) == ["What each step bought"]
    assert "<svg" not in text


def test_the_numbers_are_json(path: Path, whole: Report) -> None:
    numbers = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert numbers["verdict"] == whole.verdict
    assert numbers["steps"][1]["difference"]["verdict"] == "better"
    assert numbers["steps"][1]["difference"]["interval"]["low"] == 0.239
    assert numbers["steps"][4]["figures"] == {}
    assert numbers["budget"]["more"] == 30 and numbers["budget"]["gain"]["low"] > 0
    assert numbers["provenance"]["learnt"]["synthetic"] == 1630
    assert numbers["overall"]["against"] == "copied captions"
    assert not list(path.parent.glob("*.partial"))
