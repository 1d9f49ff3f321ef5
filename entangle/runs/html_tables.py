"""Compact HTML of results for notebooks: a title, lines that sum up, and the head of a table.

Everything is escaped: names come from models and files, tokens may hold anything.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from entangle.errors import visible

_LONGEST_CELL = 60
_STYLE = "font-variant-numeric: tabular-nums"


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
