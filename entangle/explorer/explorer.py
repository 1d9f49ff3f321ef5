"""`Explorer`: scores of neurons to look through in a notebook.

The explorer where nothing can be clicked: a table and a figure as HTML.

`explore`: look through the neurons of a model, or of scores made before, in a notebook.
"""

from dataclasses import replace
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from entangle.errors import InvalidInput, Unavailable
from entangle.explorer.evidence import (
    Content,
    ExpertFinder,
    ModeFinder,
    Question,
    Render,
    image,
    picture,
)
from entangle.explorer.export import link, page
from entangle.explorer.texts import SeenText, other_text, pairs_view, probe_view, search_view
from entangle.explorer.views import (
    LayerMenu,
    NeuronTable,
    distribution_view,
    experts_view,
    heading,
    layer_view,
    modes_view,
)
from entangle.plotting import figure_top_and_typical
from entangle.results.scores import NeuronScores
from entangle.runs.progress import in_browser
from entangle.runs.tables import escaped

if TYPE_CHECKING:
    import ipywidgets

    from entangle.explorer.widgets import Board
import os
from collections.abc import Iterable

from entangle.checks import choice, share, wholes
from entangle.experiments.selection import check_scores_fit
from entangle.explorer.evidence import Subject
from entangle.memory import check_memory
from entangle.models.blocks import evaluates
from entangle.models.layers import DEFAULT_PROJ, LayerSpec, Projections
from entangle.models.loading import AnyModel, as_language_model
from entangle.results.decomposition import Decomposition, load_decomposition
from entangle.results.scores import load_scores
from entangle.runs.provenance import expand_user, output_file
from entangle.scoring.score import score
from entangle.seeding import check_seed
from entangle.texts.calibration import as_calibration
from entangle.texts.given import Source

_NO_CLICKS = (
    "Nothing can be clicked here: in JupyterLab or a classic notebook with a running kernel and "
    "ipywidgets, run the cell again."
)


