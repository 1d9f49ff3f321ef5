"""What the figures of an allocation show, by their artists."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import StepPatch

from entangle.errors import InvalidInput, UnknownName
from entangle.plotting import drawn, figure_allocation, plot_layer_profile, plot_row_sparsity
from tests.plotting.layout import outside, overlapping, texts

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def neurons() -> pd.DataFrame:
    """100 rows: 10 dense, 60 at 0.7, 30 at 0.85."""
    shares = np.repeat([0.0, 0.7, 0.85], [10, 60, 30])
    zeros = np.round(20 * shares).astype(int)
    return pd.DataFrame(
        {"layer": "l", "neuron": np.arange(100), "zeros": zeros, "sparsity": shares}
    )


@pytest.fixture
def layers() -> pd.DataFrame:
    rows = [
        {
            "layer": f"model.layers.{block}.mlp.{name}", "block": block, "projection": name,
            "rows": 100, "in_features": 20, "zeros": 20 * (60 + 2 * block + place),
            "sparsity": (60 + 2 * block + place) / 100,
        }
        for block in range(4)
        for place, name in enumerate(PROJECTIONS)
    ]  # fmt: skip
    return pd.DataFrame(rows).astype({"block": "Int64"})


def lines(ax: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in ax.get_lines()}


def labels(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_the_histogram_counts_every_row(neurons: pd.DataFrame) -> None:
    ax = plot_row_sparsity(neurons, overall=0.675)
    (patch,) = (child for child in ax.get_children() if isinstance(child, StepPatch))
    counts, edges, _ = patch.get_data()
    assert counts.sum() == 100
    at = {float(edges[i]): int(counts[i]) for i in np.flatnonzero(counts)}
    assert at == {0.0: 10, 70.0: 60, 84.0: 30}
    assert ax.get_yscale() == "log"
    assert labels(ax) == ["rows (n = 100: 0 to 85 %)", "all layers: 67.5 %"]
    (line,) = ax.get_lines()
    assert list(np.asarray(line.get_xdata())) == [67.5, 67.5]


def test_one_sparsity_is_one_bar(neurons: pd.DataFrame) -> None:
    ax = plot_row_sparsity(neurons.assign(sparsity=1.0))
    table = drawn(ax.get_figure(root=True))  # type: ignore[arg-type]
    assert table["y"].sum() == table["y"].max() == 100
    assert labels(ax) == ["rows (n = 100: 100 %)"]


def test_a_line_for_every_projection(layers: pd.DataFrame) -> None:
    ax = plot_layer_profile(layers, overall=0.64)
    found = lines(ax)
    assert list(found) == [*PROJECTIONS, "all layers: 64 %"]
    assert list(np.asarray(found["up_proj"].get_xdata())) == [0, 1, 2, 3]
    np.testing.assert_allclose(np.asarray(found["up_proj"].get_ydata()), [61, 63, 65, 67])
    assert len({str(found[name].get_marker()) for name in PROJECTIONS}) == 3
    assert ax.get_ylabel() == "zeros of the layer (%)"


def test_differences_of_rounding_look_small(layers: pd.DataFrame) -> None:
    nearly = 0.7 + 1e-7 * np.arange(12)
    ax = plot_layer_profile(layers.assign(sparsity=nearly), overall=0.7)
    low, high = ax.get_ylim()
    assert high - low >= 2.0
    assert low < 70.0 < high


def test_blocks_are_drawn_in_order(layers: pd.DataFrame) -> None:
    ax = plot_layer_profile(layers.sample(frac=1.0, random_state=1))
    for name in PROJECTIONS:
        assert list(np.asarray(lines(ax)[name].get_xdata())) == [0, 1, 2, 3]


def test_experts_are_drawn_from_0(layers: pd.DataFrame) -> None:
    ax = plot_layer_profile(layers.assign(experts=range(1, 13)), value="experts", overall=0.64)
    assert list(lines(ax)) == list(PROJECTIONS)
    assert list(np.asarray(lines(ax)["gate_proj"].get_ydata())) == [1, 4, 7, 10]
    assert ax.get_ylim()[0] == 0.0
    assert all(tick == round(tick) for tick in ax.get_yticks())


def test_layers_outside_the_blocks_are_counted(layers: pd.DataFrame) -> None:
    layers.loc[0, "block"] = pd.NA
    legend = plot_layer_profile(layers).get_legend()
    assert legend is not None
    assert legend.get_title().get_text() == "1 layer(s) outside the blocks left out"
    with pytest.raises(InvalidInput, match=r"`layers`.*inside"):
        plot_layer_profile(layers.assign(block=None))


def test_the_figure_has_a_panel_for_experts_where_there_are_any(
    layers: pd.DataFrame, neurons: pd.DataFrame
) -> None:
    assert len(figure_allocation(layers, neurons).axes) == 2
    figure = figure_allocation(
        layers.assign(experts=3), neurons, title="protect $wd", column="single"
    )
    assert len(figure.axes) == 3
    (key,) = figure.legends
    assert key.get_title().get_text() == "protect $wd"
    assert "experts" in figure.axes[2].get_title(loc="left")
    table = drawn(figure)
    assert set(table["panel"]) == {"rows", "layers: sparsity", "layers: experts"}
    overall = table.loc[table["series"].str.startswith("all layers"), "series"].unique()
    assert list(overall) == ["all layers: 64 %"]


def test_the_run_is_named_below_the_figure(layers: pd.DataFrame, neurons: pd.DataFrame) -> None:
    for table in (layers, layers.assign(experts=3)):
        figure = figure_allocation(table, neurons, title="rank wd", digest="0123456789ab" * 5)
        assert "run 0123456789ab" in texts(figure)
        assert overlapping(figure) == []
        assert outside(figure) == []
    assert not [text for text in texts(figure_allocation(layers, neurons)) if "run " in text]
    with pytest.raises(InvalidInput, match=r"`digest`.*'no digest'"):
        figure_allocation(layers, neurons, digest="no digest")


def test_a_uniform_allocation_looks_even(layers: pd.DataFrame, neurons: pd.DataFrame) -> None:
    """Rows take turns in rounding: layers differ by less than a thousandth, lines by nothing."""
    nearly = 0.7 + 1e-3 * np.resize([0.0, 0.2, -0.3, 0.4], 12)
    figure = figure_allocation(layers.assign(sparsity=nearly), neurons)
    ax = figure.axes[1]
    low, high = ax.get_ylim()
    for name in PROJECTIONS:
        drawn_values = np.asarray(lines(ax)[name].get_ydata(), dtype=np.float64)
        assert np.ptp(drawn_values) < 0.05 * (high - low)


def test_the_overall_sparsity_is_weighted(layers: pd.DataFrame, neurons: pd.DataFrame) -> None:
    uneven = layers.head(2).assign(in_features=[20, 60], zeros=[2000, 0])
    table = drawn(figure_allocation(uneven, neurons))
    assert "all layers: 25 %" in set(table["series"])


@pytest.mark.parametrize("bad", [1.01, -0.1, np.nan])
def test_mistakes_are_one_clear_line(
    bad: float, layers: pd.DataFrame, neurons: pd.DataFrame
) -> None:
    with pytest.raises(InvalidInput, match=r"`neurons`.*\[0, 1\]"):
        plot_row_sparsity(neurons.assign(sparsity=bad))
    with pytest.raises(InvalidInput, match=r"`Allocation`.*`entangle allocate`"):
        plot_row_sparsity(neurons.drop(columns="sparsity"))
    with pytest.raises(InvalidInput, match=r"`layers`.*projection.*`Allocation`"):
        plot_layer_profile(layers.drop(columns="projection"))
    with pytest.raises(UnknownName, match="'expert'"):
        plot_layer_profile(layers, value="expert")
    with pytest.raises(InvalidInput, match=r"`layers`.*zeros.*`Allocation`"):
        figure_allocation(layers.drop(columns="zeros"), neurons)
