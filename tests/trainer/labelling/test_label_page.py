"""The labelling page in a real browser: keys, two tabs, and what it shows when things go wrong."""

import json
import os
from pathlib import Path

import pytest
from chromium import chromium
from desk import desk, served

from trainer.labelling.refits import Refits, Step

pytestmark = pytest.mark.browser

SETTLED = "document.body.ariaBusy === 'false' && !document.querySelector('aside').hidden"
NAME = "document.querySelector('#name').textContent"
CAPTIONS = (
    "[...document.querySelectorAll('#captions .row:not(.empty) span')].map((s) => s.textContent)"
)
PROGRESS = "document.querySelector('#progress').textContent"
PROBLEM = "(document.querySelector('#problem:not([hidden])')?.textContent ?? '')"
WRITES = "document.activeElement.id === 'text'"
# Noted as soon as the end shows: a browser takes the focus from what is hidden a frame later.
FOCUS_AT_THE_END = """new MutationObserver(() => {
    window.focused ??= document.activeElement.localName;
}).observe(document.querySelector('#end'), {attributes: true})"""
PROPOSALS = {0: ["a dog", "two dogs", "<b>a cat</b>"], 1: ["a bird"], 2: ["a bike", "a tree"]}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


class Bench:
    """A session, the page over it, and what is on disk."""

    def __init__(self, browser, client, session):
        self.page, self.session = browser, session
        self.url = str(client.base_url)
        self.open(browser)

    def open(self, page):
        page.errors.clear()
        page.requests.clear()
        page.open(self.url)
        page.until("document.body.ariaBusy === 'false'")

    def at(self, number, page=None):
        (page or self.page).until(f"{SETTLED} && {NAME} === 'p{number}.png'")

    def rows(self):
        lines = self.session.answers.path.read_bytes().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def open_bench(browser, tmp_path: Path):
    contexts = []

    def make(refits=None, **settings):
        session = contexts_enter(contexts, desk(tmp_path, **{"given": PROPOSALS, **settings}))
        client = contexts_enter(contexts, served(session, refits and refits(session)))
        return Bench(browser, client, session)

    yield make
    browser.open("about:blank")
    for context in reversed(contexts):
        context.__exit__(None, None, None)


def contexts_enter(contexts, context):
    value = context.__enter__()
    contexts.append(context)
    return value


def test_keys_accept_edit_skip_and_go_back(open_bench) -> None:
    bench = open_bench()
    page = bench.page
    bench.at(0)
    assert page.evaluate("document.querySelectorAll('#proposals b').length") == 0  # text, no HTML
    page.until("document.querySelector('#photo').naturalWidth === 48")
    page.press("2")
    bench.at(1)
    assert page.evaluate(PROGRESS).startswith("1 labelled · 3 left · about ")
    page.press("e")
    page.until(f"{WRITES} && document.querySelector('#text').value === 'a bird'")
    page.write("1 grey bird, S for small")  # keys are letters while one writes
    page.press("Enter")
    bench.at(2)
    page.press("s")
    bench.at(3)
    page.until(WRITES)  # nothing is proposed, so one writes at once
    page.press("Escape")
    page.press("ArrowLeft")
    bench.at(2)
    page.press("b")
    bench.at(1)
    assert page.evaluate(CAPTIONS) == ["1 grey bird, S for small"]
    page.press("1")  # another answer after all
    bench.at(3)
    page.until(WRITES)
    page.write("the last")
    page.evaluate(FOCUS_AT_THE_END)
    page.press("Enter")
    page.until("!document.querySelector('#end').hidden")
    assert page.evaluate("window.focused") == "body"  # not the text, which would take the next key
    assert "Nothing is left to do: 3 labelled, 1 skipped." in page.evaluate(
        "document.querySelector('#ended').textContent"
    )
    page.press("b")
    bench.at(3)
    found = [
        (row["image"], row["action"], row["captions"], row["proposal"]) for row in bench.rows()
    ]
    assert found == [
        ("p0.png", "accept", ["two dogs"], 2),
        ("p1.png", "edit", ["1 grey bird, S for small"], None),
        ("p2.png", "skip", [], None),
        ("p1.png", "accept", ["a bird"], 1),
        ("p3.png", "edit", ["the last"], None),
    ]
    assert all(0 < row["seconds"] < 60 for row in bench.rows())
    assert page.errors == []
    assert all(url.startswith((bench.url, "data:")) for url in page.requests)


def test_buttons_do_what_keys_do(open_bench) -> None:
    bench = open_bench()
    page = bench.page
    bench.at(0)
    page.evaluate("document.querySelector('#proposals button').click()")
    bench.at(1)
    page.evaluate("document.querySelector('#skip').click()")
    bench.at(2)
    page.evaluate("document.querySelector('#back').click()")
    bench.at(1)
    unnamed = "[...document.querySelectorAll('button, textarea, img')].filter((e) => "
    unnamed += "!(e.ariaLabel || e.alt || e.labels?.length || e.textContent.trim())).length"
    assert page.evaluate(unnamed) == 0
    assert [row["action"] for row in bench.rows()] == ["accept", "skip"]


