import html
from html.parser import HTMLParser
from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entangle.errors import visible
from entangle.runs.tables import described, escaped, html_result, html_table, number, with_ends

SCRIPT = "<script>alert('1' & \"2\")</script>"


class Text(HTMLParser):
    """The text of every element, with what kinds of elements there are."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@given(st.text(st.characters(codec=None), max_size=50))
def test_any_text_survives_as_one_piece_of_text(text: str) -> None:
    source = escaped(text)
    source.encode()  # no broken characters
    assert html.unescape(source) == visible(text)
    assert Text(f"<b>{source}</b>").tags == {"b"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.123456, "0.1235"),
        (-2.0, "−2"),
        (float("nan"), "–"),
        (-np.inf, "−∞"),
        (12345.6, "1.235e+04"),
    ],
)
def test_number(value: float, shown: str) -> None:
    assert number(value) == shown


def test_a_table_shows_its_head() -> None:
    frame = pd.DataFrame(
        {
            "name": ["a", SCRIPT, None, "x" * 100],
            "value": [0.5, np.nan, -1.25, 3.0],
            "count": pd.array([1, None, 3, 4], dtype="Int64"),
            "list": [[1, 2], [], "b", "c"],
        }
    )
    source = html_table(frame, rows=4)
    texts = Text(source)
    assert texts.tags == {"table", "thead", "tbody", "tr", "th", "td"}
    assert texts.texts == [
        "name", "value", "count", "list",
        "a", "0.5", "1", "[1, 2]",
        SCRIPT, "–", "–", "[]",
        "–", "−1.25", "3", "b",
        "x" * 59 + "…", "3", "4", "c",
    ]  # fmt: skip
    assert f'title="{"x" * 100}"' in source
    assert html_table(frame, rows=1).endswith("<p>… and 3 more rows</p>")
    assert html_table(frame.head(0)).count("<tr>") == 1


def test_a_result_escapes_its_texts() -> None:
    texts = Text(html_result(SCRIPT, [SCRIPT, "second"]))
    assert texts.tags == {"div", "p", "b", "br"}
    assert texts.texts == [SCRIPT, SCRIPT, "second"]
    assert "<table" in html_result("title", [], pd.DataFrame({"a": [1]}))


def test_described() -> None:
    manifest = {"model": {"name": "demo", "n": 1234, "revision": None}, "text": "t"}
    assert described(manifest, "model", "name") == "demo"
    assert described(manifest, "model", "n") == "1,234"
    assert described(manifest, "model", "revision") == "?"
    assert described(manifest, "text", "name", default="none") == "none"
    assert described({}, "model") == "?"
    assert described(MappingProxyType({"by": ["wd", "md"]}), "by") == "wd, md"


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((1.010652, 1.003782, 1.01685), "1.011 [1.004, 1.017]"),
        ((21.465, 15.368, 27.562), "21.5 [15.4, 27.6]"),
        ((6.33e-5, -6.77e-5, 1.94e-4), "6.33e−05 [−6.77e−05, 0.000194]"),
        ((2.0, 1.0, np.inf), "2 [1, ∞]"),
        ((0.5, np.nan, np.nan), "0.5"),
        ((1.0, 1.0, 1.0), "1 [1, 1]"),
    ],
)
def test_an_end_beside_a_bar_does_not_lie_on_it(
    numbers: tuple[float, float, float], said: str
) -> None:
    assert with_ends(*numbers) == said
