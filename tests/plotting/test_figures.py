import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from numpy.typing import NDArray

from entangle import plotting
from entangle.errors import InvalidInput, UnknownName
from entangle.plotting import (
    NeuronOutput,
    caption_of,
    drawn,
    figure_output_distributions,
    figure_top_and_typical,
    figure_wd_against_md,
    figure_wd_distribution,
    save_figure,
    top_and_typical,
)
from entangle.plotting.outputs import MAX_PANELS, layer_label
from tests.plotting.conftest import evidence
from tests.plotting.layout import crowded


def titles(figure: Figure) -> list[str]:
    return [ax.get_title(loc="left") for ax in figure.axes]


def step_edges(ax: Axes) -> NDArray[np.float64]:
    patch = next(patch for patch in ax.patches if isinstance(patch, StepPatch))
    return np.asarray(patch.get_data()[1])


def key(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


@pytest.fixture
def items(histogram: pd.DataFrame, outputs: NDArray[np.float64]) -> list[NeuronOutput]:
    item = NeuronOutput(histogram, float(outputs.mean()), float(outputs.std()), 0.4, 0.01)
    return [item, NeuronOutput(histogram, 1.0, 2.0, label="second"), item]


def test_wd_figure_has_one_panel_a_layer_with_common_bins_and_axes(
    many_scores: pd.DataFrame, layers: pd.DataFrame
) -> None:
    figure = figure_wd_distribution(many_scores, layers)
    assert titles(figure) == [f"block {block} · gate_proj" for block in range(4)]
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in figure.axes}) == 1
    for ax in figure.axes[1:]:
        np.testing.assert_array_equal(step_edges(ax), step_edges(figure.axes[0]))
    assert key(figure) == ["other neurons", "top 3 % by WD", "Gaussian floor (mean to 97.5 %)"]
    assert figure.get_supxlabel() == "Wasserstein distance to N(0, 1) (σ)"


def test_wd_figure_table_holds_full_names_and_every_neuron(
    many_scores: pd.DataFrame, layers: pd.DataFrame
) -> None:
    table = drawn(figure_wd_distribution(many_scores, layers, top=0.1))
    assert set(table["panel"]) == set(many_scores["layer"])
    bars = table[table["series"].isin(["other neurons", "top 10 % by WD"])]
    assert bars.groupby("panel")["y"].sum().tolist() == [200] * 4


def test_wd_figure_of_one_layer_has_the_full_legend(
    scores: pd.DataFrame, layers: pd.DataFrame
) -> None:
    figure = figure_wd_distribution(scores, layers, column="single")
    assert figure.get_figwidth() == 3.3
    assert not figure.legends
    assert figure.axes[0].get_legend() is not None


def test_wd_figure_refuses_a_layer_without_a_floor(
    many_scores: pd.DataFrame, layers: pd.DataFrame
) -> None:
    with pytest.raises(InvalidInput, match=r"`layers`.*\b0\b.*model\.layers\.0"):
        figure_wd_distribution(many_scores, layers.tail(3))
    with pytest.raises(InvalidInput, match=r"`layers`.*null_floor_high"):
        figure_wd_distribution(many_scores, layers.drop(columns="null_floor_high"))


def test_thousands_of_layers_are_refused_in_one_line(layers: pd.DataFrame) -> None:
    frame = pd.DataFrame(
        {"layer": [str(i) for i in range(3000)], "neuron": 0, "wd": 0.1, "md": 0.1}
    )
    with pytest.raises(InvalidInput, match=rf"`scores`.*\b1\b.*{MAX_PANELS}.*\b3,000\b"):
        figure_wd_distribution(frame, layers)
    with pytest.raises(InvalidInput, match=rf"`scores`.*\b1\b.*{MAX_PANELS}.*\b3,000\b"):
        figure_wd_against_md(frame)


def test_one_bad_layer_is_named(many_scores: pd.DataFrame, layers: pd.DataFrame) -> None:
    bad = many_scores["layer"] == "model.layers.2.mlp.gate_proj"
    many_scores.loc[bad, "wd"] = np.nan
    with pytest.raises(InvalidInput, match=r"'model\.layers\.2\.mlp\.gate_proj'.*\b0\b"):
        figure_wd_distribution(many_scores, layers)