def test_several_captions_an_image(open_bench) -> None:
    bench = open_bench(captions_per_image=2)
    page = bench.page
    bench.at(0)
    page.press("1")
    page.until(f"{SETTLED} && {CAPTIONS}.length === 1")
    page.press("1")  # is there already
    page.press("2")
    bench.at(1)
    page.press("b")
    bench.at(0)
    assert page.evaluate(CAPTIONS) == ["a dog", "two dogs"]
    page.press("d")
    page.until(f"{SETTLED} && {CAPTIONS}.length === 1")
    page.press("d")
    page.until(f"{SETTLED} && {CAPTIONS}.length === 0")
    found = [(row["action"], row["captions"]) for row in bench.rows()]
    assert found == [
        ("accept", ["a dog"]),
        ("accept", ["a dog", "two dogs"]),
        ("edit", ["a dog"]),
        ("clear", []),
    ]


def test_two_tabs_get_different_images_and_never_overwrite_each_other(open_bench) -> None:
    bench = open_bench()
    page = bench.page
    bench.at(0)
    other = page.another()
    try:
        bench.open(other)
        bench.at(1, other)
        bench.at(0)
        page.press("1")
        bench.at(2)
        other.press("1")
        bench.at(3, other)
        other.press("Escape")
        other.press("b")
        bench.at(1, other)
        # A tab looks at a photograph that is answered elsewhere meanwhile.
        page.press("b")
        bench.at(0)
        assert bench.session.answer(0, "edit", ["the other's"], revision=1)
        page.press("2")
        page.until(f"{PROBLEM}.includes('answered elsewhere')")
        assert "yours was: two dogs" in page.evaluate(PROBLEM)
        assert page.evaluate(CAPTIONS) == ["the other's"]
        page.press("2")  # having seen it
        bench.at(2)
        assert bench.session.shown(0)["captions"] == ["two dogs"]
    finally:
        other.close()
    assert [row["captions"] for row in bench.rows()] == [
        *(["a dog"], ["a bird"], ["the other's"], ["two dogs"])
    ]


def test_what_goes_wrong_is_said_and_work_goes_on(open_bench, monkeypatch) -> None:
    bench = open_bench()
    page = bench.page
    bench.at(0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        page.press("1")
        page.until(f"{PROBLEM}.includes('not saved') && {PROBLEM}.includes('No space left')")
    bench.at(0)
    assert bench.rows() == []
    bench.session.photos[2].path.unlink()
    page.press("1")
    bench.at(1)
    page.press("1")
    bench.at(2)
    page.until("document.querySelector('#broken').textContent.endsWith('p2.png: no such file')")
    page.press("s")
    bench.at(3)
    page.until("!document.querySelector('#photo').hidden")
    assert page.evaluate(PROBLEM) == ""


def full(file: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_refit_that_fails_is_shown_and_labelling_goes_on(open_bench, tmp_path: Path) -> None:
    def refits(session):
        steps = [
            Step(
                "training",
                ["sh", "-c", "echo error: no such recipe; exit 1"],
                tmp_path / "log",
                lambda: None,
            )
        ]
        return Refits(tmp_path, 1, lambda labels: steps)

    bench = open_bench(refits)
    page = bench.page
    bench.at(0)
    page.press("1")
    bench.at(1)
    shown = page.until(
        "document.querySelector('#refit.failed') && document.querySelector('#refit').textContent"
    )
    assert shown == (
        "Learning from 1 labels failed, labelling goes on: training: error: no such recipe"
    )
    page.press("1")
    bench.at(2)


def test_proposals_that_come_late_appear(open_bench) -> None:
    bench = open_bench(given={})
    page = bench.page
    bench.at(0)
    bench.session.proposals.use(lambda path: [f"what {path.stem} shows"])
    page.press("Escape")
    page.press("s")
    bench.at(1)
    page.until("!document.querySelector('#waiting').hidden")
    bench.session.proposals.start(bench.session.upcoming)
    page.until("document.querySelector('#proposals span')?.textContent === 'what p1 shows'")
    page.press("1")
    bench.at(2)
    bench.session.proposals.stop()


def test_picks_end_with_a_question(open_bench) -> None:
    bench = open_bench(picks=["p1.png"])
    page = bench.page
    bench.at(1)
    page.press("1")
    page.until("!document.querySelector('#beyond').hidden")
    page.press("ArrowRight")
    bench.at(0)


def test_a_phone_needs_no_scrolling_sideways(open_bench) -> None:
    long = "a very long caption of a word that has no end, " + "e" * 200
    bench = open_bench(given={0: [long]})
    page = bench.page
    bench.at(0)
    page.resize(360, 720)
    assert page.evaluate(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    page.resize(1100, 760)
    assert page.evaluate("document.querySelector('#photo').getBoundingClientRect().height > 500")


def test_a_reload_keeps_the_way_back(open_bench) -> None:
    bench = open_bench()
    page = bench.page
    bench.at(0)
    page.press("1")
    bench.at(1)
    page.open("about:blank")
    bench.open(page)
    bench.at(1)
    page.press("b")
    bench.at(0)
    assert page.evaluate(CAPTIONS) == ["a dog"]
