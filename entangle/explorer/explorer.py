"""`Explorer`: scores of neurons to look through in a notebook."""

from functools import cache, cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pandas as pd

from entangle.errors import InvalidInput, Unavailable
from entangle.explorer.content import Content
from entangle.explorer.evidence import ExpertFinder, ModeFinder
from entangle.explorer.experts_view import experts_view
from entangle.explorer.layers import LayerMenu
from entangle.explorer.modes_view import modes_view
from entangle.explorer.static import static_html
from entangle.explorer.table import NeuronTable
from entangle.explorer.views import distribution_view, heading, layer_view
from entangle.jupyter import in_browser
from entangle.scoring.scores import NeuronScores

if TYPE_CHECKING:
    import ipywidgets

    from entangle.explorer.widgets import Board, Render

_VIEW = "application/vnd.jupyter.widget-view+json"


class Explorer:
    """Scores of neurons to look through in a notebook; `entangle.explore` makes it.

    Jupyter shows it as menus of layers, a table of neurons that can be sorted, and views of the
    neuron that is clicked; without ipywidgets, without a kernel, or in an exported notebook it is
    a table and a figure.

    Parameters
    ----------
    scores
        Of at least one layer.
    by
        Column that the neurons are sorted by at first, the largest first.
    modes, experts
        Find what the scores do not hold.
    widgets
        Whether to show widgets; None shows them where they can be clicked.
    """

    def __init__(
        self,
        scores: NeuronScores,
        *,
        modes: ModeFinder,
        experts: ExpertFinder,
        by: str = "wd",
        widgets: bool | None = None,
    ) -> None:
        if scores.frame.empty:
            raise InvalidInput("`scores` must hold at least one neuron; got none.")
        self.scores, self._modes, self._experts = scores, modes, experts
        self._by, self._widgets = by, widgets
        self._first = str(scores.layers["layer"].iloc[0])
        self._table_of = cache(self._make_table)
        self._table_of(self._first)

    @property
    def layer(self) -> str:
        """Full name of the layer that is shown."""
        return self._board.layer if "_board" in self.__dict__ else self._first

    @property
    def neuron(self) -> int:
        """Index of the neuron that is shown."""
        return self._board.neuron

    def open(self, layer: str, neuron: int | None = None) -> None:
        """Show a layer by its full name, and one of its neurons, the top one by default.

        Raises
        ------
        UnknownName, InvalidInput
            If the scores hold no such layer or neuron.
        """
        self.scores.layer(layer)
        if neuron is not None:
            self._table_of(layer).place(neuron)
        self._board.open(layer, neuron)

    def widget(self) -> "ipywidgets.Widget":
        """Return the widget, always the same one.

        Raises
        ------
        Unavailable
            If ipywidgets is not installed.
        """
        return self._board.box

    @cached_property
    def _board(self) -> "Board":
        if not _has_widgets():
            raise Unavailable(
                "the explorer's widgets need ipywidgets; install it with pip install ipywidgets."
            )
        from entangle.explorer.widgets import Board

        board = Board(
            LayerMenu.of(self.scores.layers),
            table_of=self._table_of,
            heading=self._heading,
            views=self._views(),
        )
        board.open(self._first)
        return board

    def _make_table(self, layer: str) -> NeuronTable:
        return NeuronTable.of(self.scores.layer(layer).frame, by=self._by)

    def _heading(self, layer: str, table: NeuronTable, neuron: int) -> str:
        floors = self.scores.layers.set_index("layer")["null_floor"]
        return heading(table, layer, neuron, float(floors[layer]))

    def _views(self) -> "dict[str, Render]":
        def row(layer: str, neuron: int) -> pd.Series:
            return self._table_of(layer).row(neuron)

        def distribution(layer: str, neuron: int, _asked: bool) -> Content:
            return distribution_view(self.scores, row(layer, neuron))

        def experts(layer: str, neuron: int, asked: bool) -> Content:
            table = self._table_of(layer)
            return experts_view(self._experts, table, layer, neuron, asked=asked)

        def modes(layer: str, neuron: int, asked: bool) -> Content:
            return modes_view(self._modes, layer, neuron, asked=asked)

        def place(layer: str, neuron: int, _asked: bool) -> Content:
            return layer_view(self.scores, row(layer, neuron))

        return {"Distribution": distribution, "Experts": experts, "Modes": modes, "Layer": place}

    def __repr__(self) -> str:
        counts = f"{len(self.scores.frame):,} neurons in {len(self.scores.layers):,} layer(s)"
        return f"Explorer of {counts}; shown in a Jupyter notebook, where it can be clicked"

    def _repr_html_(self) -> str:
        return static_html(self.scores, self.layer)

    def _repr_mimebundle_(self, **_wanted: object) -> dict[str, object]:
        """Return the widget where there is a kernel for it, and the static view in any case."""
        bundle: dict[str, object] = {"text/plain": repr(self), "text/html": self._repr_html_()}
        if self._widgets or (self._widgets is None and in_browser() and _has_widgets()):
            model_id = self._board.box.model_id
            bundle[_VIEW] = {"version_major": 2, "version_minor": 0, "model_id": model_id}
        return bundle


def _has_widgets() -> bool:
    return find_spec("ipywidgets") is not None
