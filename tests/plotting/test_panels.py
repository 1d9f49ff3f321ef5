"""One contract for the axes-level functions of decompositions and layers."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from entangle import plotting
from entangle.errors import InvalidInput
from tests.plotting.decomposition_frames import TOP, Decomposed
from tests.plotting.layout import texts

Case = tuple[Callable[..., Axes], pd.DataFrame, dict[str, Any]]
NAMES = (
    "sparse_output", "experts", "distances", "change", "predictor", "components", "router_map",
    "modes", "separated_pairs", "contexts", "wd_ridge", "wd_heatmap",
)  # fmt: skip
WITH_UNITS = ("σ", "÷", "%", "ratio", "units", "share", "components")


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, decomposed: Decomposed, many_scores: pd.DataFrame) -> Case:
    """An axes-level function, the frame it takes first, and the other arguments it needs."""
    d = decomposed
    histogram, item = plotting.dense_output(d.outputs, d.neurons, neuron=TOP)
    own = {"histogram": histogram, "mean": item.mean, "std": item.std}
    of_one: dict[str, Any] = {"neurons": d.neurons, "neuron": TOP, "experts": 4}
    cases: dict[str, tuple[pd.DataFrame, dict[str, Any]]] = {
        "sparse_output": (d.outputs, of_one),
        "experts": (d.outputs, of_one),
        "distances": (d.pairs, {"neuron": TOP}),
        "change": (d.neurons, {"experts": 4}),
        "predictor": (d.neurons, {"experts": 4, "n_boot": 5}),
        "components": (d.components, {"n_boot": 5}),
        "router_map": (d.router_map, {"experts": 4}),
        "modes": (d.modes, own),
        "separated_pairs": (d.separated, own),
        "contexts": (d.contexts, {}),
        "wd_ridge": (many_scores, {}),
        "wd_heatmap": (many_scores, {}),
    }
    frame, options = cases[request.param]
    return getattr(plotting, f"plot_{request.param}"), frame, options


def figure_of(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def test_panels_keep_the_contract(case: Case) -> None:
    """Draws only into the axes it is given, or a new figure; changes nothing else; says n."""
    draw, frame, options = case
    before, settings = frame.copy(deep=True), dict(rcParams)
    current = plt.figure().subplots()
    first, second = Figure().subplots(1, 2)
    assert draw(frame, ax=first, **options) is first
    new = draw(frame, **options)
    assert figure_of(new).axes == [new]
    figure_of(new).draw_without_rendering()
    assert not second.has_data()
    assert not current.has_data()
    plt.close("all")
    assert dict(rcParams) == settings
    pd.testing.assert_frame_equal(frame, before)
    table = plotting.drawn(figure_of(new))
    assert list(table.columns[:4]) == ["panel", "series", "x", "y"]
    labels = [label for label in new.get_legend_handles_labels()[1] if label[0] != "_"]
    if draw is not plotting.plot_contexts:
        said = " ".join(texts(figure_of(new))).replace("\u00a0", " ")
        assert "n = " in said
        assert any(unit in new.get_xlabel() for unit in WITH_UNITS)
        assert new.get_ylabel()
        assert len(set(labels)) == len(labels)


def test_panels_refuse_what_is_no_table_of_theirs(case: Case) -> None:
    draw, frame, options = case
    with pytest.raises(TypeError, match="positional argument"):
        draw(frame, 0.5)
    with pytest.raises(InvalidInput, match=r"columns.*`entangle"):
        draw(frame[["neuron" if "neuron" in frame else "layer"]], **options)
    with pytest.raises(InvalidInput, match=r"got none.*`entangle"):
        draw(frame.head(0), **options)
