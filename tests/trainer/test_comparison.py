"""The page of a comparison: it stands alone, is well formed, and says what there is to say."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from trainer.charts import curve_chart
from trainer.comparison import (
    ENCODERS,
    ArmFigures,
    Budget,
    Comparison,
    RunFigures,
    write_comparison,
)
from trainer.verdict import judge

IMAGES = 40
SVG = "{http://www.w3.org/2000/svg}"


def arm(method: str, *, gain: float = 0.0, seeds: int = 2, epochs: int = 0) -> ArmFigures:
    runs = []
    for seed in range(seeds):
        noise = np.random.default_rng([seed, epochs]).normal(0, 0.1, IMAGES)
        values = np.linspace(0, 2, IMAGES) + gain + noise
        curve = [(float(epoch), 1 + gain * epoch / epochs) for epoch in range(1, epochs + 1)]
        runs.append(
            RunFigures(
                seed,
                {"probe/rankme": 10.0},
                {"probe/rankme": 10.0 + gain, "probe/odd": float("nan")},
                values,
                [(0.0, 1.0), *curve],
                {"": Budget(1500, epochs, 32, 46 * epochs, 61.4 if seed else None)}
                if epochs
                else {},
            )
        )
    about = {"method": method, "encoder": "timm_vit, weights <b>&amp;</b>"}
    return ArmFigures(about, runs)


def comparison(arms: dict[str, ArmFigures], *, seen: int = 0) -> Comparison:
    values = {name: np.stack([run.cider_d for run in one.runs]) for name, one in arms.items()}
    judgement = judge(values, "frozen")
    command = "python -m trainer <x>"
    return Comparison(ENCODERS, arms, judgement, seen, "the frozen encoder", command, "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    arms = {
        "frozen": arm("none"),
        "better": arm("simclr", gain=1, epochs=3),
        "worse": arm("moco", gain=-1, epochs=4),
    }
    write_comparison(folder, comparison(arms))
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> ElementTree.Element:
    """The page, read as XML: every tag is closed and every attribute quoted."""
    text = (folder / "compare.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>\n")
    return ElementTree.fromstring(text.removeprefix("<!doctype html>"))


def words(element: ElementTree.Element | None) -> str:
    assert element is not None
    return " ".join("".join(element.itertext()).split())


def test_the_verdict_stands_on_top(page: ElementTree.Element) -> None:
    top = words(page.find("body/main/*"))
    assert top.startswith("Keep better: it scores 1.999, +1.001 [")
    assert words(page.find("head/title")) == top


def test_the_table_has_every_arm_and_figure(page: ElementTree.Element) -> None:
    table = page.findall(".//table")[0]
    rows = [[words(cell) for cell in row] for row in table.findall("tbody/tr")]
    heads = ["frozennone", "bettersimclr", "worsemoco"]
    assert [row[0].split("timm_vit")[0] for row in rows] == heads
    assert rows[0][3:] == ["baseline", "", "10.0"]
    assert "timm_vit, weights <b>&amp;</b>" in rows[0][0]
    assert re.fullmatch(r"\+1\.0\d\d\+0\.9\d\d to \+1\.0\d\d", rows[1][3])
    assert rows[1][4:] == ["< 0.001", "10.0 \N{RIGHTWARDS ARROW} 11.0"]
    assert [len(row[2].split()) for row in rows] == [2, 2, 2]
    assert table.find("tbody/tr[2]/td[3]/b[@class='better']") is not None
    assert table.find("tbody/tr[3]/td[3]/b[@class='worse']") is not None


def test_the_budget_is_exact_and_unequal_ones_are_named(page: ElementTree.Element) -> None:
    rows = [
        [words(cell) for cell in row] for row in page.findall(".//table")[1].findall("tbody/tr")
    ]
    assert rows[0][:2] == ["frozen", "none"]
    assert rows[1] == ["better", "1,500", "3", "32", "138", "not measured, 61 s"]
    notes = words(page.find("body/main/ul"))
    assert "The arms were not given the same budget" in notes
    assert "over images and the 2 seeds; p values are two-sided and corrected for 2 tests" in notes
    assert words(page.find(".//pre")) == "python -m trainer <x>"


def test_it_stands_alone(folder: Path, page: ElementTree.Element) -> None:
    text = (folder / "compare.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert not re.search(r'(?:src|href)="(?!#)', text)
    assert "url(http" not in text and "@import" not in text
    ids = [element.get("id") for element in page.iter() if element.get("id")]
    assert len(ids) == len(set(ids)) > 0


def test_its_charts_take_their_colours_from_the_page(page: ElementTree.Element) -> None:
    charts = page.findall(f".//{SVG}svg")
    assert len(charts) == 2
    differences, curves = (ElementTree.tostring(one, encoding="unicode") for one in charts)
    assert not re.search(r"#[0-9a-f]{6}\b", differences + curves)
    assert "stroke: var(--good)" in differences and "stroke: var(--bad)" in differences
    assert "stroke: var(--arm-1)" in curves and "stroke: var(--arm-2)" in curves
    for name in ("better", "worse"):
        assert f">{name}</" in differences and f">{name}</" in curves
    assert ">frozen</" in curves


def test_a_mean_curve_has_the_epochs_that_all_runs_have() -> None:
    curves = [[(0.0, 1.0), (1.0, 5.0), (2.0, 3.0)], [(0.0, 3.0), (2.0, 5.0)]]
    chart = ElementTree.fromstring(curve_chart({"arm": curves}, label="x"))
    marks = [mark.get("style", "") for mark in chart.iter(f"{SVG}use")]
    assert sum("var(--arm-0)" in mark for mark in marks) == 2 + 1  # and one of the legend


def test_the_numbers_are_json(folder: Path) -> None:
    numbers = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    assert numbers["verdict"].startswith("Keep better")
    assert numbers["arms"]["frozen"]["difference"] is None
    better = numbers["arms"]["better"]
    assert better["difference"]["low"] < better["difference"]["value"] == pytest.approx(1, abs=0.1)
    assert better["runs"][1]["budget"]["seconds"] == 61.4
    assert better["runs"][0]["after"] == {"probe/rankme": 11.0, "probe/odd": None}
    assert np.mean(better["runs"][0]["cider_d_per_image"]) == pytest.approx(
        better["runs"][0]["cider_d"]
    )


def test_it_warns_of_one_seed_and_of_images_that_were_seen() -> None:
    arms = {"frozen": arm("none", seeds=1), "other": arm("simclr", seeds=1, epochs=2)}
    notes = " ".join(comparison(arms, seen=7).notes)
    assert "One seed: 95 % intervals are over images alone" in notes
    assert "two-sided. " in notes
    assert "7 images of dev are also learnt from" in notes
    assert "same budget" not in notes