def static_html(scores: NeuronScores, layer: str) -> str:
    """Return the top neurons of a layer, and the distributions of the top and a typical one."""
    one = scores.layer(layer)
    try:
        shown = image(picture(figure_top_and_typical(one.frame, one.histogram)))
    except InvalidInput as error:
        shown = f"<p>{escaped(error)}</p>"
    return f"{one._repr_html_()}{shown}<p><small>{escaped(_NO_CLICKS)}</small></p>"


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
            export=self._link,
        )
        board.open(self._first)
        return board

    def _make_table(self, layer: str) -> NeuronTable:
        return NeuronTable.of(self.scores.layer(layer).frame, by=self._by)

    def _heading(self, layer: str, table: NeuronTable, neuron: int) -> str:
        floors = self.scores.layers.set_index("layer")["null_floor"]
        return heading(table, layer, neuron, float(floors[layer]))

    def _views(self) -> "dict[str, Render | Question]":
        def distribution(layer: str, neuron: int, _asked: bool) -> Content:
            return distribution_view(self.scores, self._row(layer, neuron))

        def experts(layer: str, neuron: int, asked: bool) -> Content:
            table = self._table_of(layer)
            shown = experts_view(self._experts, table, layer, neuron, asked=asked)
            rows, _ = self._experts.known(layer, neuron)
            wd = float(rows["wd"].iloc[0]) if len(rows) else np.nan
            return self._warned(shown, self._experts.text_of(layer, neuron), layer, neuron, wd)

        def modes(layer: str, neuron: int, asked: bool) -> Content:
            shown = modes_view(self._modes, layer, neuron, asked=asked)
            return self._warned(shown, self._modes.text_of(layer, neuron), layer, neuron)

        def pairs(layer: str, neuron: int, asked: bool) -> Content:
            shown = pairs_view(self._modes, layer, neuron, asked=asked)
            return self._warned(shown, self._modes.text_of(layer, neuron), layer, neuron)

        def place(layer: str, neuron: int, _asked: bool) -> Content:
            return layer_view(self.scores, self._row(layer, neuron))

        def search(layer: str, neuron: int, text: str, asked: bool) -> Content:
            shown = search_view(self._modes, layer, neuron, text, asked=asked)
            return self._warned(shown, self._modes.text_of(layer, neuron), layer, neuron)

        def own(layer: str, neuron: int, text: str, asked: bool) -> Content:
            return probe_view(self._modes, self.scores, layer, neuron, text, asked=asked)

        return {
            "Distribution": distribution, "Experts": experts, "Modes": modes, "Pairs": pairs,
            "Search": Question(search, "text that tokens hold, such as ing"),
            "Own text": Question(own, "a text of your own", lines=4), "Layer": place,
        }  # fmt: skip

    def _row(self, layer: str, neuron: int) -> pd.Series:
        return self._table_of(layer).row(neuron)

    def _warned(
        self, shown: Content, calibration: object, layer: str, neuron: int, wd: float = np.nan
    ) -> Content:
        """Put a warning before what a view shows where it is of another text than the scores."""
        if not (shown.html or shown.pictures) or calibration is None:
            return shown
        both = float(self._row(layer, neuron)["wd"]), wd
        return replace(shown, note=other_text(self.scores, SeenText.of(calibration), wd=both))

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        layer: str | None = None,
        neuron: int | None = None,
        tab: str = "Distribution",
        force: bool = False,
    ) -> Path:
        """Write what is known of a neuron as a page of its own, or a figure of it.

        Parameters
        ----------
        path
            A file that ends in ``.html``, or in ``.png`` for the figure of ``tab``.
        layer, neuron
            Full name and index; the ones that are shown by default.
        tab
            Title of a tab with a figure.
        force
            Replace an existing file.

        Raises
        ------
        InvalidInput, UnknownName, Unavailable
            If the file exists without ``force``, has another ending or cannot be written, there is
            no such neuron or tab, or the tab shows no figure of it.
        """
        place = expand_user(path)
        ending = choice("path", place.suffix.lower().lstrip("."), ("html", "png"), kind="ending")
        if place.exists() and not force:
            raise InvalidInput(f"{str(path)!r} exists; name another file or pass force=True.")
        layer = self.layer if layer is None else layer
        neuron = self._shown_neuron(layer) if neuron is None else neuron
        content = self._exported(layer, neuron, tab, ending)
        with output_file(place) as temporary:
            temporary.write_bytes(content)
        return place

    def _shown_neuron(self, layer: str) -> int:
        shown = "_board" in self.__dict__ and self.layer == layer
        return self.neuron if shown else self._table_of(layer).neurons(0)[0]

    def _exported(self, layer: str, neuron: int, tab: str, ending: str) -> bytes:
        """Return the bytes of a page, or of a figure."""
        table = self._table_of(layer)
        heading = self._heading(layer, table, neuron)
        renders = {name: one for name, one in self._views().items() if callable(one)}
        if ending == "png":
            name = choice("tab", tab, renders, kind="tab with a figure")
            pictures = renders[name](layer, neuron, False).pictures
            if not pictures:
                raise InvalidInput(f"the tab {tab!r} shows no figure of neuron {neuron} yet.")
            return pictures[0]
        parts = {name: render(layer, neuron, False) for name, render in renders.items()}
        return page(f"{layer} · neuron {neuron}", heading, parts).encode("utf-8")

    def _link(self, layer: str, neuron: int, tab: str, ending: str) -> str:
        """Return a link that saves what is exported, where the page is."""
        with_figure = [name for name, one in self._views().items() if callable(one)]
        try:
            content = self._exported(
                layer, neuron, tab if tab in with_figure else with_figure[0], ending
            )
        except InvalidInput as error:
            return f"<span>{escaped(error)}</span>"
        return link(f"{layer}-{neuron}.{ending}", content)

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


