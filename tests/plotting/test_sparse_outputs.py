import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from entangle.errors import InvalidInput, UnknownName
from entangle.plotting import (
    caption_of,
    dense_output,
    drawn,
    figure_recovery,
    figure_sparse_outputs,
    plot_sparse_output,
)
from tests.plotting.decomposition_frames import LAYER, TOP, TYPICAL, Decomposed


def titles(axes: list[Axes]) -> list[str]:
    whole = [ax.get_title(loc="left") + ax.get_title() for ax in axes]
    return [title.replace("\u00a0", " ") for title in whole]


def header(figure: Figure) -> str:
    return caption_of(figure).replace("\u00a0", " ")


def test_dense_and_sparse_densities_are_of_the_same_tokens(decomposed: Decomposed) -> None:
    ax = plot_sparse_output(decomposed.outputs, neurons=decomposed.neurons, neuron=TOP, experts=4)
    steps = {p.get_label(): p.get_data() for p in ax.patches if isinstance(p, StepPatch)}
    assert list(steps) == ["dense", "sparse"]
    row = decomposed.neurons[decomposed.neurons["neuron"] == TOP].iloc[0]
    for kind, (density, edges, _) in steps.items():
        np.testing.assert_allclose(np.sum(density * np.diff(edges)), 1.0)
        rows = decomposed.outputs.query(
            f"neuron == {TOP} and experts == 4 and kind == '{kind}' and cluster == -1"
        )
        np.testing.assert_allclose(edges[:-1] * row["std"] + row["mean"], rows["left"])
        np.testing.assert_allclose(density * np.diff(edges), rows["count"] / rows["count"].sum())


def test_a_panel_states_its_distance_and_improvement(decomposed: Decomposed) -> None:
    ax = plot_sparse_output(
        decomposed.outputs, neurons=decomposed.neurons, neuron=TOP, experts=4, role="top"
    )
    row = decomposed.neurons.query(f"neuron == {TOP} and experts == 4").iloc[0]
    numbers = f"W₁ to dense {row['output_wd']:.3f} σ, RI {row['ri']:.2f}"
    assert titles([ax]) == [f"top neuron {TOP}, 4 experts\n{numbers}"]


def test_numbers_that_are_missing_are_not_stated(decomposed: Decomposed) -> None:
    neurons = decomposed.neurons.assign(ri=np.nan)
    ax = plot_sparse_output(decomposed.outputs, neurons=neurons, neuron=TOP, experts=4)
    assert "RI" not in titles([ax])[0]
    assert "W₁ to dense" in titles([ax])[0]


def test_figure_has_a_row_a_neuron_and_the_extreme_experts(decomposed: Decomposed) -> None:
    figure = figure_sparse_outputs(decomposed.outputs, decomposed.neurons)
    assert [title.split("\n")[0] for title in titles(figure.axes)] == [
        f"top neuron {TOP}, 1 expert", f"top neuron {TOP}, 16 experts",
        f"typical neuron {TYPICAL}, 1 expert", f"typical neuron {TYPICAL}, 16 experts",
    ]  # fmt: skip
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in figure.axes}) == 1
    said = header(figure)
    assert f"{LAYER}, 90 % zeros, n = 4,000 tokens" in said
    assert f"top neuron {TOP}: WD = 0.450 σ" in said


def test_recovery_has_a_panel_a_number_of_experts(decomposed: Decomposed) -> None:
    figure = figure_recovery(decomposed.outputs, decomposed.neurons)
    named = [title.split("\n")[0] for title in titles(figure.axes)]
    assert named == ["1 expert", "2 experts", "4 experts", "8 experts", "16 experts"]
    assert set(drawn(figure)["series"]) == {"dense", "sparse", "Gaussian"}
    chosen = figure_recovery(decomposed.outputs, decomposed.neurons, neuron=TYPICAL, experts=[8])
    assert len(chosen.axes) == 1
    assert f"typical neuron {TYPICAL}" in header(chosen)


def test_one_neuron_is_a_figure(decomposed: Decomposed) -> None:
    outputs = decomposed.outputs[decomposed.outputs["neuron"] == TYPICAL]
    neurons = decomposed.neurons[decomposed.neurons["neuron"] == TYPICAL]
    assert len(figure_sparse_outputs(outputs, neurons).axes) == 2


def test_dense_output_is_that_of_the_largest_wd(decomposed: Decomposed) -> None:
    histogram, item = dense_output(decomposed.outputs, decomposed.neurons)
    assert (item.neuron, histogram["count"].sum()) == (TOP, 4000)
    assert set(histogram["kind"]) == {"dense"}
    assert dense_output(decomposed.outputs, decomposed.neurons, neuron=TYPICAL)[1].neuron == TYPICAL


def test_bad_requests_are_one_clear_line(decomposed: Decomposed) -> None:
    outputs, neurons = decomposed.outputs, decomposed.neurons
    with pytest.raises(InvalidInput, match=r"`neuron`.*\b7\b.*\b21\b.*\bNone\b"):
        plot_sparse_output(outputs, neurons=neurons, experts=4)
    with pytest.raises(InvalidInput, match=r"`experts`.*\b1\b.*\b2\b.*\b4\b.*\b8\b.*\b16\b.*\b3\b"):
        figure_recovery(outputs, neurons, experts=[3])
    with pytest.raises(UnknownName, match="'model'"):
        figure_recovery(outputs, neurons, layer="model")
    with pytest.raises(InvalidInput, match=r"`experts`.*\[\]"):
        figure_recovery(outputs, neurons, experts=[])
    with pytest.raises(InvalidInput, match=r"`chosen`.*\[\]"):
        figure_sparse_outputs(outputs, neurons, chosen=[])
    with pytest.raises(InvalidInput, match=r"`outputs`.*kind.*`entangle decompose`"):
        figure_recovery(outputs.drop(columns="kind"), neurons)
    with pytest.raises(InvalidInput, match=r"`neurons`.*output_wd"):
        figure_recovery(outputs, neurons.drop(columns="output_wd"))
    with pytest.raises(InvalidInput, match=r"`std`.*\b0\b"):
        figure_recovery(outputs, neurons.assign(std=0.0))


def test_frames_are_not_written_into(decomposed: Decomposed) -> None:
    before: pd.DataFrame = decomposed.outputs.copy(deep=True)
    figure_recovery(decomposed.outputs, decomposed.neurons)
    pd.testing.assert_frame_equal(decomposed.outputs, before)
