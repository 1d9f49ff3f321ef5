"""A figure from its grid of axes to its files: options, letters, legend, signature, captions.

Every plotting function registers the numbers behind each artist it adds. The numbers live exactly
as long as the artist is part of the figure: clearing an axes or removing a line removes them.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from string import ascii_lowercase
from typing import Any, TypedDict
from weakref import WeakKeyDictionary

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend import Legend
from matplotlib.text import Text

from entangle.checks import choices, finite, named, path_of
from entangle.errors import EntangleError, InvalidInput, Unavailable, unknown_name
from entangle.plotting.style import (
    CHARACTERS_PER_INCH,
    COLUMN_INCHES,
    Column,
    PaperFigure,
    column_width,
    fitting_columns,
    inked,
    join_clauses,
    make_room,
    paper_style,
    printable,
    settle_ticks,
    take_literally,
    text_handle,
)
from entangle.runs.provenance import claimed, discard, scratch


class FigureOptions(TypedDict, total=False):
    """What every ``figure_*`` takes by keyword, besides its own arguments."""

    column: Column
    """Width: ``"single"`` (3.3 inches) or ``"double"`` (6.9)."""
    width: float | None
    """Width in inches, instead of a column's."""
    height: float | None
    """Height in inches; chosen from what is drawn if None."""
    title: str | None
    """Above all panels, instead of the figure's own; an empty one leaves it out."""
    caption: str | None
    """For the files beside the figure, instead of its own; see `save_figure`."""
    legend: bool
    """False leaves the legend out."""
    palette: Mapping[str, str] | None
    """Colours by meaning or series; see `entangle.plotting.style.inked`."""
    labels: Mapping[str, str] | None
    """Other words by those that stand in the figure: labels of axes, entries of the legend,
    titles."""
    digest: str | None
    """Of the run, for the small print; see `sign`."""
    run_seed: int | None
    """Of the run, behind the digest."""


_PANELS_ACROSS = {"single": 2, "double": 3}
_PANEL_INCHES = {"single": 1.35, "double": 1.6}
_LINE_INCHES, _LETTER = 0.13, 8.0
OTHERS = " others"
"""Ending of what a legend names last."""
_CAPTIONS: WeakKeyDictionary[Figure, str] = WeakKeyDictionary()


