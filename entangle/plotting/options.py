"""What a user may ask of every panel and figure: colours, words, order, parts, size.

A ``plot_*`` or ``figure_*`` runs inside `wishes`, which hold what was asked for. While it draws,
it tells by what names its parts go (`color_of`, `picked`, `asked_for`, `worded`); when it is done,
a name that nothing goes by is refused. No figure keeps a list of its own options.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypedDict, TypeVar

import matplotlib as mpl
from matplotlib.colors import CSS4_COLORS, is_color_like, to_hex
from matplotlib.text import Text

from entangle.checks import finite, named, names, shown
from entangle.errors import InvalidInput, UnknownName, unknown_name

T = TypeVar("T")
_REMEDY = "Name a part of the figure."

Column = Literal["single", "double"]
Palette = Mapping[str, Any] | Sequence[Any] | str
"""Colours by name; or colours in turn; or the name of such, as in ``matplotlib.color_sequences``.
"""
NAMED = ("palette", "labels", "order", "subset")
"""Options that name parts of a figure."""
INCHES = (1.0, 60.0)
"""Least and greatest width and height of a figure."""


class PlotOptions(TypedDict, total=False):
    """What every ``plot_*`` and every ``figure_*`` takes by keyword, besides its own arguments.

    A *part* is what the legend (or an axis, or a panel's title) names: a series, and of a figure
    also a panel. Layers and neurons may be named in full too. What nothing goes by is refused, and
    an ``ax`` that was given stays as it was.
    """

    palette: Palette | None
    """Colours by part or by meaning (keys of `entangle.plotting.PALETTE`); or a list of colours, or
    the name of one such as ``"Dark2"``, which all parts but dark reference lines get in turn."""
    labels: Mapping[str, str] | None
    """Other words by those in the figure: a whole text, or the name of a part in the legend. The
    CSV beside a figure keeps the names of the data."""
    order: str | Iterable[str] | None
    """Parts to come first: in the legend, along an axis, in the rows of panels. Others follow."""
    subset: str | Iterable[str] | None
    """Parts to draw, and no others. Names of panels choose panels; if there are other names, every
    panel shows the parts of these names."""
    width: float | None
    """Of the new figure, in inches, instead of a column's."""
    height: float | None
    """In inches; chosen from what is drawn if None."""
    title: str | None
    """Instead of the own one, above the panel (above all panels of a ``figure_*``); an empty one
    leaves it out."""
    caption: str | bool | None
    """What is said in words, instead of the own ones; False leaves them out. Of a ``figure_*`` the
    files beside it (`entangle.plotting.save_figure`), of a ``plot_*`` the notes in the panel."""


class FigureOptions(PlotOptions, total=False):
    """What every ``figure_*`` takes by keyword, besides its own arguments."""

    column: Column
    """Width: ``"single"`` (3.3 inches) or ``"double"`` (6.9)."""
    legend: bool
    """False leaves the legend out."""
    digest: str | None
    """Of the run, for the small print; see `entangle.plotting.sign`."""
    run_seed: int | None
    """Of the run, behind the digest."""


class Wishes:
    """What one panel or figure was asked for, and by what names its parts go."""

    def __init__(self, options: FigureOptions, *, panel: bool) -> None:
        check_inches("width", options.get("width"))
        check_inches("height", options.get("height"))
        self.palette, self.spare = _palette(options.get("palette"))
        self.order = _parts("order", options.get("order")) or []
        self.subset = _parts("subset", options.get("subset"))
        self.labels = _labels(options.get("labels"))
        title, caption = options.get("title"), options.get("caption")
        if title is not None:
            title = named("title", title)
        if caption is not None and not isinstance(caption, bool | str):
            raise InvalidInput(f"`caption` must be a text, or False; got {shown(caption)}.")
        self.title = title if panel else None
        self.caption = (None if caption is True else caption) if panel else None
        self.panels: set[str] = set()
        """Names in ``subset`` that choose panels."""
        self.colored: dict[str, str] = {}
        self.parts: dict[str, None] = {}
        self.texts: dict[str, None] = {}
        self.titled = self.captioned = False

    def known(self) -> dict[str, tuple[Iterable[str], Iterable[str]]]:
        """Return by option the names asked for, and those that something goes by."""
        colors = [] if self.spare is not None else list(self.palette)
        return {
            "palette": (colors, self.colored),
            "order": (self.order, self.parts),
            "subset": (self.subset or [], self.parts),
            "labels": (self.labels, self.texts),
        }

    def unknown(self, option: str, name: str) -> UnknownName:
        """Return the error of a name that nothing goes by."""
        return unknown_name(option, name, self.known()[option][1], _REMEDY)

    def color(self, named_as: Sequence[str], usual: str) -> str:
        """Return the colour of a part that goes by some names, the most telling first."""
        self.colored |= dict.fromkeys(named_as, usual)
        for name in named_as:
            if name in self.palette:
                return self.palette[name]
        if self.spare is None or "gaussian" in named_as:
            return usual
        used = len({*self.palette.values()})
        if used == len(self.spare):
            raise InvalidInput(
                f"`palette` must hold a colour for every part; got {used}, and {named_as[0]!r} is "
                "one more; name more colours, or fewer parts with `subset`."
            )
        self.palette |= dict.fromkeys(named_as, self.spare[used])
        return self.spare[used]

    def place(self, called: Iterable[str]) -> int:
        """Return where ``order`` puts a part, behind all that it names if it does not."""
        own = {*called}
        return next((i for i, name in enumerate(self.order) if name in own), len(self.order))

    def keeps(self, called: Iterable[str]) -> bool:
        """Return whether a part that is no panel is drawn."""
        if self.subset is None:
            return True
        rest = [name for name in self.subset if name not in self.panels]
        return not rest or not {*called}.isdisjoint(rest)


_WISHES: ContextVar[Wishes | None] = ContextVar("wishes", default=None)
_SHARED: ContextVar[list[Wishes] | None] = ContextVar("shared", default=None)


@contextmanager
def wishes(options: FigureOptions | PlotOptions, *, panel: bool = False) -> Iterator[Wishes]:
    """Draw as options want it inside the ``with`` block.

    Parameters
    ----------
    options
        Of a ``figure_*`` or, with ``panel``, of a ``plot_*``.

    Raises
    ------
    InvalidInput
        An option that no figure could follow, before anything is drawn.
    UnknownName
        A name that nothing drawn in the block goes by.
    """
    asked = Wishes({**options}, panel=panel)
    token, shared = _WISHES.set(asked), _SHARED.get()
    try:
        yield asked
    finally:
        _WISHES.reset(token)
        if shared is not None:
            shared.append(asked)
    if shared is None:
        _check_known([asked])


@contextmanager
def shared_names() -> Iterator[None]:
    """Let several figures share options: a name must be known to one of them, not to each.

    Raises
    ------
    UnknownName
        At the end of the block, a name that none of them knows.
    """
    drawn: list[Wishes] = []
    token = _SHARED.set(drawn)
    try:
        yield
    finally:
        _SHARED.reset(token)
    _check_known(drawn)


def _check_known(drawn: Sequence[Wishes]) -> None:
    for option in PlotOptions.__annotations__:
        pairs = [one.known()[option] for one in drawn if option in one.known()]
        known = dict.fromkeys(name for _, some in pairs for name in some)
        for asked, _ in pairs:
            for name in asked:
                if name not in known:
                    raise unknown_name(option, name, known, _REMEDY)


def color_of(named_as: Iterable[str], usual: str) -> str:
    """Return the colour of a part that goes by some names: as asked for, else ``usual``."""
    asked = _WISHES.get()
    return usual if asked is None else asked.color([*map(plain, named_as)], usual)


def choosing() -> bool:
    """Return whether parts are asked for by name, so that tables need to be filtered."""
    asked = _WISHES.get()
    return asked is not None and (asked.subset is not None or bool(asked.order))


def picked(
    items: Iterable[T],
    named_as: Callable[[T], str | Iterable[str]],
    *,
    panels: bool = False,
    least: int = 0,
) -> list[T]:
    """Return the parts that are wanted, in the order that is wanted.

    Parameters
    ----------
    items
        The parts in their own order.
    named_as
        Gives the name or names of one.
    panels
        Whether they are panels, layers or others that parts lie in: names of these leave the parts
        inside whole, and other names leave these whole.
    least
        How many parts must be left.

    Raises
    ------
    UnknownName
        Fewer are left.
    """
    asked, found = _WISHES.get(), list(items)
    if asked is None or not choosing():
        return found
    called = [_called(named_as(item)) for item in found]
    own = dict.fromkeys(name for some in called for name in some)
    asked.parts |= own
    kept = list(range(len(found)))
    if panels:
        asked.panels |= own.keys() & {*(asked.subset or ())}
        kept = [i for i in kept if not asked.panels.isdisjoint(called[i])] or kept
    else:
        kept = [i for i in kept if asked.keeps(called[i])]
    if len(kept) < min(least, len(found)):
        first = next(name for name in asked.subset or () if name not in asked.panels)
        raise unknown_name("subset", first, own, "Every panel must show one of its parts.")
    return [found[i] for i in sorted(kept, key=lambda i: asked.place(called[i]))]


def asked_for(*called: str) -> bool:
    """Return whether a single part, such as a reference line, is drawn."""
    return bool(picked([called], lambda own: own))


def arranged(entries: Iterable[T], named_as: Callable[[T], Iterable[str]]) -> list[T]:
    """Return the entries of a legend in the order that is wanted, none left out.

    ``named_as`` gives the texts of an entry, of which `part_of` is the part.
    """
    asked, found = _WISHES.get(), list(entries)
    if asked is None or not asked.order:
        return found
    texts = [[name for t in named_as(one) for name in (plain(t), part_of(t))] for one in found]
    asked.parts |= dict.fromkeys(text for own in texts for text in own)
    places = [asked.place(own) for own in texts]
    return [found[i] for i in sorted(range(len(found)), key=places.__getitem__)]


def title_or(own: str) -> str:
    """Return the title of a panel: as asked for, else its own."""
    asked = _WISHES.get()
    if asked is None or asked.title is None:
        return own
    asked.titled = True
    return asked.title


def words_or(own: Sequence[str]) -> list[str]:
    """Return what a panel says in words: as asked for, else its own clauses."""
    asked = _WISHES.get()
    if asked is None or asked.caption is None:
        return list(own)
    asked.captioned = True
    return [] if isinstance(asked.caption, bool) or not asked.caption else [asked.caption]


def worded(text: str) -> str:
    """Return a tick's name, or other words where these are asked for."""
    asked = _WISHES.get()
    if asked is None:
        return text
    asked.texts[plain(text)] = None
    return asked.labels.get(plain(text), text)


def worded_text(text: Text) -> None:
    """Write other words where these are asked for: for all of a text, or for a part's name."""
    asked, said = _WISHES.get(), plain(text.get_text())
    if asked is None or not said:
        return
    part = part_of(said)
    asked.texts |= dict.fromkeys((said, part))
    if said in asked.labels:
        text.set_text(asked.labels[said])
    elif part in asked.labels:
        words = r"\s+".join(map(re.escape, part.split()))
        new = asked.labels[part]
        text.set_text(re.sub(rf"^\s*{words}", lambda _: new, text.get_text(), count=1))


def part_of(text: str) -> str:
    """Return the name of a part at the beginning of a text: before a parenthesis or colon."""
    return re.split(r" \(|: ", plain(text))[0]


def plain(text: str) -> str:
    """Return a text on one line, with ordinary blanks: as one would type it."""
    return " ".join(text.replace("\u00a0", " ").split())


def check_inches(name: str, value: object) -> None:
    """Raise `InvalidInput` unless a width or height can be that of a figure, or is None."""
    low, high = INCHES
    if value is not None and finite(name, value, least=low) > high:
        raise InvalidInput(f"`{name}` must be at most {high:g} inches; got {shown(value)}.")


def _called(found: str | Iterable[str]) -> list[str]:
    return [plain(name) for name in ([found] if isinstance(found, str) else found) if name]


def _parts(name: str, value: object) -> list[str] | None:
    return None if value is None else [plain(one) for one in names(name, value)]


def _labels(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidInput(f"`labels` must give new words by old ones; got {shown(value)}.")
    return {plain(named("labels", old)): named("labels", new) for old, new in value.items()}


def _palette(value: object) -> tuple[dict[str, str], list[str] | None]:
    """Return colours by name, and colours in turn where these are wanted."""
    if value is None:
        return {}, None
    if isinstance(value, Mapping):
        return {plain(named("palette", key)): _color(one) for key, one in value.items()}, None
    if isinstance(value, str):
        if value not in mpl.color_sequences:
            known = sorted(mpl.color_sequences)
            raise unknown_name("palette", value, known, "Or give colours by name.")
        value = mpl.color_sequences[value]
    if not isinstance(value, Iterable) or not (found := [_color(one) for one in value]):
        raise InvalidInput(
            f"`palette` must give colours by name, or be a list of colours; got {shown(value)}."
        )
    return {}, found


def _color(value: object) -> str:
    if isinstance(value, Hashable | list) and is_color_like(value):
        return to_hex(value)  # type: ignore[arg-type]
    if isinstance(value, str):
        raise unknown_name("colour", value, CSS4_COLORS, "Or write it as #rrggbb.")
    raise InvalidInput(f"`palette` must hold colours; got {shown(value)}.")
