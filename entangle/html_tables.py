"""Compact HTML of results for notebooks: a title, lines that sum up, and the head of a table.

Everything is escaped: names come from models and files, tokens may hold anything.
"""

import html
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import pandas as pd

_LONGEST_CELL = 60
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # part of the spelling of some scripts and of emoji
_STYLE = "font-variant-numeric: tabular-nums"


def visible(text: str) -> str:
    r"""Return a text in which characters that cannot be seen, or reorder others, are spelled out.

    Control, formatting, broken and unassigned characters and line separators become escapes as in
    Python: ``\n``, ``\x1b``, ``\u202e``. Joiners stay: scripts need them.
    """
    return "".join(spelled(char) if is_unseen(char) else char for char in text)


@lru_cache(maxsize=65_536)
def is_unseen(character: str) -> bool:
    """Tell whether a character cannot be seen, or reorders others."""
    return unicodedata.category(character) in _UNSAFE and character not in _JOINERS


def spelled(character: str) -> str:
    r"""Return a character as Python escapes it: ``\n``, ``\x1b``, ``\u202e``, ``\U000e0041``."""
    return character.encode("unicode_escape").decode("ascii")


def escaped(text: object) -> str:
    """Return a text as HTML that shows it as it is: `visible`, then ``<``, ``&`` and quotes."""
    return html.escape(visible(str(text)))


def number(value: float, digits: int = 4) -> str:
    """Return a number with so many significant digits and a real minus sign, ``–`` for NaN."""
    if value != value:  # NaN
        return "–"
    return f"{value:.{digits}g}".replace("-", "−").replace("inf", "∞")


def html_table(frame: pd.DataFrame, *, rows: int = 10) -> str:
    """Return the first rows of a frame as an HTML table, and how many there are.

    Parameters
    ----------
    frame
        Any frame; its index is not shown. Floats get four significant digits, missing values a
        dash, long texts are cut.
    rows
        How many rows are shown.
    """
    head = "".join(f"<th>{escaped(name)}</th>" for name in frame.columns)
    body = "".join(
        f"<tr>{''.join(map(_cell, values))}</tr>"
        for values in frame.head(rows).itertuples(index=False, name=None)
    )
    table = f'<table style="{_STYLE}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    left = len(frame) - rows
    return table + (f"<p>… and {left:,} more rows</p>" if left > 0 else "")


def html_result(
    title: str, lines: Sequence[str], frame: pd.DataFrame | None = None, *, rows: int = 10
) -> str:
    """Return a result as HTML: its title, lines that sum it up, and the head of its table.

    Parameters
    ----------
    title, lines
        Plain texts, escaped here.
    frame, rows
        As in `html_table`; no table if None.
    """
    told = "<br>".join([f"<b>{escaped(title)}</b>", *map(escaped, lines)])
    return f"<div><p>{told}</p>{'' if frame is None else html_table(frame, rows=rows)}</div>"


def described(manifest: Any, *path: str, default: str = "?") -> str:
    """Return an entry of a manifest as a text, by its keys, or ``default`` if it is not there."""
    for key in path:
        if not isinstance(manifest, Mapping) or manifest.get(key) is None:
            return default
        manifest = manifest[key]
    if isinstance(manifest, list | tuple):
        return ", ".join(map(str, manifest))
    return f"{manifest:,}" if isinstance(manifest, int) else str(manifest)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td style="text-align: right">{number(value)}</td>'
    if pd.api.types.is_integer(value):
        return f'<td style="text-align: right">{value}</td>'
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return '<td style="text-align: right">–</td>'
    text = visible(str(value))
    cut = text if len(text) <= _LONGEST_CELL else text[: _LONGEST_CELL - 1] + "…"
    hint = "" if cut == text else f' title="{html.escape(text[:2000])}"'
    return f'<td style="text-align: left"{hint}>{html.escape(cut)}</td>'
