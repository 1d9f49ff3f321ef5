"""The look of the figures: colours by meaning, text sizes, legends, ticks that can be read.

Nothing global is changed: `paper_style` restores what was when it ends, and `PaperFigure`, which
pyplot never sees, lives and dies like any Python object. Text from tokenizers
is shown without control characters and missing glyphs.
"""

import io
import re
import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate, takewhile
from types import MappingProxyType
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import Locator, LogLocator, MaxNLocator
from numpy.typing import NDArray

from entangle.checks import choice
from entangle.errors import is_unseen, spelled
from entangle.plotting.options import (
    Column,
    PlotOptions,
    arranged,
    color_of,
    title_or,
    words_or,
)

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

    What `entangle.errors.visible` spells out, and characters that none of `text_families` has,
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


Role = Literal["output", "top", "typical"]
Side = Literal["left", "right"]
Skyline = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Points (x, y) in data units that a legend must not cover."""

COLORBLIND = (
    "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494",
    "#ece133", "#56b4e9",
)  # fmt: skip
"""Colours that colour-blind readers tell apart (those that seaborn calls "colorblind")."""
NOMINAL = (*(COLORBLIND[i] for i in (3, 0, 2, 4, 1, 9, 5)), "#332288", "#882255")
"""For things without an order, the clearest first: none is too pale for thin lines."""

PALETTE: Mapping[str, str] = MappingProxyType(
    {
        "output": COLORBLIND[0],  # the outputs of a neuron
        "top": COLORBLIND[3],  # the neurons with the largest WD
        "typical": COLORBLIND[7],  # typical, random and all other neurons
        "floor": COLORBLIND[2],  # what truly Gaussian outputs would score
        "gaussian": "#262626",  # the fitted Gaussian
    }
)
"""Colours by meaning (hexadecimal)."""

KIND_PALETTE: Mapping[str, str] = MappingProxyType(
    {"dense": COLORBLIND[0], "sparse": COLORBLIND[1]}
)
"""Colours of a neuron's dense outputs and of those of its sparse form."""

METHOD_PALETTE: Mapping[str, str] = MappingProxyType(
    {
        "magnitude": COLORBLIND[7],
        "wanda": COLORBLIND[1],
        "sparsegpt": COLORBLIND[0],
        "expansion": COLORBLIND[3],
        "expansion-random": COLORBLIND[4],
    }
)
"""Colours of the methods that ``entangle compare`` knows."""

SPARE_COLORS = tuple(COLORBLIND[i] for i in (2, 9, 5, 8))
"""For methods without a colour of their own, in turn."""

KNOWN_NAMES: Mapping[str, str] = MappingProxyType(
    {"demo": "SmolLM2-135M-Instruct", "wikitext2": "WikiText-2", "c4": "C4", "blimp": "BLiMP"}
)
"""What readers call models and data sets that have a short name at the shell."""
KNOWN_TEXTS: Mapping[str, str] = MappingProxyType({**KNOWN_NAMES, "demo": "98 Wikipedia articles"})
"""Likewise, of texts."""

COLUMN_INCHES: Mapping[str, float] = MappingProxyType({"single": 3.3, "double": 6.9})
"""Widths in inches of a figure over one and over two columns of a paper."""

_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0}

CHARACTERS_PER_INCH = 19.0
"""Of text at 7 points, on average and with some to spare."""

_SIZES = {
    "font.size": 7.0,
    "axes.labelsize": 7.0,
    "axes.titlesize": 7.0,
    "figure.titlesize": 7.5,
    "figure.labelsize": 7.0,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.title_fontsize": 6.5,
    "axes.linewidth": 0.6,
    "axes.labelpad": 2.5,
    "axes.titlepad": 4.0,
    "lines.linewidth": 1.1,
    "patch.linewidth": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.pad": 2.0,
    "ytick.major.pad": 2.0,
}


