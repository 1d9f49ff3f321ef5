import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.patches import StepPatch

from entangle.errors import InvalidInput
from entangle.plotting import caption_of, drawn, figure_wd_by_layer, plot_wd_heatmap, plot_wd_ridge
from entangle.plotting.layers import MOST_RIDGES
from tests.plotting.conftest import layer_scores
from tests.plotting.layout import outside, overlapping


def model(blocks: int, n: int, *, projections: tuple[str, ...] = ("gate_proj",)) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    parts = [
        {"layer": f"l.{block}.{name}", "block": block, "projection": name}
        for block in range(blocks)
        for name in projections
    ]
    frame = pd.DataFrame(parts).loc[np.repeat(range(len(parts)), n)].reset_index(drop=True)
    return frame.assign(neuron=np.arange(len(frame)) % n, wd=rng.gamma(4.0, 0.02, len(frame)))


def test_heat_map_counts_every_neuron_of_a_layer(many_scores: pd.DataFrame) -> None:
    figure = plot_wd_heatmap(many_scores).get_figure(root=True)
    assert figure is not None
    cells = drawn(figure).dropna(subset="share")
    np.testing.assert_allclose(cells.groupby("y")["share"].sum(), 100.0)
    rows = many_scores[many_scores["block"] == 2]
    edges = np.append(cells.query("y == 2")["x"], np.inf)
    expected = np.histogram(rows["wd"], edges)[0] / len(rows) * 100.0
    np.testing.assert_allclose(cells.query("y == 2")["share"], expected)


def test_heat_map_marks_threshold_and_largest(many_scores: pd.DataFrame) -> None:
    figure = plot_wd_heatmap(many_scores, top=0.05).get_figure(root=True)
    assert figure is not None
    table, by_layer = drawn(figure), many_scores.groupby("block")["wd"]
    np.testing.assert_allclose(table.query("series == 'largest'")["x"], by_layer.max())
    tenth = by_layer.apply(lambda wd: wd.nlargest(10).min())
    np.testing.assert_allclose(table.query("series == 'threshold'")["x"], tenth)


def test_ridges_have_one_scale_and_mark_the_top(many_scores: pd.DataFrame) -> None:
    ax = plot_wd_ridge(many_scores, top=0.05)
    data = [p.get_data() for p in ax.patches if isinstance(p, StepPatch)]
    ridges = {float(np.min(base)): heights for heights, _, base in data}
    assert sorted(ridges) == [0, 1, 2, 3]
    sums = [np.sum(heights - place) for place, heights in ridges.items()]
    np.testing.assert_allclose(sums, sums[0])
    marks = [c for c in ax.collections if isinstance(c, LineCollection)]
    assert [len(c.get_segments()) for c in marks] == [10] * 4
    ridge = max(p.get_zorder() for p in ax.patches if isinstance(p, StepPatch))
    assert ridge < min(c.get_zorder() for c in marks)  # no ridge hides a top neuron
    assert ridge < min(spine.get_zorder() for spine in ax.spines.values())


@pytest.mark.parametrize("blocks", [2, 7, 30])
def test_every_tick_of_the_depth_has_a_number(blocks: int) -> None:
    for ax in (plot_wd_ridge(model(blocks, 20)), plot_wd_heatmap(model(blocks, 20))):
        numbers = [text.get_text() for text in ax.get_yticklabels()]
        assert len(numbers) > 1
        assert all(number.isdigit() for number in numbers)


def test_blocks_are_in_order_whatever_the_table(many_scores: pd.DataFrame) -> None:
    turned = many_scores[::-1]
    for frame in (many_scores, turned):
        table = drawn(figure_wd_by_layer(frame)).query("series == 'share of neurons (%)'")
        ridges = table["panel"].unique().tolist()
        assert ridges == [f"model.layers.{block}.mlp.gate_proj" for block in (3, 2, 1, 0)]


def test_a_panel_a_projection(many_scores: pd.DataFrame) -> None:
    figure = figure_wd_by_layer(model(3, 40, projections=("gate_proj", "up_proj")))
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["gate_proj", "up_proj"]
    assert len({ax.get_xlim() for ax in figure.axes}) == 1
    (key,) = figure.legends
    assert "240 neurons of 6 layers" in caption_of(figure)
    assert [text.get_text() for text in key.get_texts()] == ["top 3 % by WD"]


def test_projections_that_are_too_many_or_repeat_share_a_panel() -> None:
    many = model(2, 5, projections=tuple(f"expert{i}" for i in range(7)))
    assert figure_wd_by_layer(many).axes[0].get_title(loc="left") == "all layers"
    twice = pd.concat([model(2, 5), model(2, 5).assign(layer=lambda f: f["layer"] + ".b")])
    figure = figure_wd_by_layer(twice)
    assert figure.axes[0].get_title(loc="left") == "all layers"
    assert figure.axes[0].get_ylabel() == "layer, in the table's order"


@pytest.mark.parametrize("column", ["single", "double"])
def test_thousands_of_layers_are_drawn(column: str) -> None:
    frame = model(3000, 3).drop(columns="projection")
    figure = figure_wd_by_layer(frame, column=column)  # type: ignore[arg-type]
    assert figure.axes[0].get_title(loc="left") == "all layers"
    (mesh,) = (c for c in figure.axes[0].collections if isinstance(c, QuadMesh))
    assert np.asarray(mesh.get_array()).shape[0] == 3000
    assert not overlapping(figure)
    assert not outside(figure)


def test_of_many_layers_evenly_spaced_ridges_are_drawn() -> None:
    ax = plot_wd_ridge(model(100, 3))
    assert f"{MOST_RIDGES} drawn" in ax.get_title()
    assert sum(isinstance(patch, StepPatch) for patch in ax.patches) == MOST_RIDGES


@pytest.mark.parametrize("wd", [[0.1], [0.1, 0.1], [1e-9, 1e9]])
def test_one_neuron_and_extreme_scores_are_drawn(wd: list[float]) -> None:
    frame = pd.DataFrame({"layer": "l", "neuron": range(len(wd)), "wd": wd})
    for column in ("single", "double"):
        figure = figure_wd_by_layer(frame, column=column)
        assert not overlapping(figure)
        assert not outside(figure)


def test_neurons_without_wd_are_counted_and_whole_layers_named() -> None:
    frame = pd.concat([layer_scores(0), layer_scores(1)])
    frame.loc[frame["block"] == 1, "wd"] = np.nan
    assert "200 without WD left out, 1 whole layers" in caption_of(figure_wd_by_layer(frame))
    with pytest.raises(InvalidInput, match=r"WD.*\b0\b.*\b400\b"):
        figure_wd_by_layer(frame.assign(wd=np.nan))


def test_bad_tables_are_one_clear_line(many_scores: pd.DataFrame) -> None:
    with pytest.raises(InvalidInput, match=r"`scores`.*without.*`entangle score`"):
        figure_wd_by_layer(many_scores.drop(columns="wd"))
    with pytest.raises(InvalidInput, match=r"`top`.*\b2\.0\b"):
        plot_wd_ridge(many_scores, top=2.0)
    with pytest.raises(InvalidInput, match=r"`scores`.*row.*`entangle score`"):
        plot_wd_heatmap(many_scores.head(0))
