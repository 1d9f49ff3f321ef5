"""The page as a person meets it: opened from a file in Chromium, sorted, searched, linked to."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.explorer.servers import chromium_page, find_browser
from tests.report.samples import by_hand
from tests.report.test_report import HOSTILE, SEEN, decomposed

if TYPE_CHECKING:
    from playwright.sync_api import Dialog, Page

    from entangle.results.scores import NeuronScores

pytestmark = pytest.mark.browser
MARKUP = HOSTILE[0]
ROWS = "#grid .sizer .row:visible"
READY = "html[data-ready]"


@pytest.fixture(scope="module")
def scores() -> "NeuronScores":
    scores = by_hand({"a": 400, "b/c": 200, MARKUP: 5})
    frame = scores.frame.copy()
    frame.loc[10, "skewness"] = -7.25
    frame.loc[300, "skewness"] = 9.5
    return replace(scores, frame=frame)


@pytest.fixture(scope="module")
def address(scores: "NeuronScores", tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "page.html"
    return str(scores.report(out, runs=[decomposed(tokens=HOSTILE)]).address)


@pytest.fixture(scope="module")
def opened(address: str) -> Iterator[tuple["Page", list[str]]]:
    """A page that is not opened yet, and what its console says."""
    if find_spec("playwright") is None:
        pytest.skip("playwright is not installed")
    browser = find_browser()
    if browser is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with chromium_page(browser) as page:
        said: list[str] = []

        def dismiss(dialog: "Dialog") -> None:
            said.append("dialog")
            dialog.dismiss()

        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", dismiss)
        page.on("request", lambda one: said.append(one.url))
        page.set_default_timeout(60_000)
        yield page, said


@pytest.fixture
def page(opened: tuple["Page", list[str]], address: str) -> Iterator["Page"]:
    """The page at its table; nothing may go wrong on it or be asked of a network."""
    page, said = opened
    page.goto("about:blank")
    page.goto(address)
    page.locator(READY).wait_for(state="attached")
    yield page
    assert [one for one in said if not one.startswith(("file:", "data:"))] == []


def row_at_top(page: "Page") -> str:
    return page.locator('#grid [aria-rowindex="2"] .name').inner_text()


def test_sorting(page: "Page") -> None:
    assert page.locator("#count").inner_text() == "605 neurons"
    assert row_at_top(page) == "0.p0 · 0"
    page.locator("#grid [data-name=skewness]").click()
    assert row_at_top(page) == "0.p0 · 300"
    page.locator("#grid [data-name=skewness]").click()
    assert row_at_top(page) == "0.p0 · 10"
    assert page.locator("#grid [data-name=skewness]").get_attribute("aria-sort") == "ascending"
    assert page.locator(ROWS).count() < 60  # of 605
    page.locator("#grid").focus()
    page.keyboard.press("End")
    assert page.locator("#grid .row.at .name").inner_text() == "0.p0 · 300"


def found(page: "Page", text: str, count: str) -> None:
    page.keyboard.press("/")
    page.locator("#search").fill(text)
    page.wait_for_function(
        "(text) => document.getElementById('count').textContent === text", arg=count
    )


def test_searching(page: "Page") -> None:
    found(page, "7", "2 of 605 neurons")
    found(page, "skew<-5", "1 of 605 neurons")
    assert row_at_top(page) == "0.p0 · 10"
    found(page, "wd=0.102", "1 of 605 neurons")  # 0.102005, equal in the digits that are written
    found(page, "wd=1.02e-1", "1 of 605 neurons")
    found(page, "block:1 wd>=0.5", "100 of 605 neurons")
    found(page, "b/c", "200 of 605 neurons")
    found(page, f'"{SEEN[3]}"', "1 of 605 neurons")  # a token of one neuron
    assert row_at_top(page) == "0.p0 · 7"
    found(page, "width>3", "0 of 605 neurons")
    assert "width" in page.locator("#wrong").inner_text()
    page.keyboard.press("Escape")
    page.locator("#grid").focus()
    page.keyboard.press("Escape")


def test_addresses_and_history(page: "Page", address: str) -> None:
    page.goto("about:blank")
    page.goto(f"{address}#b%2Fc/3")
    page.locator(READY).wait_for(state="attached")
    title = page.locator("h2.title")
    assert title.inner_text() == "b/c · neuron 3"
    assert "rank 4 of 200" in page.locator(".score").inner_text()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => location.hash !== '#b%2Fc/3'")
    after = page.evaluate("location.hash")
    page.go_back()
    page.wait_for_function("() => document.querySelector('h2.title').textContent.endsWith(' 3')")
    page.go_forward()
    page.wait_for_function("() => !document.querySelector('h2.title').textContent.endsWith(' 3')")
    assert page.evaluate("location.hash") == after
    page.keyboard.press("Escape")
    page.locator("#grid").wait_for()
    page.evaluate("location.hash = '#b%2Fc/'")
    page.wait_for_function(
        "() => document.getElementById('count').textContent.startsWith('200 of')"
    )
    page.evaluate("location.hash = '#nowhere/3'")
    page.locator("#wrong").wait_for()
    assert "nowhere/3" in page.locator("#wrong").inner_text()
    for part in ("layers", "runs"):
        page.evaluate(f"location.hash = '#:{part}'")
        page.locator(f"#view-{part}").wait_for()


def test_the_page_of_a_neuron(page: "Page") -> None:
    page.evaluate("location.hash = '#a/7'")
    page.locator("h2.title").get_by_text("neuron 7").wait_for()
    text = page.locator("#view-neuron").inner_text()
    assert all(
        part in text for part in ("One mode", "Near in, far out", "Experts", "Under ablation")
    )
    assert "entangle ablate" in text
    bars = page.locator("#view-neuron .chart").first.locator("rect.bar-fill title")
    told = [one.split(": ")[1].split(" of ")[0] for one in bars.all_text_contents()]
    assert sum(map(int, told)) == 64
    chips = page.locator(".chip bdi").all_text_contents()
    assert chips == SEEN
    page.evaluate("location.hash = '#a/350'")
    page.locator("h2.title").get_by_text("neuron 350").wait_for()
    assert "--neurons" in page.locator("#view-neuron").inner_text()


def test_text_is_never_markup(page: "Page", opened: tuple["Page", list[str]]) -> None:
    page.evaluate(f"location.hash = '#' + encodeURIComponent({MARKUP!r}) + '/2'")
    page.locator("h2.title").get_by_text("neuron 2").wait_for()
    assert page.locator("h2.title bdi").inner_text() == MARKUP
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    assert "dialog" not in opened[1]


def test_light_dark_and_a_phone(page: "Page") -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(paper)
    assert dark != light
    page.keyboard.press("t")
    assert page.evaluate(paper) == light
    page.keyboard.press("t")
    assert page.evaluate(paper) == dark
    page.emulate_media(color_scheme="light")
    page.evaluate("localStorage.clear()")
    for address in ("#", "#a/7", "#:layers", "#:runs"):
        page.set_viewport_size({"width": 400, "height": 800})
        page.evaluate(f"location.hash = {address!r}")
        page.wait_for_timeout(100)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.set_viewport_size({"width": 1500, "height": 950})


def test_a_page_without_scripts_still_tells(address: str) -> None:
    text = Path(address.removeprefix("file://")).read_text("utf-8")
    assert text.index("<noscript>") < text.index('<script type="application/json"')
    assert text.count("<tr>") > 3