@contextmanager
def paper_style(*, column: Column = "single") -> Iterator[None]:
    """Draw in the style of a paper's figure inside the ``with`` block.

    Parameters
    ----------
    column
        ``"single"`` (3.3 inches) or ``"double"`` (6.9 inches): the width of new figures.

    Raises
    ------
    InvalidInput
        ``column`` is another word.
    """
    width = column_width(column)
    settings: dict[Any, object] = {
        **dict.fromkeys(("axes.labelcolor", "text.color", "axes.edgecolor"), ".15"),
        **dict.fromkeys(("xtick.color", "ytick.color"), ".15"),
        "axes.axisbelow": True,
        "lines.solid_capstyle": "round",
        "patch.edgecolor": "w",
        "patch.force_edgecolor": True,
        **_SIZES,
        "font.family": text_families(),
        "mathtext.fontset": "dejavusans",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "legend.edgecolor": "none",
        "legend.framealpha": 0.85,  # readable where the band of the floor passes behind
        "legend.fancybox": False,
        "legend.handlelength": 1.2,
        "legend.labelspacing": 0.3,
        "legend.borderaxespad": 0.2,
        "legend.borderpad": 0.2,
        "figure.dpi": 150.0,
        "figure.figsize": (width, 2.4 if column == "single" else 2.8),
        "pdf.fonttype": 42,
    }
    with mpl.rc_context(settings):
        yield


def ink(name: str, usual: str | None = None, *parts: str) -> str:
    """Return a colour as it is asked for (`PlotOptions`), else ``usual``, else `PALETTE`'s.

    Parameters
    ----------
    name
        A meaning, such as ``"top"``, or a part of the figure.
    usual
        Hexadecimal.
    parts
        Names of the part, which go before the meaning.
    """
    return color_of([*parts, name], PALETTE[name] if usual is None else usual)


def called(name: str, known: Mapping[str, str] = KNOWN_NAMES) -> str:
    """Return ``name``, or ``"demo, 8 windows"``, with its first word as readers know it."""
    first, comma, rest = name.partition(",")
    return known.get(first, first) + comma + rest


def column_width(column: str) -> float:
    """Return the width in inches of ``column``, ``"single"`` or ``"double"``."""
    return COLUMN_INCHES[choice("column", column, COLUMN_INCHES)]


