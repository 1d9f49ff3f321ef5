import re
import unicodedata
import warnings

import matplotlib as mpl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entangle.errors import visible
from entangle.plotting import paper_style
from entangle.plotting.style import PaperFigure, printable, shorten, text_families, width


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain $5 text", "plain $5 text"),
        ("a\n\tb\r", r"a\n\tb\r"),
        ("\x1b[31m\x00\x7f", r"\x1b[31m\x00\x7f"),
        ("zero\u200bwidth\u202eturned", r"zero\u200bwidth\u202eturned"),
        ("中国", r"\u4e2d\u56fd"),
        ("🙂", r"\U0001f642"),
        ("\ud800", r"\ud800"),
        ("\u2028", r"\u2028"),
        ("naïve Привет γειά שלום ▁Ġ", "naïve Привет γειά שלום ▁Ġ"),
        ("e\u0301", "é"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("", ""),
    ],
)
def test_every_character_can_be_seen(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(alphabet=st.characters(exclude_categories=[])))
def test_a_figure_spells_out_what_a_page_does_and_missing_glyphs(text: str) -> None:
    normal = unicodedata.normalize("NFC", text)
    assert printable(visible(normal)) == printable(text)
    assert printable(text).isascii() or visible(printable(text)) == printable(text)


@given(st.text(alphabet=st.characters(exclude_categories=[])))
def test_nothing_that_is_written_lacks_a_glyph(text: str) -> None:
    once = printable(text)
    assert printable(once) == once
    assert "\n" not in once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = PaperFigure(figsize=(2, 1))
        figure.text(0, 0, once, family=text_families(), parse_math=False)
        figure.draw_without_rendering()


def test_families_that_the_user_names_come_after_our_own() -> None:
    assert text_families() == ["DejaVu Sans"]
    with mpl.rc_context({"font.family": ["DejaVu Sans", "DejaVu Serif", "monospace"]}):
        assert text_families() == ["DejaVu Sans", "DejaVu Serif"]
        with paper_style():
            assert mpl.rcParams["font.family"] == ["DejaVu Sans", "DejaVu Serif"]
            assert text_families() == ["DejaVu Sans", "DejaVu Serif"]
    assert text_families() == ["DejaVu Sans"]


@pytest.mark.parametrize(
    ("cells", "start", "end"), [(8, "abcdefgh", "abcdefgh"), (5, "abcd…", "…efgh"), (1, "…", "…")]
)
def test_text_is_cut_to_its_cells(cells: int, start: str, end: str) -> None:
    assert shorten("abcdefgh", cells) == start
    assert shorten("abcdefgh", cells, keep="end") == end


@given(st.text(), st.integers(1, 30), st.sampled_from(["start", "end"]))
def test_cut_text_fits(text: str, cells: int, keep: str) -> None:
    cut = shorten(text, cells, keep=keep)
    assert width(cut) <= cells
    assert cut == text or (cut.startswith("…") or cut.endswith("…"))


def test_wide_characters_take_two_cells_and_accents_none() -> None:
    assert width("中a\u0301") == 3
    assert shorten("中国人", 5) == "中国…"
    assert not re.search("国", shorten("中国人", 3))
