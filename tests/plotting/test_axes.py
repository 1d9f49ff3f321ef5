"""What the panels of WD, outputs and mapping difficulty show, by their artists."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle, StepPatch
from numpy.typing import NDArray
from scipy import stats

from entangle.errors import InvalidInput
from entangle.plotting import (
    PALETTE,
    drawn,
    plot_output_distribution,
    plot_wd_against_md,
    plot_wd_distribution,
)
from entangle.plotting.outputs import wd_text

FLOOR = (0.013, 0.019)


def figure_of(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def points_of(line: Line2D) -> NDArray[np.float64]:
    return np.column_stack([np.asarray(line.get_xdata()), np.asarray(line.get_ydata())])


def steps(ax: Axes) -> dict[object, StepPatch]:
    return {patch.get_label(): patch for patch in ax.patches if isinstance(patch, StepPatch)}


def step_data(patch: StepPatch) -> tuple[NDArray[np.float64], ...]:
    """Values (bins,), edges (bins + 1,), baseline (bins,)."""
    values, edges, baseline = patch.get_data()
    return np.asarray(values), np.asarray(edges), np.asarray(baseline)


def legend_texts(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_wd_bars_hold_every_neuron_once(scores: pd.DataFrame) -> None:
    bars = steps(plot_wd_distribution(scores, top=0.1, bins=20))
    others, edges, _ = step_data(bars["other neurons"])
    total, _, below_top = step_data(bars["top 10 % by WD"])
    expected, expected_edges = np.histogram(scores["wd"], 20)
    np.testing.assert_array_equal(edges, expected_edges)
    np.testing.assert_array_equal(below_top, others)
    np.testing.assert_array_equal(total, expected)
    assert others.sum() == 180


def test_wd_legend_states_counts_threshold_floor_and_what_was_left_out(
    flagged: pd.DataFrame,
) -> None:
    texts = legend_texts(plot_wd_distribution(flagged, floor=FLOOR, top=0.05))
    threshold = flagged["wd"].nlargest(10).min()
    assert texts == [
        "other neurons (n = 187)",
        f"top 5 % by WD (n = 10, WD ≥ {threshold:.3f} σ)",
        "Gaussian floor (0.0130 σ; 97.5 %: 0.0190 σ)",
        "3 left out: 2 constant, 1 nan",
    ]


def test_wd_floor_is_a_line_and_a_band(scores: pd.DataFrame) -> None:
    ax = plot_wd_distribution(scores, floor=FLOOR)
    band = next(patch for patch in ax.patches if isinstance(patch, Rectangle))
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx(FLOOR)
    line = next(line for line in ax.get_lines() if "floor" in str(line.get_label()))
    assert points_of(line)[:, 0].tolist() == [0.013, 0.013]
    assert to_hex(line.get_color()) == PALETTE["floor"]


def test_wd_rug_marks_each_top_neuron(scores: pd.DataFrame) -> None:
    ax = plot_wd_distribution(scores, top=0.05)
    rug = next(line for line in ax.get_lines() if line.get_marker() == "|")
    assert sorted(points_of(rug)[:, 0]) == sorted(scores["wd"].nlargest(10))
    table = drawn(figure_of(ax))
    assert set(table["neuron"].dropna()) == set(scores.nlargest(10, "wd")["neuron"])


@pytest.mark.parametrize("floor", [(0.02, 0.01), (-0.1, 0.1), (np.nan, 0.1), (0.1, np.inf)])
def test_wd_refuses_an_impossible_floor(scores: pd.DataFrame, floor: tuple[float, float]) -> None:
    with pytest.raises(InvalidInput, match="`floor`"):
        plot_wd_distribution(scores, floor=floor)


def test_wd_refuses_bins_that_leave_neurons_out(scores: pd.DataFrame) -> None:
    with pytest.raises(InvalidInput, match=r"`bins`.*WD"):
        plot_wd_distribution(scores, bins=np.array([0.0, 0.01]))


def test_wd_of_equal_neurons_is_drawn(scores: pd.DataFrame) -> None:
    bars = steps(plot_wd_distribution(scores.assign(wd=0.07)))
    assert sum(np.sum(step_data(patch)[0] > 0) for patch in bars.values()) == 2


def test_output_density_is_drawn_from_the_counts(
    histogram: pd.DataFrame, outputs: NDArray[np.float64]
) -> None:
    ax = plot_output_distribution(histogram, mean=outputs.mean(), std=outputs.std())
    values, edges, _ = step_data(steps(ax)["output"])
    expected, _ = np.histogram((outputs - outputs.mean()) / outputs.std(), edges, density=True)
    np.testing.assert_allclose(values, expected, rtol=0.02, atol=2e-3)  # outputs on an edge
    assert np.sum(values * np.diff(edges)) == pytest.approx(1.0)


@pytest.mark.parametrize("standardized", [True, False])
def test_output_gaussian_has_the_fitted_mean_and_std(
    histogram: pd.DataFrame, standardized: bool
) -> None:
    ax = plot_output_distribution(histogram, mean=-0.5, std=2.4, standardized=standardized)
    (line,) = ax.get_lines()
    x, y = points_of(line).T
    center, scale = (0.0, 1.0) if standardized else (-0.5, 2.4)
    np.testing.assert_allclose(y, stats.norm.pdf(x, center, scale))
    assert ax.get_xlim() == (x[0], x[-1])
    assert x[0] <= center - 4 * scale
    assert x[-1] >= center + 4 * scale


def test_output_title_and_legend_state_the_numbers(histogram: pd.DataFrame) -> None:
    ax = plot_output_distribution(
        histogram, mean=-0.5, std=2.4, wd=0.412, wd_se=0.0101, label="neuron 7"
    )
    title = ax.get_title() + ax.get_title(loc="left")
    assert title == "neuron 7\nWD = 0.412 ± 0.010\u00a0σ"
    assert legend_texts(ax) == [
        "output (n = 4,000 tokens)",
        "fitted Gaussian (mean −0.5, std 2.4)",
        "±: standard error",
    ]


def test_output_beyond_the_axis_is_stated(histogram: pd.DataFrame) -> None:
    first = histogram.index == 0
    frame = histogram.assign(
        left=histogram["left"].where(~first, -np.inf), count=histogram["count"] + 1000 * first
    )
    ax = plot_output_distribution(frame, mean=-0.5, std=2.4)
    assert legend_texts(ax)[-1] == "20 % off axis"


def test_output_heavy_tails_widen_the_axis() -> None:
    frame = pd.DataFrame(
        {"left": [-1.0, 1.0, 9.0], "right": [1.0, 9.0, 10.0], "count": [900, 50, 50]}
    )
    low, high = plot_output_distribution(frame, mean=0.0, std=1.0).get_xlim()
    assert low == -4.0
    assert 9.9 < high <= 10.0


def test_output_roles_have_their_colours(histogram: pd.DataFrame) -> None:
    ax = plot_output_distribution(histogram, mean=-0.5, std=2.4, role="top")
    assert to_hex(steps(ax)["top neuron"].get_facecolor()) == PALETTE["top"]


@pytest.mark.parametrize(
    ("wd", "se", "text"),
    [
        (0.412, 0.0101, "WD = 0.412 ± 0.010\u00a0σ"),
        (0.412, 0.3, "WD = 0.412 ± 0.300\u00a0σ"),
        (0.00421, 0.00031, "WD = 0.00421 ± 0.00031\u00a0σ"),
        (0.412, 0.0, "WD = 0.412 ± 0.000\u00a0σ"),
        (0.412, float("nan"), "WD = 0.412\u00a0σ"),
        (0.412, None, "WD = 0.412\u00a0σ"),
        (None, None, ""),
        (float("nan"), 0.1, ""),
    ],
)
def test_wd_text(wd: float | None, se: float | None, text: str) -> None:
    assert wd_text(wd, se) == text


def scatters(ax: Axes) -> dict[object, PathCollection]:
    return {c.get_label(): c for c in ax.collections if isinstance(c, PathCollection)}


def test_md_scatter_shows_every_neuron_with_the_top_marked(scores: pd.DataFrame) -> None:
    points = scatters(plot_wd_against_md(scores, top=0.05, n_boot=20))
    top = scores["wd"].nlargest(10).index
    shown = np.asarray(points["top 5 % by WD"].get_offsets())
    expected = scores.loc[scores.index.isin(top), ["md", "wd"]].to_numpy()
    np.testing.assert_array_equal(shown, expected)
    assert len(np.asarray(points["other neurons"].get_offsets())) == 190


def test_md_legend_states_spearman_interval_and_seed(scores: pd.DataFrame) -> None:
    text = "\n".join(legend_texts(plot_wd_against_md(scores, n_boot=1200, seed=3)))
    rho = stats.spearmanr(scores["md"], scores["wd"]).statistic
    assert f"Spearman ρ = {rho:.2f} [" in text
    assert "95 % bootstrap, 1,200 resamples, seed 3" in text


def test_md_without_mapping_difficulty_names_the_option(scores: pd.DataFrame) -> None:
    with pytest.raises(InvalidInput, match=r"`entangle score`.*--no-md"):
        plot_wd_against_md(scores.assign(md=np.nan))
