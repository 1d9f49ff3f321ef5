import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.patches import StepPatch
from numpy.typing import NDArray

from entangle.errors import InvalidInput, UnknownName
from entangle.plotting import caption_of, drawn, figure_experts, plot_experts
from entangle.plotting.summaries import MOST_NAMED
from tests.plotting.decomposition_frames import TOP, TYPICAL, Decomposed

Steps = list[tuple[str, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]]


def steps(ax: Axes) -> Steps:
    """Label, heights, edges and baselines of all layers of the stack, from below."""
    found = [p for p in ax.patches if isinstance(p, StepPatch)]
    return [(str(p.get_label()), *(np.asarray(part) for part in p.get_data())) for p in found]  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_experts_lie_on_one_another_and_add_up(decomposed: Decomposed, kind: str) -> None:
    ax = plot_experts(
        decomposed.outputs, neurons=decomposed.neurons, kind=kind, neuron=TOP, experts=8
    )
    stack = steps(ax)
    labels = [label for label, *_ in stack]
    assert sum(label.startswith("expert ") for label in labels) == MOST_NAMED
    assert labels.count("2 others") == 1
    orders = [patch.get_zorder() for patch in ax.patches if isinstance(patch, StepPatch)]
    assert orders == sorted(orders, reverse=True)  # the lower band in front: no gap between two
    figure = ax.get_figure(root=True)
    assert figure is not None
    table = drawn(figure)
    base = np.zeros(len(stack[0][1]))
    for series, (label, heights, _, baseline) in zip(table["series"].unique(), stack, strict=True):
        assert not baseline.any()
        assert not label.startswith("expert") or label == series
        np.testing.assert_allclose(heights - base, table.query(f"series == '{series}'")["y"])
        base = heights
    rows = decomposed.outputs.query(
        f"neuron == {TOP} and experts == 8 and kind == '{kind}' and cluster == -1"
    )
    share = rows["count"].to_numpy() / rows["count"].sum()
    np.testing.assert_allclose(base * np.diff(stack[0][2]), share)


def test_order_is_that_of_the_dense_means_in_both_panels(decomposed: Decomposed) -> None:
    rows = decomposed.outputs.query(
        f"neuron == {TOP} and experts == 4 and kind == 'dense' and cluster >= 0"
    )
    centers = (rows["left"] + rows["right"]) / 2
    sums = (rows["count"] * centers).groupby(rows["cluster"]).sum()
    means = sums / rows["count"].groupby(rows["cluster"]).sum()
    expected = [f"expert {i}" for i in means.sort_values().index]
    figure = figure_experts(decomposed.outputs, decomposed.neurons, experts=4)
    dense, sparse = figure.axes
    assert [label for label, *_ in steps(dense)] == expected
    assert [label for label, *_ in steps(sparse)] == expected
    (key,) = figure.legends
    assert [text.get_text() for text in key.get_texts()] == expected
    colors = [str(patch.get_facecolor()) for patch in dense.patches if isinstance(patch, StepPatch)]
    assert len(set(colors)) == 4


def test_the_hump_is_enlarged_where_there_is_one(decomposed: Decomposed) -> None:
    def insets(neuron: int) -> int:
        figure = figure_experts(decomposed.outputs, decomposed.neurons, neuron=neuron)
        return sum(len(ax.child_axes) for ax in figure.axes)

    assert (insets(TOP), insets(TYPICAL)) == (2, 0)


def test_the_largest_number_of_experts_is_the_default(decomposed: Decomposed) -> None:
    figure = figure_experts(decomposed.outputs, decomposed.neurons)
    assert drawn(figure)["series"].nunique() == 16
    said = caption_of(figure).replace("\u00a0", " ")
    assert "16 experts of 250 to 250 tokens" in said
    assert f"neuron {TOP} of" in said


def test_an_empty_cluster_is_no_expert(decomposed: Decomposed) -> None:
    outputs = decomposed.outputs
    empty = outputs["experts"].eq(4) & outputs["cluster"].eq(2)
    figure = figure_experts(outputs[~empty], decomposed.neurons, experts=4)
    assert drawn(figure)["series"].nunique() == 3


def test_legend_names_all_experts_or_those_far_out(decomposed: Decomposed) -> None:
    for k, named in ((4, 4), (16, MOST_NAMED + 1)):
        ax = plot_experts(decomposed.outputs, neurons=decomposed.neurons, neuron=TOP, experts=k)
        legend = ax.get_legend()
        assert legend is not None
        assert len(legend.get_texts()) == named


def test_what_cannot_be_decomposed_is_refused(decomposed: Decomposed) -> None:
    outputs, neurons = decomposed.outputs, decomposed.neurons
    with pytest.raises(InvalidInput, match=r"\b2\b.*\b1\b.*`entangle decompose --experts 1,4,16`"):
        figure_experts(outputs, neurons, experts=1)
    with pytest.raises(UnknownName, match="'denser'"):
        plot_experts(outputs, neurons=neurons, neuron=TOP, experts=2, kind="denser")
    moved = outputs["cluster"].eq(0) & outputs["experts"].eq(2)
    other = outputs.assign(left=outputs["left"] + 0.01 * moved)
    with pytest.raises(InvalidInput, match=rf"`outputs`.*{TOP}"):
        figure_experts(other, neurons, experts=2, neuron=TOP)
