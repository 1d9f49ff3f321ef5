"""One contract for all axes-level functions."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from entangle import plotting
from entangle.errors import InvalidInput
from tests.plotting.ablation_frames import ablation_frame
from tests.plotting.conftest import allocated, differing, evidence, expanded, studied
from tests.plotting.decomposition_frames import TOP, Decomposed
from tests.plotting.layout import texts
from tests.plotting.test_options import correlations, routings

Case = tuple[Callable[..., Axes], pd.DataFrame, dict[str, Any]]
NAMES = [name.removeprefix("plot_") for name in plotting.__all__ if name.startswith("plot_")]
TEXTS = ("contexts", "pair_contexts")
WITH_UNITS = ("σ", "÷", "%", "ratio", "units", "share", "components", "× dense", "block",
              "step", "model", "ρ")  # fmt: skip


@pytest.fixture(params=NAMES)
def case(
    request: pytest.FixtureRequest,
    decomposed: Decomposed,
    many_scores: pd.DataFrame,
    flagged: pd.DataFrame,
    histogram: pd.DataFrame,
    comparison: pd.DataFrame,
) -> Case:
    """An axes-level function, the frame it takes first, and the other arguments it needs."""
    d = decomposed
    own_histogram, item = plotting.dense_output(d.outputs, d.neurons, neuron=TOP)
    own = {"histogram": own_histogram, "mean": item.mean, "std": item.std}
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
        "pair_contexts": (d.separated, {"mean": item.mean, "std": item.std}),
        "wd_distribution": (flagged, {"floor": (0.013, 0.019)}),
        "output_distribution": (histogram, {"mean": -0.5, "std": 2.4}),
        "wd_against_md": (flagged, {"n_boot": 20}),
        "perplexity": (comparison, {"x": "nonzeros", "text": "WikiText-2, n = 152 windows"}),
        "ablation": (ablation_frame(), {"text": "WikiText-2"}),
        "layer_profile": (allocated()[0], {"overall": 0.6}),
        "row_sparsity": (allocated()[1], {"overall": 0.6}),
        "costs": (expanded()[1], {}),
        "two_runs": (differing()[0], {"names": ("A: seed 0", "B: seed 1")}),
        "change_errors": (differing()[0], {}),
        "rank_agreement": (differing()[1], {"measure": "top_3"}),
        "verdicts": (studied()[0], {}),
        "evidence": (evidence(), {"claim": "b"}),
        "trace": (studied()[1], {"measure": "overlap"}),
        "anchor": (correlations(), {}),
        "wd_inside": (routings()[0], {}),
        "routing_drop": (routings()[1], {}),
        "wd_ridge": (many_scores, {}),
        "wd_heatmap": (many_scores, {}),
    }
    frame, options = cases[request.param]
    return getattr(plotting, f"plot_{request.param}"), frame, options


@pytest.mark.parametrize("legend", [True, False])
def test_legends_and_notes_cover_no_data(case: Case, legend: bool) -> None:
    draw, frame, options = case
    if "legend" not in signature(draw).parameters:
        return
    with plotting.paper_style():
        ax = draw(frame, legend=legend, **options)
        figure_of(ax).draw_without_rendering()
    assert (ax.get_legend() is not None) == legend
    boxes = [ax.get_legend().get_window_extent()] if legend else []  # type: ignore[union-attr]
    for box in filter(None, (Bbox.intersection(one, ax.get_window_extent()) for one in boxes)):
        points = [np.column_stack(line.get_data()) for line in ax.get_lines()
                  if line.get_transform() == ax.transData]  # fmt: skip
        points += [np.asarray(one.get_offsets()) for one in ax.collections]
        assert not any(box.count_contains(ax.transData.transform(part)) for part in points)


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
    if draw.__name__.removeprefix("plot_") not in TEXTS:
        said = " ".join(texts(figure_of(new))).replace("\u00a0", " ")
        assert "n = " in said or "rows" in said or "block" in said or "model" in said
        assert any(unit in new.get_xlabel() for unit in WITH_UNITS)
        assert new.get_ylabel()
        assert len(set(labels)) == len(labels)


def test_panels_refuse_what_is_no_table_of_theirs(case: Case) -> None:
    draw, frame, options = case
    with pytest.raises(TypeError, match="positional argument"):
        draw(frame, 0.5)
    left = next((name for name in ("neuron", "layer") if name in frame), frame.columns[0])
    with pytest.raises(InvalidInput, match=r"columns.*`entangle"):
        draw(frame[[left]].rename(columns={frame.columns[0]: "other"}), **options)
    with pytest.raises(InvalidInput, match=r"got none.*`entangle"):
        draw(frame.head(0), **options)
