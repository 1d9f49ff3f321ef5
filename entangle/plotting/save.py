"""A figure and its files: the numbers behind it, signature, captions.

Every plotting function registers the numbers behind each artist it adds. The numbers live exactly
as long as the artist is part of the figure: clearing an axes or removing a line removes them.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import matplotlib as mpl
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from entangle.checks import choices, named, path_of
from entangle.errors import EntangleError, InvalidInput, Unavailable
from entangle.runs.provenance import claimed, discard, scratch

FORMATS = ("pdf", "png")
_CAPTIONS: WeakKeyDictionary[Figure, str] = WeakKeyDictionary()
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


def is_empty(figure: Figure) -> bool:
    """Return whether nothing in a figure was drawn by `entangle.plotting`."""
    return not any(artist in _DRAWN for ax in figure.axes for artist in ax.get_children())


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
    as TeX's ``\caption`` (``.tex``), unless it was drawn with ``caption=False``. All files are
    written under temporary names first and then renamed, the CSV last: where it is there, the
    others are its own.

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
    captions = ("tex", "txt") if caption_of(figure) else ()
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
            for ending in ("tex", "txt") if _CAPTIONS.get(figure) == "" else ():
                stem.with_name(f"{stem.name}.{ending}").unlink(missing_ok=True)
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


def set_caption(figure: Figure, caption: str) -> None:
    """Keep a figure's caption; an empty one stands for none."""
    _CAPTIONS[figure] = caption


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
_POINTS, SIGNATURE_INCHES = 6.0, 0.11
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
    height = before + SIGNATURE_INCHES
    figure.set_figheight(height)
    below = figure.get_supxlabel()
    if below:  # sits at the lower edge: an empty line below it makes the room
        next(text for text in figure.texts if text.get_text() == below).set_text(f"{below}\n")
    else:
        engine = figure.get_layout_engine()
        assert isinstance(engine, ConstrainedLayoutEngine)  # noqa: S101 - all figures have one
        left, low, wide, high = engine.get().get("rect", (0.0, 0.0, 1.0, 1.0))
        rect = left, (low * before + SIGNATURE_INCHES) / height, wide, high * before / height
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