class Paper:
    """A figure that is being drawn, as `FigureOptions` want it."""

    def __init__(self, options: FigureOptions, column: Column) -> None:
        if strange := options.keys() - FigureOptions.__annotations__.keys():
            raise TypeError(f"unexpected keyword argument {min(strange)!r}")
        self.options = options
        width = options.get("width")
        self.column: Column = options.get("column", column)
        self.inches = (
            column_width(self.column) if width is None else finite("width", width, above=0)
        )
        if width is not None:
            self.column = "single" if self.inches < 0.7 * COLUMN_INCHES["double"] else "double"
        self.figure: Figure = PaperFigure(figsize=(self.inches, 2.4), layout="constrained")
        self.axes: list[Axes] = []
        self.across = 1

    def grid(
        self,
        n: int,
        *,
        across: int | None = None,
        panel_inches: float | None = None,
        longest_title: int = 0,
    ) -> list[Axes]:
        """Fill the figure with ``n`` panels, tall enough for titles of so many characters.

        ``across`` is the number of panels in a row; chosen from the width if None.
        """
        self.figure, self.axes = panel_grid(
            n, column=self.column, inches=self.inches, across=across, longest_title=longest_title
        )
        self.across = _across(n, self.column, across)
        if panel_inches is not None:
            self.figure.set_figheight(0.3 + panel_inches * -(-n // self.across))
        return self.axes

    def finish(
        self,
        caption: Iterable[str | None],
        *,
        title: str = "",
        shared: bool = True,
        extra: str = "",
    ) -> Figure:
        """Write legend, title, letters, other labels and signature; keep the caption.

        Parameters
        ----------
        caption
            Sentences or clauses; empty ones are left out.
        title
            The figure's own, short.
        shared
            Write one legend of all panels above them.
        extra
            A closing entry of it, without a key.
        """
        figure, options = self.figure, self.options
        wanted = options.get("title")
        title = title if wanted is None else wanted
        key = shared_legend(figure, self.axes, inches=self.inches, extra=extra) if shared else None
        if not options.get("legend", True):
            key = None
            for legend in (*figure.legends, *(ax.get_legend() for ax in figure.axes)):
                if legend is not None:
                    legend.remove()
        self._write_title(title, key)
        _relabel(figure, options.get("labels") or {})
        if key is not None:
            make_room(key)
        if len(self.axes) > 1:
            letter_panels(self.axes)
        own = options.get("caption")
        _CAPTIONS[figure] = _sentences(caption) if own is None else own
        digest, height = options.get("digest"), options.get("height")
        if height is not None:
            height = finite("height", height, above=0) - (0.0 if digest is None else _INCHES)
            figure.set_figheight(max(height, 0.5))
        return sign(figure, digest, options.get("run_seed"))

    def _write_title(self, title: str, key: Legend | None) -> None:
        if not title:
            return
        text = join_clauses(title.split("; "), inches=self.inches)
        if key is not None:  # a title of the figure would lie on the legend
            key.set_title(text)
            key.get_title().set(multialignment="center", parse_math=False)
            return
        self.figure.suptitle(text, fontsize=7.5, parse_math=False)
        self.figure.set_figheight(
            self.figure.get_figheight() + _LINE_INCHES * (1 + text.count("\n"))
        )


@contextmanager
def paper(options: FigureOptions, *, column: Column = "double") -> Iterator[Paper]:
    """Draw a figure in `paper_style`, with the options' palette; ``column`` is its usual width."""
    with paper_style(column=options.get("column", column)), inked(options.get("palette")):
        yield Paper(options, column)


def _sentences(clauses: Iterable[str | None]) -> str:
    """Join clauses, each a sentence; what begins with a symbol or a layer's name keeps its case."""
    said = [clause.strip().rstrip(".").replace("\n", " ") for clause in clauses if clause]
    words = [one.split()[0] for one in said]
    begun = [
        one if "." in word or len(word) < 3 else one[0].upper() + one[1:]
        for one, word in zip(said, words, strict=True)
    ]
    return " ".join(f"{one}." for one in begun)


def _relabel(figure: Figure, labels: Mapping[str, str]) -> None:
    texts: dict[str, list[Text]] = {}
    for text in figure.findobj(Text) if labels else ():
        assert isinstance(text, Text)  # noqa: S101 - findobj returns what is asked for
        if text.get_text().strip():
            said = text.get_text().strip().replace("\n", " ").replace("\u00a0", " ")
            texts.setdefault(said, []).append(text)
    for old, new in labels.items():
        if old not in texts:
            raise unknown_name("labels", old, sorted(texts), "Rename a text of the figure.")
        for text in texts[old]:
            text.set_text(new)


def letter_panels(axes: Sequence[Axes]) -> None:
    """Write a bold letter before the first line of every panel's title: a, b and so on."""
    pad = mpl.rcParams["axes.titlepad"]
    size = mpl.rcParams["axes.titlesize"]
    for number, ax in enumerate(axes):
        more, place = divmod(number, len(ascii_lowercase))
        letter = ("" if more == 0 else ascii_lowercase[more - 1]) + ascii_lowercase[place]
        lines = (ax.get_title(loc="left") or ax.get_title()).count("\n")
        above = pad + 1.2 * size * lines if ax.axison else -size
        ax.annotate(
            letter, (0.0, 1.0), xycoords="axes fraction", textcoords="offset points",
            xytext=(-4.0, above), ha="right", va="baseline", weight="bold",
            fontsize=_LETTER, annotation_clip=False, gid="letter",
        )  # fmt: skip


def _across(n: int, column: Column, across: int | None = None) -> int:
    if across is not None:
        return across
    down = -(-n // _PANELS_ACROSS[column])
    return -(-n // down)  # as even as possible: 4 panels make 2 x 2


def panel_grid(
    n: int,
    *,
    column: Column,
    inches: float | None = None,
    longest_title: int = 0,
    across: int | None = None,
) -> tuple[Figure, list[Axes]]:
    """Make a figure of ``n`` panels; see `Paper.grid`, whose ``inches`` is the width."""
    across = _across(n, column, across)
    down = -(-n // across)
    inches = column_width(column) if inches is None else inches
    title_lines = -(-longest_title // int(0.75 * inches / across * CHARACTERS_PER_INCH))
    height = 2.4 if n == 1 else 0.6 + down * (_PANEL_INCHES[column] + 0.12 * title_lines)
    figure = PaperFigure(figsize=(inches, height), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for unused in axes[n:]:
        unused.remove()
    settle_ticks(axes[:n])
    return figure, axes[:n]


def share_axes(
    figure: Figure, axes: Sequence[Axes], *, across: int, most_unequal: float = np.inf
) -> None:
    """Give all panels the widest limits; tick labels at the outer ones, axis labels once.

    Where the right ends of the x axes differ by a larger factor than ``most_unequal``, every panel
    keeps its own x axis.
    """
    if len(axes) == 1:
        return
    ends = [ax.get_xlim()[1] for ax in axes]
    one_x = max(ends) <= most_unequal * min(ends)
    xlim = _widest([ax.get_xlim() for ax in axes])
    ylim = _widest([ax.get_ylim() for ax in axes])
    figure.supxlabel(axes[0].get_xlabel())
    figure.supylabel(axes[0].get_ylabel())
    for number, ax in enumerate(axes):
        ax.set(xlim=xlim if one_x else ax.get_xlim(), ylim=ylim, xlabel="", ylabel="")
        lowest = not one_x or number + across >= len(axes)
        ax.tick_params(labelleft=number % across == 0, labelbottom=lowest)


def _widest(limits: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return min(low for low, _ in limits), max(high for _, high in limits)


def shared_legend(
    figure: Figure, axes: Sequence[Axes], *, inches: float, extra: str = ""
) -> Legend | None:
    """Write one legend above all panels: every label once, then ``extra`` without a key."""
    entries = _labelled(axes)
    entries = {name: entries[name] for name in sorted(entries, key=lambda n: n.endswith(OTHERS))}
    if extra:
        entries[extra] = text_handle()
    if not entries:
        return None
    key = figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside upper center",
        ncols=fitting_columns(list(entries), inches=inches),
        columnspacing=1.2,
    )
    take_literally(key)
    return key


def _labelled(axes: Sequence[Axes]) -> dict[str, Artist]:
    """Return an artist for every label of the panels, in which every character is visible."""
    return {
        "\n".join(map(printable, label.split("\n"))): artist
        for ax in axes
        for artist, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }


FORMATS = ("pdf", "png")
_DRAWN: WeakKeyDictionary[Artist, pd.DataFrame] = WeakKeyDictionary()


def record(artist: Artist, *, panel: str, series: str, **columns: Any) -> None:
    """Attach to ``artist`` the numbers it shows.

    Parameters
    ----------
    artist
        A member of an axes.
    panel, series
        Where it is, and what it stands for.
    columns
        Scalars or one-dimensional arrays of one length, for example ``x``, ``y`` and ``neuron``.
    """
    arrays = (c for c in columns.values() if hasattr(c, "__len__") and not isinstance(c, str))
    index = range(max(map(len, arrays), default=1))
    _DRAWN[artist] = pd.DataFrame({"panel": panel, "series": series, **columns}, index=index)


def drawn(figure: Figure) -> pd.DataFrame:
    """Return what ``figure`` shows: one row a point, bar or line.

    Parameters
    ----------
    figure
        Any figure whose axes were filled by `entangle.plotting`.

    Returns
    -------
    pandas.DataFrame
        ``panel``, ``series``, ``x``, ``y``, then the columns that only some series have (for
        example ``x_right`` of a histogram's bins, or ``neuron``).

    Raises
    ------
    InvalidInput
        Nothing in the figure was drawn by `entangle.plotting`.
    """
    frames = [_DRAWN[a] for ax in figure.axes for a in ax.get_children() if a in _DRAWN]
    if not frames:
        raise InvalidInput(
            "`figure` must hold something drawn by entangle.plotting; got a figure with "
            f"{len(figure.axes)} axes and no such artist."
        )
    table = pd.concat(frames, ignore_index=True)
    first = ["panel", "series", "x", "y"]
    return table[first + [c for c in table.columns if c not in first]]


def save_figure(
    figure: Figure,
    path_stem: str | os.PathLike[str],
    *,
    formats: str | Iterable[str] = FORMATS,
    force: bool = False,
) -> tuple[Path, ...]:
    r"""Write a figure, its caption and the CSV table of what it shows.

    Text in the PDF stays text (font type 42), and no file holds a date: the same figure gives the
    same bytes. A figure of a ``figure_*`` has its caption beside it, as plain text (``.txt``) and
    as TeX's ``\caption`` (``.tex``). All files are written under temporary names first and then
    renamed, the CSV last: where it is there, the others are its own.

    Parameters
    ----------
    figure
        Drawn by `entangle.plotting`.
    path_stem
        The path without the ending; ``.pdf``, ``.png``, ``.tex``, ``.txt`` and ``.csv`` are added
        to it. Missing folders are made.
    formats
        One or both of ``"pdf"`` and ``"png"``.
    force
        Replace files that exist.

    Returns
    -------
    tuple of pathlib.Path
        The files written, the CSV last.

    Raises
    ------
    InvalidInput
        No or an unknown format; a file exists and ``force`` is False; nothing to save.
    Unavailable
        The disk refuses, or another process is writing this figure.
    """
    captions = ("tex", "txt") if figure in _CAPTIONS else ()
    endings = (*check_formats(formats), *captions, "csv")
    stem = path_of("path_stem", path_stem)
    targets = tuple(stem.with_name(f"{stem.name}.{ending}") for ending in endings)
    existing = [str(path) for path in targets if path.exists()]
    if existing and not force:
        raise InvalidInput(
            f"`path_stem` must name files that do not exist yet; got {', '.join(existing)}; "
            "choose another name or pass force=True (--force)."
        )
    table = drawn(figure)
    try:
        _write(figure, table, stem, targets)
    except EntangleError:
        raise
    except OSError as error:
        raise Unavailable(
            f"the figure cannot be written to {str(stem)!r}: {error.strerror or error}; "
            "choose a folder with free space that you may write to."
        ) from error
    return targets


def check_formats(formats: str | Iterable[str]) -> tuple[str, ...]:
    """Return the formats, each once, or raise `InvalidInput` or `UnknownName`."""
    return tuple(choices("formats", formats, FORMATS, kind="figure format"))


def _write(figure: Figure, table: pd.DataFrame, stem: Path, targets: Sequence[Path]) -> None:
    with claimed(stem):
        temporary = scratch(stem)
        try:
            temporary.mkdir()
            written = [temporary / path.name for path in targets]
            pictures = [path for path in written if path.suffix[1:] in FORMATS]
            with _laid_out(figure):
                for path in pictures:
                    _write_picture(figure, path)
            for path in written[len(pictures) : -1]:
                said = caption_of(figure)
                said = f"\\caption{{{tex(said)}}}" if path.suffix == ".tex" else said
                path.write_text(f"{said}\n", encoding="utf-8")
            table.to_csv(written[-1], index=False, lineterminator="\n")
            targets[-1].unlink(missing_ok=True)  # that of an old figure is not beside a new one
            for source, target in zip(written, targets, strict=True):
                source.replace(target)
        finally:
            discard(temporary, stem)


@contextmanager
def _laid_out(figure: Figure) -> Iterator[None]:
    """Lay a figure out once for all formats; matplotlib does it again for each."""
    engine = figure.get_layout_engine()
    if engine is None:
        yield
        return
    engine.execute(figure)
    figure.set_layout_engine("none")
    try:
        yield
    finally:
        figure.set_layout_engine(engine)


def _write_picture(figure: Figure, path: Path) -> None:
    """Write a figure as its canvas prints it; `Figure.savefig` would draw it twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    before, dpi = figure.canvas, figure.dpi
    figure.dpi = 300
    try:
        if path.suffix == ".png":
            png: Any = FigureCanvasAgg(figure)
            png.print_png(path, metadata={"Software": None})
        else:
            pdf: Any = FigureCanvasPdf(figure)
            with mpl.rc_context({"pdf.fonttype": 42}), _placed_letters():
                pdf.print_pdf(path, metadata={"CreationDate": None})
    finally:
        figure.set_canvas(before)
        figure.dpi = dpi


@contextmanager
def _placed_letters() -> Iterator[None]:
    """Leave out of embedded fonts the tables that place letters: a PDF has them in their places.

    Reading these tables takes half of what embedding a font does.
    """
    from fontTools.subset import Options

    before = Options._drop_tables_default
    Options._drop_tables_default = [*before, "GDEF", "GPOS", "GSUB"]
    try:
        yield
    finally:
        Options._drop_tables_default = before


def caption_of(figure: Figure) -> str:
    """Return the caption of a figure of a ``figure_*``; an empty one of any other figure."""
    return _CAPTIONS.get(figure, "")


_TEX = {
    **{mark: f"\\{mark}" for mark in "{}#$%&_"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\u00a0": "~",
    "σ": r"$\sigma$", "ρ": r"$\rho$", "×": r"$\times$", "÷": r"$\div$", "−": "$-$", "≥": r"$\ge$",
    "∝": r"$\propto$", "±": r"$\pm$", "²": "$^2$", "·": r"$\cdot$", "₁": "$_1$", "|": "$|$",
    "<": "$<$", ">": "$>$", "–": "--", "“": "``", "”": "\'\'", "…": r"\dots{}",
}  # fmt: skip


def tex(text: str) -> str:
    """Return text as TeX shows it, with its special characters escaped."""
    return "".join(_TEX.get(character, character) for character in text)


DIGITS = 12
_POINTS, _INCHES = 6.0, 0.11
_NAME = "entangle-run"


def sign(figure: Figure, digest: str | None, seed: int | None = None) -> Figure:
    """Write the first 12 digits of a run's digest below a figure, which grows by that line.

    Parameters
    ----------
    figure
        A finished figure; returned as well.
    digest
        SHA-256 of the run's manifest, in hexadecimal, whole or its first 12 digits or more; None
        writes nothing.
    seed
        Of the run, written behind its digest.

    Raises
    ------
    InvalidInput
        Another ``digest``.
    """
    if digest is None:
        return figure
    digest = named("digest", digest)
    if not re.fullmatch(rf"[0-9a-f]{{{DIGITS},}}", digest):
        raise InvalidInput(
            f"`digest` must be at least {DIGITS} hexadecimal digits (0-9, a-f); got {digest!r}; "
            "take the SHA-256 of the run's manifest.json."
        )
    before = figure.get_figheight()
    height = before + _INCHES
    figure.set_figheight(height)
    below = figure.get_supxlabel()
    if below:  # sits at the lower edge: an empty line below it makes the room
        next(text for text in figure.texts if text.get_text() == below).set_text(f"{below}\n")
    else:
        engine = figure.get_layout_engine()
        assert isinstance(engine, ConstrainedLayoutEngine)  # noqa: S101 - all figures have one
        left, low, wide, high = engine.get().get("rect", (0.0, 0.0, 1.0, 1.0))
        rect = left, (low * before + _INCHES) / height, wide, high * before / height
        engine.set(rect=rect)
    figure.text(
        0.995, 0.02 / height, f"run {digest[:DIGITS]}",
        ha="right", va="bottom", fontsize=_POINTS, color="0.35", gid=_NAME,
    )  # fmt: skip
    return figure if seed is None else add_seed(figure, seed)


def add_seed(figure: Figure, seed: int) -> Figure:
    """Write the seed of a run behind its digest, where `sign` wrote one; return the figure."""
    for text in figure.texts:
        if text.get_gid() == _NAME:
            text.set_text(f"{text.get_text()}, seed {seed}")
    return figure