@pytest.mark.parametrize("top", [0.0, 1.5])
def test_top_is_checked_by_the_figures(
    many_scores: pd.DataFrame, layers: pd.DataFrame, top: float
) -> None:
    with pytest.raises(InvalidInput, match="`top`"):
        figure_wd_distribution(many_scores, layers, top=top)
    with pytest.raises(InvalidInput, match="`top`"):
        figure_wd_against_md(many_scores, top=top)


def test_outputs_share_a_standardised_axis(items: list[NeuronOutput]) -> None:
    figure = figure_output_distributions(items)
    assert len(figure.axes) == 3
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in figure.axes}) == 1
    assert titles(figure)[:2] == ["WD = 0.400 ± 0.010\u00a0σ", "second"]
    assert key(figure) == ["output", "fitted Gaussian"]
    assert "± standard error" in caption_of(figure)


def test_heavy_tails_are_on_a_log_scale() -> None:
    wide = pd.DataFrame({"left": [-1.0, 1.0, 29.0], "right": [1.0, 29.0, 30.0]})
    item = NeuronOutput(wide.assign(count=[900, 50, 50]), 0.0, 1.0, layer="block 1 · up_proj")
    figure = figure_output_distributions([item, item])
    assert {ax.get_yscale() for ax in figure.axes} == {"log"}
    assert figure.legends[0].get_title().get_text() == "block 1 · up_proj"
    plain = figure_output_distributions([item, item], log=False)
    assert {ax.get_yscale() for ax in plain.axes} == {"linear"}
    pd.testing.assert_frame_equal(drawn(figure), drawn(plain))


def test_outputs_in_their_own_units_keep_their_axes(items: list[NeuronOutput]) -> None:
    figure = figure_output_distributions(items[:2], standardized=False, column="single")
    assert figure.axes[0].get_xlim() != figure.axes[1].get_xlim()
    assert all("model units" in ax.get_xlabel() for ax in figure.axes)


def test_outputs_of_none_or_too_many_are_refused(items: list[NeuronOutput]) -> None:
    with pytest.raises(InvalidInput, match=r"`items`.*\b1\b.*\b40\b.*\b0\b"):
        figure_output_distributions([])
    with pytest.raises(InvalidInput, match=r"`items`.*\b300\b"):
        figure_output_distributions(items * 100)


def test_a_constant_neuron_is_named(items: list[NeuronOutput], histogram: pd.DataFrame) -> None:
    constant = NeuronOutput(histogram, 1.0, 0.0, label="block 0 · up_proj, neuron 5")
    with pytest.raises(InvalidInput, match=r"\b0\b.*up_proj.*\b5\b"):
        figure_output_distributions([*items, constant])


def test_neuron_output_takes_the_row(scores: pd.DataFrame, histogram: pd.DataFrame) -> None:
    row = scores.iloc[17]
    item = NeuronOutput.of(row, histogram)
    assert (item.mean, item.std, item.wd, item.wd_se) == tuple(row[["mean", "std", "wd", "wd_se"]])
    assert item.label == "block 1 · gate_proj, neuron\u00a017"
    with pytest.raises(InvalidInput, match=r"`scores`.*std.*`entangle score`"):
        NeuronOutput.of(row.drop("std"), histogram)


def test_layer_label_falls_back_to_the_full_name(scores: pd.DataFrame) -> None:
    scores["block"] = pd.NA
    assert layer_label(scores.iloc[0]) == "model.layers.1.mlp.gate_proj"
    assert layer_label(scores.drop(columns=["block", "projection"]).iloc[0]).startswith("model.")


def test_top_and_typical_are_the_largest_and_the_median(flagged: pd.DataFrame) -> None:
    top, typical = top_and_typical(flagged)
    assert top["wd"] == flagged["wd"].max()
    distances = (flagged["wd"] - flagged["wd"].median()).abs()
    assert abs(typical["wd"] - flagged["wd"].median()) == distances.min()


@pytest.mark.parametrize("wd", [[0.1, 0.2], [0.2, 0.1], [0.1, 0.1]])
def test_top_and_typical_of_two_neurons_differ(scores: pd.DataFrame, wd: list[float]) -> None:
    top, typical = top_and_typical(scores.head(2).assign(wd=wd))
    assert {top["neuron"], typical["neuron"]} == {0, 1}


def test_a_single_neuron_has_no_typical_one(scores: pd.DataFrame) -> None:
    with pytest.raises(InvalidInput, match=r"`scores`.*\b2\b.*neurons"):
        top_and_typical(scores.head(1))


