"""The explorer as a person meets it: Jupyter in a browser, a cell that runs, clicks."""

import os
import re
import shutil
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.explorer.servers import (
    FRONT_ENDS,
    FrontEnd,
    chromium_page,
    find_browser,
    jupyter_server,
    write_notebook,
)

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

    from entangle.results.scores import NeuronScores

GATE, DOWN = "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"
CELL = "import entangle\nentangle.explore('scores')"
SECONDS = 1000.0  # of playwright's milliseconds
PATIENCE = 120 * SECONDS

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> str:
    for package in ("playwright", "ipywidgets"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    found = find_browser()
    if found is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    return found


@pytest.fixture(
    params=[
        name if name == "lab" else pytest.param(name, marks=pytest.mark.slow) for name in FRONT_ENDS
    ]
)
def front(request: pytest.FixtureRequest) -> FrontEnd:
    found = FRONT_ENDS[request.param]
    if find_spec(found.module) is None:
        pytest.skip(f"{found.module} is not installed (pip install {found.module})")
    return found


@pytest.fixture
def page(browser: str, front: FrontEnd, scores: "NeuronScores", tmp_path: Path) -> Iterator["Page"]:
    """A page that shows a notebook whose only cell has not run yet."""
    scores.save(tmp_path / "scores")
    write_notebook(tmp_path / "explore.ipynb", CELL)
    with jupyter_server(front, tmp_path) as (address, token), chromium_page(browser) as opened:
        opened.set_default_timeout(PATIENCE)
        opened.goto(f"{address}{front.place}explore.ipynb?token={token}")
        opened.locator(front.ready).wait_for()
        yield opened


def accept_dialogs(page: "Page") -> None:
    """Close what covers the page, such as a question about the kernel on a slow machine."""
    buttons = page.locator(".jp-Dialog button.jp-mod-accept, .modal.in button.btn-primary")
    for _ in range(buttons.count()):
        buttons.first.click()


def run_cell(page: "Page", front: FrontEnd) -> None:
    """Run the first cell; a page that is still connecting to its kernel drops the first tries."""
    prompt = page.locator(front.prompt).first
    end = time.monotonic() + PATIENCE / SECONDS
    while not re.search(r"[\d*]", prompt.inner_text()):
        assert time.monotonic() < end, "the cell did not run"
        accept_dialogs(page)
        page.locator(front.editor).first.click()
        page.keyboard.press("Shift+Enter")
        page.wait_for_timeout(2 * SECONDS)


def wait_for_text(locator: "Locator", text: str) -> None:
    locator.filter(has_text=text).wait_for()


def keep_screenshot(page: "Page", tmp_path: Path) -> None:
    """Keep a picture of the page, also where ENTANGLE_SCREENSHOT says."""
    path = tmp_path / "explorer.png"
    page.screenshot(path=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    wanted = os.environ.get("ENTANGLE_SCREENSHOT")
    if wanted:
        shutil.copyfile(path, wanted)


def test_a_click_on_another_neuron_changes_the_plot(
    page: "Page", front: FrontEnd, scores: "NeuronScores", tmp_path: Path
) -> None:
    run_cell(page, front)
    plot = page.locator(".entangle-pane img:visible").first
    plot.wait_for()
    heading = page.locator(".entangle-heading")
    lines = page.locator(".entangle-neurons select")
    by_wd = [int(neuron) for neuron in scores.layer(GATE).top(48)["neuron"]]
    wait_for_text(heading, f"{GATE} · neuron {by_wd[0]}")
    before, source = plot.screenshot(), plot.get_attribute("src")

    lines.locator("option").nth(3).click()
    wait_for_text(heading, f"{GATE} · neuron {by_wd[3]}")
    page.wait_for_function(
        "source => [...document.querySelectorAll('.entangle-pane img')]"
        ".every(image => image.src !== source)",
        arg=source,
    )
    assert plot.screenshot() != before
    keep_screenshot(page, tmp_path)

    page.get_by_label("row", exact=True).press("ArrowUp")
    wait_for_text(heading, f"{GATE} · neuron {by_wd[4]}")

    page.get_by_role("button", name="md", exact=True).click()
    by_md = scores.layer(GATE).top(1, by="md")["neuron"].iloc[0]
    wait_for_text(heading, f"{GATE} · neuron {by_md}")
    assert lines.locator("option").count() == 48

    page.get_by_label("layer", exact=True).select_option("down_proj")
    wait_for_text(heading, f"{DOWN} · neuron {scores.layer(DOWN).top(1)['neuron'].iloc[0]}")
    assert lines.locator("option").count() == 32

    page.get_by_role("tab", name="Layer").click()
    page.locator(".entangle-pane img:visible").wait_for()
    page.get_by_role("tab", name="Modes").click()
    page.get_by_text("Modes need a decomposition").wait_for()
    page.get_by_role("tab", name="Own text").click()
    page.get_by_text("A text of your own needs the model").wait_for()

    with page.expect_download() as saved:
        page.get_by_role("button", name="HTML").click()
    assert "<h2>Distribution</h2>" in saved.value.path().read_text("utf-8")
    with page.expect_download() as again:
        page.get_by_role("link", name="Save ").click()
    assert again.value.path().read_bytes() == saved.value.path().read_bytes()