@evaluates
def explore(
    source: NeuronScores | AnyModel,
    calibration: Source | None = None,
    *,
    model: AnyModel | None = None,
    decomposition: Decomposition | str | os.PathLike[str] | None = None,
    layers: LayerSpec = "all",
    proj: Projections = DEFAULT_PROJ,
    by: str = "wd",
    experts: int | Iterable[int] = (1, 4, 16),
    sparsity: float = 0.9,
    widgets: bool | None = None,
    seed: int = 0,
    memory: int | None = None,
    progress: bool | None = None,
) -> Explorer:
    """Look through neurons in a notebook: leave the result as the last line of a cell.

    Menus choose a layer; its neurons stand in a table that a click on a title sorts; a click on a
    neuron shows the distribution of its outputs over the fitted Gaussian, what sparse experts make
    of it, what its modes mean, and its place in the layer. Where nothing can be clicked (no
    ipywidgets, no kernel, an exported notebook) a table and a figure are shown.

    Parameters
    ----------
    source
        Scores, the folder of saved ones, or a model, whose neurons are then scored: a name or path
        for `entangle.load_model`, a module or a `LanguageModel`.
    calibration
        Text that a model is scored and looked at on: a calibration set, or whatever else
        `entangle.load_calibration` takes, with its default settings. The demo text by default where
        ``source`` is a model.
    model
        The model of the scores, as in `entangle.score`, so that modes and experts can be found;
        needs ``calibration``.
    decomposition
        A decomposition of the same model, or its folder: its experts and modes are shown at once.
    layers, proj
        Layers of a model that are scored, as in `entangle.models.layers.find_layers`.
    by
        Column that the neurons are sorted by at first.
    experts, sparsity
        Experts that a click fits, as in `entangle.decompose`.
    widgets
        Whether to show widgets; by default where they can be clicked: in a page with a running
        kernel, if ipywidgets is installed.
    seed
        Of the scores, of the contexts that are drawn, and of the experts.
    memory
        Bytes for the recorded inputs of the layer whose modes are looked at; half of what is free
        when they are recorded by default.
    progress
        Show a progress bar of the scoring; by default in a notebook and on a terminal.

    Raises
    ------
    InvalidInput, UnknownName
        If the scores or the decomposition are of another model, there is no neuron, ``model`` comes
        without ``calibration``, or what `entangle.load_scores` and `entangle.score` refuse.
    """
    check_memory(memory)
    experts, sparsity = wholes("experts", experts, least=1), share("sparsity", sparsity)
    seed = check_seed(seed)
    if isinstance(source, str | os.PathLike) and (expand_user(source) / "manifest.json").is_file():
        source = load_scores(source)
    if isinstance(decomposition, str | os.PathLike):
        decomposition = load_decomposition(decomposition)
    if isinstance(source, NeuronScores):
        scores, subject = source, _subject(source, model, calibration)
    elif model is None:
        scored = as_language_model(source)
        text = as_calibration("demo" if calibration is None else calibration, scored)
        subject = Subject(scored, text)
        scores = score(scored, text, layers=layers, proj=proj, seed=seed, progress=progress)
    else:
        raise InvalidInput("`model` must be left out where `source` is a model; got both.")
    if decomposition is not None:
        _check_same_model(scores, decomposition)
    return Explorer(
        scores,
        modes=ModeFinder(decomposition, subject, memory=memory, seed=seed),
        experts=ExpertFinder(decomposition, subject, experts=experts, sparsity=sparsity, seed=seed),
        by=by,
        widgets=widgets,
    )


def _subject(
    scores: NeuronScores,
    model: AnyModel | None,
    calibration: Source | None,
) -> Subject | None:
    if model is None:
        if calibration is not None:
            raise InvalidInput("`calibration` must come with `model` where `source` is scores.")
        return None
    if calibration is None:
        raise InvalidInput("`model` must come with `calibration`, the text that it is run on.")
    known = as_language_model(model)
    check_scores_fit(scores, known)
    return Subject(known, as_calibration(calibration, known))


def _check_same_model(scores: NeuronScores, decomposition: Decomposition) -> None:
    ours, theirs = (
        str(model.get("digest")) if isinstance(model, dict) else "unknown"
        for model in (one.manifest.get("model") for one in (scores, decomposition))
    )
    if ours != theirs:
        raise InvalidInput(
            f"`decomposition` must be of the model of the scores (digest {ours[:12]}…); got one of "
            f"a model with digest {theirs[:12]}…; decompose that model."
        )
