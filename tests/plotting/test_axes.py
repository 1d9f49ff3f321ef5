"""One contract for all axes-level functions, then what each of them shows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle, StepPatch
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from scipy import stats

from entangle.errors import InvalidInput
from entangle.plotting import (
    PALETTE,
    drawn,
    paper_style,
    plot_ablation,
    plot_output_distribution,
    plot_perplexity,
    plot_wd_against_md,
    plot_wd_distribution,
)
from entangle.plotting.outputs import wd_text
from tests.plotting.ablation_frames import ablation_frame

Draw = Callable[..., Axes]
Case = tuple[Draw, pd.DataFrame, dict[str, Any]]
FLOOR = (0.013, 0.019)
TEXT = "WikiText-2, n = 152 windows"
UNITS = ("(σ)", "(× dense)")


@pytest.fixture(params=["wd", "output", "md", "sparsity", "nonzeros", "ablation"])
def case(
    request: pytest.FixtureRequest,
    flagged: pd.DataFrame,
    histogram: pd.DataFrame,
    comparison: pd.DataFrame,
) -> Case:
    """An axes-level function, the frame it takes first, and the other arguments it needs."""
    cases: dict[str, Case] = {
        "wd": (plot_wd_distribution, flagged, {"floor": FLOOR}),
        "output": (plot_output_distribution, histogram, {"mean": -0.5, "std": 2.4}),
        "md": (plot_wd_against_md, flagged, {"n_boot": 20}),
        "sparsity": (plot_perplexity, comparison, {"text": TEXT}),
        "nonzeros": (plot_perplexity, comparison, {"text": TEXT, "x": "nonzeros"}),
        "ablation": (plot_ablation, ablation_frame(), {"text": TEXT}),
    }
    return cases[request.param]


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


def test_contract_draws_into_the_axes_given_and_returns_it(case: Case) -> None:
    draw, frame, options = case
    first, second = Figure().subplots(1, 2)
    assert draw(frame, ax=first, **options) is first
    assert first.has_data()
    assert not second.has_data()


def test_contract_makes_a_new_figure_each_time(case: Case) -> None:
    draw, frame, options = case
    one, two = draw(frame, **options), draw(frame, **options)
    assert one.figure is not two.figure
    assert one.figure.axes == [one]


def test_contract_never_draws_into_the_current_axes(case: Case) -> None:
    draw, frame, options = case
    current = plt.figure().subplots()
    draw(frame, **options)
    assert plt.get_fignums() == [plt.gcf().number]
    assert not current.has_data()
    plt.close("all")


def test_contract_leaves_settings_and_pyplot_alone(case: Case) -> None:
    draw, frame, options = case
    before = dict(rcParams)
    figure_of(draw(frame, **options)).draw_without_rendering()
    assert dict(rcParams) == before
    assert plt.get_fignums() == []


def test_contract_does_not_modify_its_input(case: Case) -> None:
    draw, frame, options = case
    before = frame.copy(deep=True)
    draw(frame, **options)
    pd.testing.assert_frame_equal(frame, before)


def test_contract_takes_everything_after_the_data_by_keyword(case: Case) -> None:
    draw, frame, _ = case
    with pytest.raises(TypeError, match="positional argument"):
        draw(frame, 0.5)


def test_contract_labels_both_axes_with_units_and_writes_n(case: Case) -> None:
    draw, frame, options = case
    ax = draw(frame, **options)
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert any(unit in ax.get_xlabel() + ax.get_ylabel() for unit in UNITS)
    legend = ax.get_legend()
    assert legend is not None
    assert "n = " in "".join([*legend_texts(ax), legend.get_title().get_text()])
    without = draw(frame, legend=False, **options)
    assert without.get_legend() is None
    assert any("n = " in text.get_text() for text in without.texts)


def test_contract_records_what_it_draws(case: Case) -> None:
    draw, frame, options = case
    ax = draw(frame, **options)
    table = drawn(figure_of(ax))
    assert list(table.columns[:4]) == ["panel", "series", "x", "y"]
    labels = set(ax.get_legend_handles_labels()[1])
    assert labels - set(table["series"]) <= {"Gaussian floor (mean to 97.5 %)"}


def test_contract_legend_covers_no_data(case: Case) -> None:
    draw, frame, options = case
    with paper_style():
        ax = draw(frame, **options)
        figure_of(ax).draw_without_rendering()
    legend = ax.get_legend()
    assert legend is not None
    box = Bbox.intersection(legend.get_window_extent(), ax.get_window_extent())
    if box is None:
        return  # the legend is not on the panel
    for line in ax.get_lines():
        if line.get_transform() == ax.transData:
            assert not box.count_contains(ax.transData.transform(points_of(line)))
    for patch in steps(ax).values():
        values, edges, _ = step_data(patch)
        corners = np.column_stack([np.append(edges[:-1], edges[1:]), np.tile(values, 2)])
        assert not box.count_contains(ax.transData.transform(corners))
    for points in ax.collections:
        assert not box.count_contains(ax.transData.transform(points.get_offsets()))


def test_contract_refuses_missing_columns_and_empty_frames(case: Case) -> None:
    draw, frame, options = case
    name = next(name for name in ("count", "ratio", "wd", "n_rows") if name in frame)
    with pytest.raises(InvalidInput, match=rf"without.*{name}"):
        draw(frame.drop(columns=name), **options)
    with pytest.raises(InvalidInput, match="got none"):
        draw(frame.head(0), **options)


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
        "Gaussian floor 0.0130 σ (97.5 %: 0.0190 σ)",
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