class PaperFigure(Figure):
    """A matplotlib figure that pyplot does not keep alive and that Jupyter shows by itself."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def settle_ticks(axes: Sequence[Axes]) -> None:
    """Make the first tick of every axis, so that later ones copy the style in force here.

    matplotlib makes ticks, and room for their labels, when the figure is drawn, with the settings
    of that moment.
    """
    for ax in axes:
        ax.tick_params(axis="x", labelsize=mpl.rcParams["xtick.labelsize"])
        ax.tick_params(axis="y", labelsize=mpl.rcParams["ytick.labelsize"])
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_ticks(1)


def axes_or_new(ax: Axes | None, options: PlotOptions | None = None) -> Axes:
    """Return ``ax``, or where it is None the axes of a new `PaperFigure` of the size asked for."""
    if ax is not None:
        return ax
    figure, size = PaperFigure(layout="constrained"), options or {}
    width, height = size.get("width"), size.get("height")
    figure.set_size_inches(width or figure.get_figwidth(), height or figure.get_figheight())
    made = figure.subplots()
    settle_ticks([made])
    return made


_WORDS = "words"


def text_handle() -> Line2D:
    """Return an invisible legend handle, for an entry that is only text."""
    return Line2D([], [], linestyle="none", marker="none", gid=_WORDS)


def wrap(ax: Axes, text: str, *, size: float) -> str:
    """Break every line of ``text`` where it would be wider than ``ax`` at ``size`` points.

    What cannot be seen, and what no font has, is spelled out (`entangle.plotting.style.printable`).
    """
    characters = max(12, int(_inches(ax)[0] * CHARACTERS_PER_INCH * 7.0 / size))
    return "\n".join(_fill(line, characters) for line in text.split("\n"))


def _fill(line: str, characters: int) -> str:
    """Break a line into some lines of so many characters, and cut what is beyond."""
    text = printable(line)
    return textwrap.fill(text, characters, break_on_hyphens=False, max_lines=4, placeholder="…")


def add_title(ax: Axes, text: str) -> None:
    """Write the title of a panel, broken to its width and taken literally (no TeX)."""
    size = _points("axes.titlesize")
    ax.set_title(wrap(ax, title_or(text), size=size), parse_math=False)


def add_legend(
    ax: Axes, entries: Sequence[tuple[Artist, str]], *, side: Side, skyline: Skyline
) -> None:
    """Write a legend into an upper corner and raise the y limit so that it covers no data."""
    size = _points("legend.fontsize")
    keyed = [entry for entry in entries if entry[0].get_gid() != _WORDS]
    words = words_or([label for handle, label in entries if handle.get_gid() == _WORDS])
    entries = [*arranged(keyed, _texts), *((text_handle(), w) for w in words)]
    if not entries:
        return
    labels = [wrap(ax, label, size=1.2 * size) for _, label in entries]  # leaves the keys' place
    place: Literal["upper left", "upper right"] = "upper left" if side == "left" else "upper right"
    take_literally(ax.legend([handle for handle, _ in entries], labels, loc=place))
    _keep_clear(ax, "\n".join(labels), side=side, skyline=skyline)


def _texts(entry: tuple[Artist, str]) -> tuple[str, str]:
    return entry[1], str(entry[0].get_label())


def join_clauses(clauses: Sequence[str], *, inches: float, size: float = 7.0) -> str:
    """Join clauses by semicolons, with as many on a line as fit at ``size`` points, as `wrap`.

    One that ends with a line break has a line of its own.
    """
    characters = max(12, int(inches * CHARACTERS_PER_INCH * 7.0 / size))
    lines: list[str] = []
    for clause in clauses:
        fits = bool(lines) and len(lines[-1]) + len(clause) + 2 <= characters
        if fits and not lines[-1].endswith("\n"):
            lines[-1] += f"; {clause}"
        else:
            lines.append(clause)
    return "\n".join(_fill(line.rstrip("\n"), characters) for line in lines)


def legend_above(
    ax: Axes, entries: Sequence[tuple[Artist, str]], *, clauses: Sequence[str]
) -> Legend:
    """Write a legend and text on top of ``ax``, in as many columns as fit its width."""
    size, entries = _points("legend.fontsize"), arranged(entries, _texts)
    labels = [wrap(ax, label, size=1.2 * size) for _, label in entries]
    legend = ax.legend(
        [handle for handle, _ in entries],
        labels,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=fitting_columns(labels, inches=_inches(ax)[0] * 7.0 / size),
        columnspacing=1.2,
        handlelength=1.2,
        title=join_clauses(clauses, inches=_inches(ax)[0], size=size),
        alignment="left",
    )
    take_literally(legend)
    return legend


def take_literally(legend: Legend) -> None:
    """Show a dollar in a legend as it is: names come from models and files (no TeX)."""
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_parse_math(False)


def make_room(legend: Legend) -> None:
    """Make the figure taller by the height of a legend that lies outside its axes."""
    figure = legend.get_figure(root=True)
    assert figure is not None  # noqa: S101 - it was made by a figure or an axes
    height = legend.get_window_extent().height / figure.dpi
    figure.set_figheight(figure.get_figheight() + height)


def note_above(ax: Axes, clauses: Sequence[str]) -> None:
    """Write text on top of ``ax``, outside it."""
    size = _points("legend.fontsize")
    text = join_clauses(clauses, inches=_inches(ax)[0], size=size)
    place = ax.transAxes
    ax.text(0.0, 1.02, text, transform=place, va="bottom", fontsize=size, parse_math=False)


def explain_above(
    ax: Axes,
    entries: Sequence[tuple[Artist, str]],
    clauses: Sequence[str] = (),
    *,
    title: str = "",
    legend: bool,
    own: bool,
) -> None:
    """Write a legend, or only title and clauses, on ``ax``; ``own`` figures get room for it."""
    asked = title_or(title)
    asked += "\n" if asked and asked != title else ""
    clauses = [said for said in (asked, *words_or(clauses)) if said]
    if not legend:
        if clauses:
            note_above(ax, clauses)
        return
    key = legend_above(ax, entries, clauses=clauses)
    if own:
        make_room(key)


def shade(color: str, share: float) -> str:
    """Mix a colour with white; a share of 1 is the colour itself."""
    red, green, blue = (1.0 - share * (1.0 - part) for part in to_rgb(color))
    return to_hex((red, green, blue))


def add_note(ax: Axes, lines: Sequence[str], *, side: Side, skyline: Skyline) -> None:
    """Write lines of text into an upper corner, clear of the data as `add_legend`."""
    size = _points("legend.fontsize")
    text = wrap(ax, "\n".join(words_or(lines)), size=size)
    if not text:
        return
    x = 0.02 if side == "left" else 0.98
    ax.text(
        x,
        0.99,
        text,
        transform=ax.transAxes,
        ha=side,
        va="top",
        fontsize=size,
        bbox=_PAPER,
        parse_math=False,
    )
    _keep_clear(ax, text, side=side, skyline=skyline)


def _keep_clear(ax: Axes, text: str, *, side: Side, skyline: Skyline) -> None:
    """Raise the y limit until no data lies under ``text`` with its legend keys."""
    size, lines = _points("legend.fontsize"), text.split("\n")
    width, height = _inches(ax)
    share_y = min((1.4 * len(lines) + 1.0) * size / 72.0 / (0.85 * height), 0.6)
    share_x = max(map(len, lines)) * size / 7.0 / CHARACTERS_PER_INCH / width + 0.15
    left, right = ax.get_xlim()
    edge, toward = (left, right) if side == "left" else (right, left)
    x, y = skyline
    under = np.abs(x - edge) <= share_x * abs(toward - edge)
    top = max(float(y.max()) * 1.05, float(y[under].max(initial=0.0)) / (1.0 - share_y))
    if top > ax.get_ylim()[0]:  # something is drawn
        ax.set_ylim(top=top)


def _points(setting: Literal["axes.titlesize", "legend.fontsize"]) -> float:
    return float(FontProperties(size=mpl.rcParams[setting]).get_size_in_points())


def _inches(ax: Axes) -> tuple[float, float]:
    figure = ax.get_figure(root=True)
    assert figure is not None  # noqa: S101 - an axes that draws belongs to a figure
    return ax.bbox.width / figure.dpi, ax.bbox.height / figure.dpi


def fitting_columns(labels: Sequence[str], *, inches: float) -> int:
    """Return the largest number of legend columns, filled from the left, that fit the width."""
    for n in range(len(labels), 1, -1):
        columns = np.array_split(list(map(len, labels)), n)
        if sum(column.max() / CHARACTERS_PER_INCH + 0.35 for column in columns) <= inches:
            return n
    return 1


_EXPONENT = re.compile(r"e\+?(-?)0*")


def plain_number(value: float, _position: int | None = None) -> str:
    """Return a number as ``"0.1"``, ``"10,000"`` or, from a million and below 1e-4, ``"2e6"``."""
    return _EXPONENT.sub(r"e\1", f"{value:,g}").replace("-", "−")


def log_locator(span: float) -> Locator:
    """Return what places the ticks of a logarithmic axis whose ends have the ratio ``span``."""
    if span < 4.0:
        return MaxNLocator(5, steps=(1, 2, 5, 10))
    if span < 50.0:
        return LogLocator(subs=(1.0, 2.0, 5.0))
    return LogLocator(subs=(1.0, 3.0) if span < 1000.0 else (1.0,))