def test_top_and_typical_figure_asks_for_the_two_histograms(
    flagged: pd.DataFrame, histogram: pd.DataFrame
) -> None:
    asked: list[tuple[str, int]] = []

    def histogram_of(layer: str, neuron: int) -> pd.DataFrame:
        asked.append((layer, neuron))
        return histogram

    figure = figure_top_and_typical(flagged, histogram_of)
    neurons = [row["neuron"] for row in top_and_typical(flagged)]
    assert asked == [("model.layers.1.mlp.gate_proj", neuron) for neuron in neurons]
    assert titles(figure)[0].startswith(f"top neuron {neurons[0]}\nWD = ")
    assert titles(figure)[1].startswith(f"typical neuron {neurons[1]}\nWD = ")
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()
    assert (
        "197 neurons in model.layers.1.mlp.gate_proj. 3 left out: 2 constant, 1 nan."
        in caption_of(figure)
    )


def test_md_figure_states_the_bootstrap_once(many_scores: pd.DataFrame) -> None:
    figure = figure_wd_against_md(many_scores, n_boot=30, seed=9)
    assert "95 % bootstrap, 30 resamples, seed 9" in caption_of(figure)
    assert all(ax.texts[0].get_text().startswith("ρ = ") for ax in figure.axes)
    assert set(drawn(figure)["neuron"]) == set(range(200))


@pytest.mark.parametrize("column", ["single", "double"])
@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_no_panel_text_overlaps_another(n: int, column: str, items: list[NeuronOutput]) -> None:
    chosen = [
        NeuronOutput(i.histogram, i.mean, i.std, 0.4, 0.01, "block 12 · gate_proj, neuron 1234")
        for i in (items * 3)[:n]
    ]
    figure = figure_output_distributions(chosen, column=column)  # type: ignore[arg-type]
    assert crowded(figure) == []


def test_many_figures_leave_nothing_behind(items: list[NeuronOutput]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(25):
            figure_output_distributions(items[:1])


def test_figures_look_the_same_saved_inside_or_outside_any_style(
    items: list[NeuronOutput], tmp_path: Path
) -> None:
    figure = figure_output_distributions(items)
    plain, *_ = save_figure(figure, tmp_path / "plain", formats=["png"])
    again = figure_output_distributions(items)
    with mpl.rc_context({"xtick.labelsize": 20, "ytick.major.size": 30, "font.size": 30}):
        other, *_ = save_figure(again, tmp_path / "other", formats=["png"])
    assert plain.read_bytes() == other.read_bytes()


def test_notes_cover_no_data_in_small_multiples(
    many_scores: pd.DataFrame, layers: pd.DataFrame, items: list[NeuronOutput]
) -> None:
    for figure in (
        figure_wd_distribution(many_scores, layers, column="single"),
        figure_wd_against_md(many_scores, n_boot=20, column="single"),
        figure_output_distributions(items, column="single"),
    ):
        figure.draw_without_rendering()
        for ax in figure.axes:
            box = ax.texts[0].get_window_extent()
            for patch in ax.patches:
                if isinstance(patch, StepPatch):
                    values, edges = map(np.asarray, patch.get_data()[:2])
                    corners = np.column_stack([np.append(edges[:-1], edges[1:]), [*values] * 2])
                    assert not box.count_contains(ax.transData.transform(corners))
            for points in ax.collections:
                offsets = np.asarray(points.get_offsets())
                assert not box.count_contains(ax.transData.transform(offsets))


def test_evidence_takes_the_comparison_and_the_control_nearest_to_their_bars() -> None:
    numbers = evidence()
    table = plotting.drawn(plotting.figure_evidence(numbers))
    a = table[table["panel"] == "a"].set_index(["series", "model"])
    assert a.loc[("main comparison", "one"), "x"] == 3.0
    assert a.loc[("main comparison", "two"), "x"] == 0.9
    assert a.loc[("hardest control", "one"), "x"] == 0.9
    assert ("hardest control", "two") not in a.index
    b = table[table["panel"] == "b"]
    assert sorted(b["x"]) == [0.1, 0.6]
    assert set(b["model"]) == {"one"}
    only = plotting.drawn(plotting.figure_evidence(numbers, claims=["b"]))
    assert set(only["panel"]) == {"b"}
    shown = numbers[numbers["role"] == "shown"]
    with pytest.raises(InvalidInput, match="number that decides"):
        plotting.figure_evidence(shown)
    with pytest.raises(UnknownName):
        plotting.figure_evidence(numbers, claims=["c"])
