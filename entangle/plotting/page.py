"""From what is drawn to a panel or figure as it was asked for: grids, letters, legends, words."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from string import ascii_lowercase
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

from entangle.errors import InvalidInput
from entangle.plotting.options import (
    Column,
    FigureOptions,
    PlotOptions,
    arranged,
    title_or,
    wishes,
    worded_text,
    words_or,
)
from entangle.plotting.save import SIGNATURE_INCHES, is_empty, set_caption, sign
from entangle.plotting.style import (
    CHARACTERS_PER_INCH,
    COLUMN_INCHES,
    PaperFigure,
    add_title,
    column_width,
    fitting_columns,
    join_clauses,
    make_room,
    paper_style,
    printable,
    settle_ticks,
    take_literally,
    text_handle,
)

P = ParamSpec("P")
_PANELS_ACROSS = {"single": 2, "double": 3}
_PANEL_INCHES = {"single": 1.35, "double": 1.6}
_LINE_INCHES, _LETTER = 0.13, 8.0
OTHERS = " others"
"""Ending of what a legend names last."""


class Paper:
    """A figure that is being drawn, as `FigureOptions` want it."""

    def __init__(self, options: FigureOptions, column: Column) -> None:
        if strange := options.keys() - FigureOptions.__annotations__.keys():
            raise TypeError(f"unexpected keyword argument {min(strange)!r}")
        self.options = options
        width = options.get("width")
        self.column: Column = options.get("column", column)
        self.inches = column_width(self.column) if width is None else float(width)
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
        _relabel(figure, options.get("labels"))
        if key is not None:
            make_room(key)
        if len(self.axes) > 1:
            letter_panels(self.axes)
        own = options.get("caption")
        own = _sentences(caption) if own is None or own is True else own or ""
        set_caption(figure, own)
        digest, height = options.get("digest"), options.get("height")
        if height is not None:
            figure.set_figheight(height - (0.0 if digest is None else SIGNATURE_INCHES))
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
    """Draw a figure in `paper_style`; ``column`` is its usual width."""
    with paper_style(column=options.get("column", column)):
        yield Paper(options, column)


def figure_level(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Let a ``figure_*`` draw as its `FigureOptions` want it."""

    @wraps(draw)
    def figure(*args: P.args, **kwargs: P.kwargs) -> Figure:
        if "ax" in kwargs:
            raise InvalidInput(
                f"{draw.__name__} makes a figure of its own and takes no `ax`; draw into one with "
                "the plot_* functions of entangle.plotting."
            )
        with wishes(_options(kwargs, FigureOptions)) as asked:
            made = draw(*args, **kwargs)
            if asked.subset and is_empty(made):
                raise asked.unknown("subset", asked.subset[0])
            return made

    return figure


def axes_level(draw: Callable[P, Axes]) -> Callable[P, Axes]:
    """Let a ``plot_*`` draw as its `PlotOptions` want it.

    With an ``ax``, the options are tried on axes of their own first: where they are refused, the
    given ones stay as they were.
    """

    @wraps(draw)
    def plot(*args: P.args, **kwargs: P.kwargs) -> Axes:
        options, ax = _options(kwargs, PlotOptions), kwargs.get("ax")
        if not options:
            return draw(*args, **kwargs)
        for name in options.keys() - {"width", "height"}:
            kwargs.pop(name)
        if isinstance(ax, Axes):
            if options.get("width") is not None or options.get("height") is not None:
                raise InvalidInput(
                    "`width` and `height` must be None beside `ax`, which lies in a figure that has"
                    f" its size; got {options.get('width')} and {options.get('height')}; set that "
                    "of the figure."
                )
            kwargs["ax"] = None
            _asked(partial(draw, *args, **kwargs), options)
            kwargs["ax"] = ax
        return _asked(partial(draw, *args, **kwargs), options)

    return plot


def _options(given: Mapping[str, object], known: type) -> Any:
    return {name: given[name] for name in known.__annotations__ if name in given}


def _asked(draw: Callable[[], Axes], options: PlotOptions) -> Axes:
    """Draw a panel inside its wishes, and write what the function left to be written."""
    with wishes(options, panel=True) as asked:
        ax = draw()
        said = [] if asked.captioned else words_or([])
        if said or not (asked.titled or asked.title is None):
            own = ax.get_title(loc="left") or ax.get_title()
            add_title(ax, "\n".join(filter(None, (title_or(own.replace("\n", " ")), *said))))
        _relabel(ax, options.get("labels"))
        height = options.get("height")
        if height is not None:
            ax.figure.get_figure(root=True).set_figheight(height)
        return ax


def _sentences(clauses: Iterable[str | None]) -> str:
    """Join clauses, each a sentence; what begins with a symbol or a layer's name keeps its case."""
    said = [clause.strip().rstrip(".").replace("\n", " ") for clause in clauses if clause]
    words = [one.split()[0] for one in said]
    begun = [
        one if "." in word or len(word) < 3 else one[0].upper() + one[1:]
        for one, word in zip(said, words, strict=True)
    ]
    return " ".join(f"{one}." for one in begun)


def _relabel(root: Figure | Axes, labels: Mapping[str, str] | None) -> None:
    """Write other words: for a whole text, or for a part's name with something behind it."""
    ticks = {id(text) for text in _tick_labels(root)} if labels else {}
    texts = [text for text in root.findobj(Text) if id(text) not in ticks] if labels else []
    for text in texts:
        assert isinstance(text, Text)  # noqa: S101 - findobj returns what is asked for
        worded_text(text)


def _tick_labels(root: Figure | Axes) -> Iterator[Text]:
    for axis in root.findobj(Axis):
        assert isinstance(axis, Axis)  # noqa: S101 - likewise
        for tick in (*axis.majorTicks, *axis.minorTicks):
            yield from (tick.label1, tick.label2)
        yield axis.offsetText


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
    named = arranged(sorted(entries, key=lambda n: n.endswith(OTHERS)), lambda name: [name])
    entries = {name: entries[name] for name in named}
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
