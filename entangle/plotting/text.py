"""Text from tokenizers as a figure can show it: no control characters, no missing glyphs."""

import unicodedata
from functools import lru_cache
from itertools import accumulate, takewhile

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from entangle.escapes import is_unseen, spelled

MONO_FAMILY = "DejaVu Sans Mono"
"""Comes with matplotlib; every character is 0.602 of the font size wide."""
MONO_ADVANCE = 1233.0 / 2048.0
_ELLIPSIS = "…"


def text_families() -> list[str]:
    """Return the font families of text in a figure, first to last resort.

    DejaVu Sans comes with matplotlib and gives the same figure on every machine. It has Latin,
    Greek, Cyrillic, Arabic, Hebrew and more, but no Chinese, Japanese or Korean. Families that the
    user names in ``rcParams["font.family"]`` follow it, for the characters that it lacks.
    """
    generic = {*font_manager.font_family_aliases, "DejaVu Sans"}
    return ["DejaVu Sans", *(name for name in mpl.rcParams["font.family"] if name not in generic)]


def mono_families() -> list[str]:
    """Return the families of text in columns; characters that it lacks come from the others."""
    return [MONO_FAMILY, *text_families()]


def printable(text: str) -> str:
    r"""Return text with every character visible.

    What `entangle.escapes.visible` spells out, and characters that none of `text_families` has,
    are written as Python escapes (``\n``, ``\u4e2d``); accents are joined to their letters.
    """
    families = tuple(text_families())
    joined = unicodedata.normalize("NFC", text)
    return "".join(c if _visible(c, families) else spelled(c) for c in joined)


def shorten(text: str, cells: int, *, keep: str = "start") -> str:
    """Cut text to so many cells of a fixed-width font; ``keep`` its ``"start"`` or ``"end"``."""
    if width(text) <= cells:
        return text
    ordered = text if keep == "start" else text[::-1]
    ends = accumulate(map(_cells, ordered))
    kept = ordered[: sum(1 for _ in takewhile(lambda end: end < cells, ends))]
    return kept + _ELLIPSIS if keep == "start" else _ELLIPSIS + kept[::-1]


def width(text: str) -> int:
    """Return the cells that text takes in a fixed-width font: wide characters take two."""
    return sum(_cells(c) for c in text)


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


@lru_cache(maxsize=65_536)
def _visible(character: str, families: tuple[str, ...]) -> bool:
    return not is_unseen(character) and any(
        _font(family).get_char_index(ord(character)) for family in families
    )


@lru_cache(maxsize=32)
def _font(family: str) -> FT2Font:
    found = font_manager.findfont(font_manager.FontProperties(family=[family]))
    return font_manager.get_font(found)
