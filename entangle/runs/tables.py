"""Compact HTML of results for notebooks: a title, lines that sum up, and the head of a table.

Everything is escaped: names come from models and files, tokens may hold anything.

Tables of results in LaTeX: rules of ``booktabs``, units in the head, intervals beside values.
"""

import html
import math
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


def with_ends(value: float, low: float, high: float) -> str:
    """Return a number with its interval: two digits of its width are seen, three of each number.

    So an end beside a bar does not look as if it lay on it.

    >>> with_ends(1.010652, 1.003782, 1.01685)
    '1.011 [1.004, 1.017]'
    >>> with_ends(21.465, 15.368, 27.562), with_ends(0.5, math.nan, math.nan)
    ('21.5 [15.4, 27.6]', '0.5')
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        ends = "" if low != low else f"[{number(low, 3)}, {number(high, 3)}]"
        return f"{number(value, 3)} {ends}".strip()
    places = 2 - _digits_before(high - low)

    def said(one: float) -> str:
        return number(one, max(3, min(_digits_before(one) + places, 9)))

    return f"{said(value)} [{said(low)}, {said(high)}]"


def _digits_before(value: float) -> int:
    """Return the place of the first digit before the point; 0 and less behind it."""
    return math.floor(math.log10(abs(value))) + 1 if value and math.isfinite(value) else 1


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


_SIGMA = (
    "wd", "wd_se", "wd_median", "wd_largest", "null_floor", "null_floor_high", "weighted_wd",
    "output_wd", "output_distance",
)  # fmt: skip
_SHARES = (
    "sparsity", "realised_sparsity", "lowest", "highest", "share", "relative_error",
    "weighted_wd_change", "top1_agreement", "accuracy",
)  # fmt: skip
UNITS = {
    **dict.fromkeys(_SIGMA, r"$\sigma$"), **dict.fromkeys(_SHARES, r"\%"), "seconds": "s",
    "kl": "nats per token",
}  # fmt: skip
"""Units by column; what is in percent is held as a share."""

_SPECIAL = str.maketrans({
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
})  # fmt: skip


def latex(text: object) -> str:
    """Return a text as LaTeX that shows it as it is; what cannot be seen is spelled out."""
    return visible(str(text)).translate(_SPECIAL)


def latex_table(frame: pd.DataFrame, caption: str = "", label: str = "") -> str:
    r"""Return a frame as a LaTeX table.

    Floats have four significant digits, missing values are a dash. The ends of an interval, columns
    ``x_low`` and ``x_high``, stand in brackets behind ``x`` (or ``x_…``); ``low`` and ``high``
    behind the column to their left.

    Parameters
    ----------
    frame
        Any frame; its index is not written.
    caption, label
        A plain text, escaped here, and a name for ``\ref``; neither is written where it is empty.
    """
    ends = _ends(list(frame.columns))
    hidden = {name for pair in ends.values() for name in pair}
    shown = [name for name in frame.columns if name not in hidden]
    sides = "".join("r" if pd.api.types.is_numeric_dtype(frame[n].dtype) else "l" for n in shown)
    rows = [
        " & ".join(_latex_cell(name, row, ends.get(name, ())) for name in shown) + r" \\"
        for row in frame.to_dict("records")
    ]
    lines = [
        r"\begin{table}", r"\centering",
        *([rf"\caption{{{latex(caption)}}}"] if caption else []),
        *([rf"\label{{{label}}}"] if label else []),
        rf"\begin{{tabular}}{{{sides}}}", r"\toprule",
        " & ".join(map(_head, shown)) + r" \\", r"\midrule", *rows, r"\bottomrule",
        r"\end{tabular}", r"\end{table}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _ends(columns: list[str]) -> dict[str, tuple[str, str]]:
    """Return the columns with the ends of an interval, by the column that it belongs to."""
    found = {}
    for place, name in enumerate(columns):
        for stem in (name, name.rpartition("_")[0]):
            if stem and {f"{stem}_low", f"{stem}_high"} <= {*columns} and name not in found:
                found[name] = (f"{stem}_low", f"{stem}_high")
        if columns[place + 1 : place + 3] == ["low", "high"]:
            found[name] = ("low", "high")
    return {name: pair for name, pair in found.items() if name not in pair}


def _head(name: str) -> str:
    text = latex(name.replace("_", " "))
    return f"{text} ({UNITS[name]})" if name in UNITS else text


def _latex_cell(name: str, row: dict[Any, Any], ends: tuple[str, ...]) -> str:
    times = 100.0 if UNITS.get(name) == r"\%" else 1.0
    told = _value(row[name], times)
    if any(pd.notna(row[end]) for end in ends):
        told += f" [{', '.join(_value(row[end], times) for end in ends)}]"
    return told


def _value(value: Any, times: float) -> str:
    if isinstance(value, float) and value == value:
        told = number(value * times).replace("−", "-").replace("∞", r"\infty")
        digits, _, power = told.partition("e")
        exponent = rf" \times 10^{{{int(power)}}}" if power else ""
        return f"${digits}{exponent}$" if exponent or not digits[0].isdigit() else digits
    return "--" if pd.api.types.is_scalar(value) and pd.isna(value) else latex(value)
