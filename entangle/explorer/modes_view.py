"""The view of a neuron's modes: what the tokens of each have in common."""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entangle.errors import EntangleError, InvalidInput
from entangle.explorer.content import Content, picture
from entangle.explorer.evidence import ModeFinder, Modes
from entangle.explorer.views import PANEL_INCHES
from entangle.html_tables import escaped, number
from entangle.plotting import paper_style, plot_modes
from entangle.plotting.style import PaperFigure

_NEEDS = (
    "<p>Modes need a decomposition that holds them, or the model and a text: "
    "<code>entangle.explore(scores, text, model=model)</code>.</p>"
)


def modes_view(finder: ModeFinder, layer: str, neuron: int, *, asked: bool) -> Content:
    """Show the modes of a neuron; offer the pass over the text that the first one takes."""
    try:
        found = finder.known(layer, neuron)
        if found is None and asked and finder.subject is not None:
            found = finder.find(layer, neuron)
    except EntangleError as error:
        return Content(html=f"<p>{escaped(error)}</p>")
    if found is not None:
        unit = _Unit(found.mean, found.std)
        modes = (_mode(one, found.contexts, unit) for _, one in found.modes.iterrows())
        return Content(_picture(found), "".join(modes))
    if finder.subject is None:
        return Content(html=_NEEDS)
    return Content(offer=f"Find modes: run the model over {finder.subject.size}, up to this layer")


def _picture(found: Modes) -> tuple[bytes, ...]:
    with paper_style(column="single"):
        figure = PaperFigure(figsize=PANEL_INCHES, layout="constrained")
        try:
            ax = plot_modes(
                found.modes,
                histogram=found.histogram,
                mean=found.mean,
                std=found.std,
                ax=figure.subplots(),
            )
        except InvalidInput:  # a constant neuron has one mode and no distribution to draw
            return ()
        _legend_outside(figure, ax)
        return (picture(figure),)


def _legend_outside(figure: Figure, ax: Axes) -> None:
    """Move the legend above the panel, where it covers no mode's number."""
    inside = ax.get_legend()
    assert inside is not None  # noqa: S101 - drawn by `plot_modes`
    labels = [text.get_text() for text in inside.get_texts()]
    handles = [handle for handle in inside.legend_handles if handle is not None]
    inside.remove()
    ax.set_title("")
    figure.legend(handles, labels, loc="outside upper left", ncols=3)


@dataclass(frozen=True)
class _Unit:
    """How outputs are written: in σ from the mean where there is a σ."""

    mean: float
    std: float

    def text(self, output: float) -> str:
        if 0.0 < self.std < np.inf:
            return f"{(output - self.mean) / self.std:+.2f}".replace("-", "−")
        return number(output, 3)

    @property
    def name(self) -> str:
        return " σ" if 0.0 < self.std < np.inf else ""


def _mode(row: pd.Series, contexts: pd.DataFrame, unit: _Unit) -> str:
    examples = contexts[contexts["mode"] == row["mode"]]
    lines = "".join(_context(one, unit) for _, one in examples.iterrows())
    tokens = " ".join(
        f'<span class="entangle-token">{_piece(token)}<small> {count:,}</small></span>'
        for token, count, _share in json.loads(row["top_tokens"])
    )
    title = (
        f"<b>Mode {int(row['mode'])}</b> around {unit.text(float(row['center']))}{unit.name}: "
        f"{100 * row['share']:.3g} % of the tokens ({int(row['tokens']):,})"
    )
    return (
        f'<div class="entangle-mode"><p>{title}<br>{tokens}</p>'
        f'<table class="entangle-contexts">{lines}</table></div>'
    )


def _context(one: pd.Series, unit: _Unit) -> str:
    before, token, after = (_piece(str(one[name])) for name in ("before", "token", "after"))
    output = unit.text(float(one["output"]))
    return (
        f'<tr><td class="entangle-output">{output}</td><td class="entangle-before">{before}</td>'
        f'<td class="entangle-after"><mark>{token}</mark>{after}</td></tr>'
    )


def _piece(text: str) -> str:
    """Return a piece of text whose direction cannot disturb its neighbours."""
    return f"<bdi>{escaped(text)}</bdi>"
