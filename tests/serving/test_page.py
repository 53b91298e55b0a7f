"""The page at / in a real browser."""

import pytest
from chromium import chromium
from live import running
from tiny_bundle import picture

from exports.registry import Registry
from serving.keys import make_key

pytestmark = pytest.mark.browser

TEXTS = "[...document.querySelectorAll('#captions p')].map((p) => p.textContent)"
WIDTHS = "[...document.querySelectorAll('#captions i')].map((i) => parseFloat(i.style.width))"
SETTLED = "!document.body.classList.contains('busy')"


@pytest.fixture(scope="module")
def live(tmp_path_factory, tiny_bundles):
    root = tmp_path_factory.mktemp("registry")
    Registry(root).publish(tiny_bundles.one)
    with running(root) as live:
        yield live


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser, live):
    browser.requests.clear()
    browser.errors.clear()
    browser.open(str(live.client.base_url.join("/")))
    return browser


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(picture(3, size=(640, 480), format="JPEG"))
    return path


def api_texts(live, photo, beams):
    answer = live.client.post(
        "/v1/captions",
        files={"image": photo.read_bytes()},
        data={"num_beams": beams, "num_captions": min(beams, 5)},
    )
    return [caption["text"] for caption in answer.json()["results"][0]["captions"]]


def test_a_dropped_photo_is_shown_with_its_captions_best_first(page, live, photo):
    page.until("document.querySelector('#served').textContent === 'tiny, version 1'")
    page.drop(photo, "#drop")
    texts = page.until(f"{SETTLED} && {TEXTS}.length && {TEXTS}")
    assert texts == api_texts(live, photo, 4)
    assert page.evaluate("document.querySelector('#preview').naturalWidth") == 640
    assert page.evaluate("document.querySelector('#hint').hidden")
    widths = page.evaluate(WIDTHS)
    assert 100 > widths[0] > widths[-1] > 0
    assert widths == sorted(widths, reverse=True)
    facts = page.evaluate("document.querySelector('#facts').textContent")
    assert "tiny, version 1" in facts
    assert " ms" in facts
    assert page.errors == []
    origin = str(live.client.base_url)
    assert all(url.startswith((origin, f"blob:{origin}", "data:")) for url in page.requests)


def test_the_number_of_beams_is_chosen(page, live, photo):
    page.choose(photo, "#file")
    page.until(f"{SETTLED} && {TEXTS}.length === 4")
    page.evaluate("document.querySelector('[name=beams][value=\"1\"]').click()")
    page.until(f"{SETTLED} && {TEXTS}.length === 1")
    assert page.evaluate(TEXTS) == api_texts(live, photo, 1)


def test_what_captions_are_sorted_by_is_chosen_where_there_is_a_matcher(
    page, browser, tmp_path, tiny_bundles, photo
):
    assert page.evaluate("document.querySelector('#rerank').offsetParent === null")
    Registry(tmp_path / "matching").publish(tiny_bundles.matching)
    with running(tmp_path / "matching") as live:
        browser.open(str(live.client.base_url.join("/")))
        page.until("document.querySelector('#rerank').offsetParent !== null")
        page.choose(photo, "#file")
        page.until(f"{SETTLED} && {TEXTS}.length === 4")
        page.evaluate("document.querySelector('[name=rerank][value=itm]').click()")
        scores = "[...document.querySelectorAll('#captions data')].map((d) => d.textContent)"
        assert all(" · fits to " in text for text in page.until(f"{SETTLED} && {scores}"))
        assert page.errors == []


def test_an_error_is_shown_and_the_next_photo_works(page, live, photo, tmp_path):
    letter = tmp_path / "letter.jpg"
    letter.write_text("Dear reader")
    page.drop(letter, "#drop")
    problem = page.until(
        f"{SETTLED} && !document.querySelector('#problem').hidden"
        " && document.querySelector('#problem').innerText"
    )
    assert "Not an image" in problem
    assert page.evaluate(f"{TEXTS}.length") == 0
    page.drop(photo, "#drop")
    page.until(f"{SETTLED} && {TEXTS}.length === 4")
    assert page.evaluate("document.querySelector('#problem').hidden")


def test_a_key_is_asked_for_kept_in_the_tab_and_sent(page, browser, tmp_path, tiny_bundles, photo):
    assert page.evaluate("document.querySelector('#key').offsetParent === null")
    file = tmp_path / "keys.json"
    key = make_key(file, "visitor")
    Registry(tmp_path / "registry").publish(tiny_bundles.one)

    def enter(text):
        page.evaluate(f"document.querySelector('#secret').value = '{text}'")
        page.evaluate("document.querySelector('#key button').click()")

    with running(tmp_path / "registry", keys_file=file) as live:
        browser.open(str(live.client.base_url.join("/")))
        page.until("document.querySelector('#key').offsetParent !== null")
        page.until("document.querySelector('#served').textContent === 'a key is needed'")
        enter(key[:-3])
        page.choose(photo, "#file")
        page.until(f"{SETTLED} && document.querySelector('#problem').offsetParent !== null")
        assert page.evaluate(f"{TEXTS}.length") == 0
        page.until("document.querySelector('#key').offsetParent !== null")
        enter(key)
        page.until(f"{SETTLED} && {TEXTS}.length === 4")
        assert page.evaluate("document.querySelector('#key').offsetParent === null")
        assert page.evaluate("document.querySelector('#secret').value") == ""
        browser.open(str(live.client.base_url.join("/")))  # the tab still has it
        page.until("document.querySelector('#served').textContent === 'tiny, version 1'")
        assert page.evaluate("localStorage.length") == 0
        assert not any(key in url for url in page.requests)


def test_a_narrow_window_is_one_column_without_scrolling_sideways(page):
    page.resize(360, 720)
    assert page.evaluate(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    page.resize(1100, 760)


def test_the_interface_is_documented_without_a_network(page, live):
    page.open(str(live.client.base_url.join("/docs")))
    page.until("document.querySelectorAll('.opblock').length === 15")
    assert all(url.startswith((str(live.client.base_url), "data:")) for url in page.requests)
    assert page.errors == []
