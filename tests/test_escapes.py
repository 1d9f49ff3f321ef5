import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entangle.errors import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("日本語 مرحبا नमस्ते é", "日本語 مرحبا नमस्ते é"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\x1b[31m\x00\x7f", r"\x1b[31m\x00\x7f"),
        ("\u202eabc\u2066", r"\u202eabc\u2066"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
        ("क्\u200dष", "क्\u200dष"),
        ("", ""),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.text(st.characters(codec=None), max_size=50))
def test_what_is_shown_is_one_line_that_acts_on_no_terminal(text: str) -> None:
    shown = visible(text)
    assert len(shown.splitlines()) == (1 if text else 0)
    assert not {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, shown))
    assert not set(map(unicodedata.bidirectional, shown)) & {
        "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"
    }  # fmt: skip
    assert shown.encode("utf-8")[:1] == shown[:1].encode("utf-8")[:1]
    assert visible(shown) == shown
