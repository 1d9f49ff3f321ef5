"""What lies where on a drawn figure: which texts cover one another or leave the paper."""

import re
from collections.abc import Iterator
from itertools import combinations

from matplotlib.axes._base import _AxesBase
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

SLACK = 0.75
"""Points by which boxes may overlap: they are wider than the ink."""


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Return pairs of texts that cover one another."""
    return [
        (one, other)
        for (one, a), (other, b) in combinations(_boxes(figure), 2)
        if (shared := Bbox.intersection(a, b)) is not None
        and min(shared.width, shared.height) > SLACK * figure.dpi / 72
    ]


def outside(figure: Figure) -> list[str]:
    """Return the texts that are not wholly on the paper."""
    page = figure.bbox.padded(SLACK * figure.dpi / 72)
    inside = [
        (text, page.contains(*box.min) and page.contains(*box.max)) for text, box in _boxes(figure)
    ]
    return [text for text, whole in inside if not whole]


def crowded(figure: Figure, *, least_height: float = 0.0) -> list[str]:
    """Return what is wrong with panels and legends: off the paper, on one another, too low."""
    figure.draw_without_rendering()
    boxes = [legend.get_window_extent() for legend in figure.legends]
    boxes += [box for ax in figure.axes if (box := ax.get_tightbbox()) is not None]
    page = figure.bbox.padded(1.0)
    wrong = [f"outside: {box}" for box in boxes if not page.contains(*box.min)
             or not page.contains(*box.max)]  # fmt: skip
    for one, other in combinations(boxes, 2):
        shared = Bbox.intersection(one, other)
        if shared is not None and min(shared.width, shared.height) >= 1.0:
            wrong.append(f"overlap: {one}, {other}")
    low = [ax for ax in figure.axes if ax.get_window_extent().height <= least_height * figure.dpi]
    return wrong + [f"low: {ax}" for ax in low]


def texts(figure: Figure) -> list[str]:
    """Return all texts that can be seen."""
    return [text for text, _ in _boxes(figure)]


def smallest_text(figure: Figure) -> float:
    """Return the size in points of the smallest text that can be seen."""
    return min(float(text.get_fontsize()) * _script(text) for text in _shown(figure))


def _script(text: Text) -> float:
    """Return how much smaller superscripts and subscripts of TeX are than the text around them."""
    raised = text.get_parse_math() and re.search(r"\$[^$]*[\^_][^$]*\$", text.get_text())
    return 0.7 if raised else 1.0


def _boxes(figure: Figure) -> list[tuple[str, Bbox]]:
    return [(text.get_text(), _ink(text)) for text in _shown(figure)]


def _shown(figure: Figure) -> list[Text]:
    figure.draw_without_rendering()
    axes = [one for ax in figure.axes for one in (ax, *ax.child_axes)]
    ticks = {id(text) for ax in axes for text in _all_tick_labels(ax)}
    shown = [text for ax in axes for text in _shown_tick_labels(ax)]
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        hidden = text.axes is not None and not text.axes.axison and _is_label(text, text.axes)
        if id(text) not in ticks and not hidden:
            shown.append(text)
    return [text for text in shown if text.get_visible() and text.get_text().strip()]


def _ink(text: Text) -> Bbox:
    """Return the box of a text without the empty lines at its end."""
    box, lines = Text.get_window_extent(text), text.get_text().split("\n")
    empty = len(lines) - len(text.get_text().rstrip("\n").split("\n"))
    return Bbox([[box.x0, box.y0 + box.height * empty / len(lines)], [box.x1, box.y1]])


def _is_label(text: Text, ax: _AxesBase) -> bool:
    return text in (ax.xaxis.label, ax.yaxis.label)


def _all_tick_labels(ax: _AxesBase) -> Iterator[Text]:
    for axis in (ax.xaxis, ax.yaxis):
        for tick in (*axis.majorTicks, *axis.minorTicks):
            yield from (tick.label1, tick.label2)
        yield axis.offsetText


def _shown_tick_labels(ax: _AxesBase) -> Iterator[Text]:
    if not ax.axison:
        return
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if low <= tick.get_loc() <= high:
                yield from (tick.label1, tick.label2)
