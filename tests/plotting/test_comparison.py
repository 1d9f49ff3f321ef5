"""What the figures of a comparison show, by their artists."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from entangle.errors import InvalidInput, UnknownName
from entangle.plotting import (
    caption_of,
    drawn,
    figure_comparison,
    figure_expansion,
    paper_style,
    plot_costs,
    plot_perplexity,
)
from entangle.plotting.comparison import CEILING
from entangle.plotting.style import METHOD_PALETTE, SPARE_COLORS
from tests.plotting.conftest import expanded, model
from tests.plotting.layout import crowded

TEXT = "WikiText-2, n = 152 windows"


def lines(ax: Axes) -> dict[str, Line2D]:
    found = {str(line.get_label()): line for line in ax.get_lines()}
    return {label: line for label, line in found.items() if not label.startswith("_")}


def points(line: Line2D) -> NDArray[np.float64]:
    return np.column_stack([np.asarray(line.get_xdata()), np.asarray(line.get_ydata())])


def bars(ax: Axes) -> NDArray[np.float64]:
    """Ends of all bars, shape (bars, 2, 2)."""
    found = [c.get_segments() for c in ax.collections if isinstance(c, LineCollection)]
    return np.concatenate([np.asarray(segments) for segments in found if len(segments)])


def words(ax: Axes) -> str:
    legend = ax.get_legend()
    assert legend is not None
    return legend.get_title().get_text().replace("\n", "; ")


def test_a_curve_is_the_ratio_at_each_sparsity(comparison: pd.DataFrame) -> None:
    ax = plot_perplexity(comparison)
    found = lines(ax)
    assert list(found) == ["magnitude", "Wanda", "SparseGPT", "expansion, k = 16", "dense"]
    expected = [[50, 1.3], [60, 1.81], [70, 3.78], [80, 19.4]]
    np.testing.assert_allclose(points(found["expansion, k = 16"]), expected)
    assert ax.get_yscale() == "log"
    assert ax.get_xscale() == "linear"
    assert list(ax.get_xticks()) == [50, 60, 70, 80]


def test_bars_are_the_intervals(comparison: pd.DataFrame) -> None:
    rows = comparison[comparison["method"].isin(["dense", "sparsegpt"])]
    expected = [
        [[100 * s, low], [100 * s, high]]
        for s, low, high in rows[["sparsity", "ratio_low", "ratio_high"]].to_numpy()[1:]
    ]
    np.testing.assert_allclose(bars(plot_perplexity(rows)), expected)


def test_a_model_without_an_interval_has_a_point_and_no_bar(comparison: pd.DataFrame) -> None:
    rows = comparison[comparison["method"].isin(["dense", "sparsegpt"])].copy()
    rows.loc[rows["sparsity"] == 0.5, ["ratio_low", "ratio_high"]] = np.nan
    ax = plot_perplexity(rows)
    assert len(bars(ax)) == 3
    assert len(points(lines(ax)["SparseGPT"])) == 4


@pytest.mark.parametrize("x", ["flops", "nonzeros", "bytes"])
def test_costs_are_multiples_of_dense(comparison: pd.DataFrame, x: str) -> None:
    ax = plot_perplexity(comparison, x=x)
    rows = comparison[comparison["method"] == "sparsegpt"].sort_values(x)
    np.testing.assert_allclose(points(lines(ax)["SparseGPT"]), rows[[x, "ratio"]].to_numpy())
    np.testing.assert_allclose(points(lines(ax)["dense"]), [[1.0, 1.0]])
    assert ax.get_xscale() == ("linear" if x == "flops" else "log")


def test_plain_curves_alone_are_joined_to_the_dense_model(comparison: pd.DataFrame) -> None:
    ax = plot_perplexity(comparison, x="nonzeros")
    table = drawn(ax.get_figure(root=True))  # type: ignore[arg-type]
    joined = table[table["series"].str.endswith(", to dense")]
    assert set(joined["series"]) == {f"{n}, to dense" for n in ("magnitude", "Wanda", "SparseGPT")}
    ends = joined[joined["series"] == "SparseGPT, to dense"][["x", "y"]].to_numpy()
    np.testing.assert_allclose(ends, [[0.7, 1.4], [1.0, 1.0]])


def test_the_legend_says_in_words_what_is_shown_and_what_is_not(comparison: pd.DataFrame) -> None:
    said = words(plot_perplexity(comparison, text=TEXT, x="flops"))
    extra = 100 * 0.007 / (0.4 + 0.6 * 0.2)
    assert said == "; ".join(
        [
            f"evaluated on {TEXT}",
            "dense perplexity 20",
            "bars: 95 % paired bootstrap over windows",
            f"k experts a layer (router: up to {extra:.2g} % more FLOPs)",
            "3 above 100 × dense, off the axis",
            "1 left out: no finite perplexity",
        ]
    )


def test_the_legend_says_no_more_than_it_knows(comparison: pd.DataFrame) -> None:
    rows = comparison[comparison["method"] == "sparsegpt"].head(3)
    said = words(plot_perplexity(rows))
    assert said == "bars: 95 % paired bootstrap over windows"
    expansion = comparison[comparison["method"] == "expansion"]
    assert "k experts a layer;" in words(plot_perplexity(expansion)) + ";"


def test_models_above_the_ceiling_are_off_the_axis_but_in_the_table(
    comparison: pd.DataFrame,
) -> None:
    ax = plot_perplexity(comparison)
    assert ax.get_ylim()[1] == CEILING
    table = drawn(ax.get_figure(root=True))  # type: ignore[arg-type]
    assert table["y"].max() == 7041.0
    assert np.isfinite(table["y"]).all()
    assert len(table) == len(comparison) - 1  # the infinite model; dense is a line


def test_models_all_above_the_ceiling_are_on_the_axis(comparison: pd.DataFrame) -> None:
    rows = comparison[comparison["ratio"].gt(CEILING) | comparison["method"].eq("dense")]
    ax = plot_perplexity(rows)
    assert ax.get_ylim()[1] > 7041.0
    assert "off the axis" not in words(ax)


@pytest.mark.parametrize("column", ["perplexity", "ratio", "nonzeros"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_models_that_cannot_be_placed_are_left_out(
    comparison: pd.DataFrame, column: str, value: float
) -> None:
    chosen = comparison["method"].eq("expansion") & comparison["sparsity"].eq(0.7)
    comparison.loc[chosen, column] = value
    ax = plot_perplexity(comparison, x="nonzeros")
    assert points(lines(ax)["expansion, k = 16"])[:, 1].tolist() == [19.4, 1.81, 1.3]
    assert "2 left out" in words(ax)


def test_too_few_models_are_refused(comparison: pd.DataFrame) -> None:
    for draw in (plot_perplexity, figure_comparison):
        with pytest.raises(InvalidInput, match=r"`comparison`.*\b2\b.*\b1\b.*\b1\b"):
            draw(comparison.head(1))
        with pytest.raises(InvalidInput, match=r"`comparison`.*\b0\b.*\b17\b"):
            draw(comparison.assign(ratio=np.nan))
        with pytest.raises(InvalidInput, match=r"`comparison`.*\b2\b.*\b2\b"):
            draw(comparison.iloc[[0, 0]])
        assert draw(comparison.head(2)) is not None


def test_an_unknown_cost_is_refused(comparison: pd.DataFrame) -> None:
    with pytest.raises(UnknownName, match="'flop'"):
        plot_perplexity(comparison, x="flop")


def test_each_method_has_its_colour_and_each_count_its_marker(many_experts: pd.DataFrame) -> None:
    found = lines(plot_perplexity(many_experts))
    assert to_hex(found["SparseGPT"].get_color()) == METHOD_PALETTE["sparsegpt"]
    assert to_hex(found["expansion, k = 32"].get_color()) == METHOD_PALETTE["expansion"]
    routed = [found[f"expansion, k = {k}"] for k in (2, 4, 8, 16, 32)]
    assert len({to_hex(line.get_color()) for line in routed}) == 5
    assert len({str(line.get_marker()) for line in [*routed, found["Wanda"]]}) == 6
    control = found["random clusters, k = 16"]
    assert control.get_linestyle() == "--"
    assert control.get_marker() == found["expansion, k = 16"].get_marker()
    assert to_hex(control.get_markerfacecolor()) == "#ffffff"


def test_allocations_are_curves_of_their_own(comparison: pd.DataFrame) -> None:
    other = comparison[comparison["method"] != "dense"].assign(allocation="owl")
    both = pd.concat([comparison.assign(allocation="uniform"), other], ignore_index=True)
    found = lines(plot_perplexity(both))
    assert list(found)[-3:] == ["expansion, k = 16", "expansion, k = 16, owl", "dense"]
    for name in ("SparseGPT", "expansion, k = 16"):
        even, own = found[name], found[f"{name}, owl"]
        assert even.get_color() == own.get_color()
        assert (even.get_linestyle(), own.get_linestyle()) == ("-", "-.")
        np.testing.assert_allclose(points(even), points(own))
    assert list(lines(plot_perplexity(both[both["allocation"] == "owl"])))[-1] == "dense"


def test_unknown_methods_get_colours_of_their_own(comparison: pd.DataFrame) -> None:
    names = {"wanda": "mine", "magnitude": "yours"}
    found = lines(plot_perplexity(comparison.replace({"method": names})))
    colors = [to_hex(found[name].get_color()) for name in ("yours", "mine")]
    assert colors == list(SPARE_COLORS[:2])


def test_small_differences_still_have_ticks(comparison: pd.DataFrame) -> None:
    rows = comparison.head(3).assign(ratio=[1.0, 1.1, 1.2], ratio_low=1.0, ratio_high=1.3)
    low, high = plot_perplexity(rows).get_ylim()
    ticks = plot_perplexity(rows).get_yticks()
    assert np.sum((ticks >= low) & (ticks <= high)) >= 3
    assert low < 1.0
    assert high > 1.3


def test_low_ends_of_bars_are_on_the_axis(comparison: pd.DataFrame) -> None:
    rows = comparison.head(3).assign(ratio_low=0.5)
    assert plot_perplexity(rows).get_ylim()[0] < 0.5


def test_the_figure_has_two_panels_with_one_y_axis(comparison: pd.DataFrame) -> None:
    figure = figure_comparison(comparison, text=TEXT)
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim()
    assert left.get_shared_y_axes().joined(left, right)
    assert (left.get_ylabel(), right.get_ylabel()) == ("perplexity (× dense)", "")
    assert left.get_xlabel() == "zeros in the pruned layers (%)"
    assert right.get_xlabel() == "stored non-zeros (× dense)"
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "Equal FLOPs per token", "Equal memory",
    ]  # fmt: skip
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == list(lines(left))
    assert TEXT in caption_of(figure)
    assert set(drawn(figure)["panel"]) == {"sparsity", "nonzeros"}


def test_the_table_holds_what_a_reader_needs(comparison: pd.DataFrame) -> None:
    table = drawn(figure_comparison(comparison))
    rows = table[(table["panel"] == "nonzeros") & (table["series"] == "expansion, k = 16")]
    row = rows[rows["sparsity"] == 0.7].iloc[0]
    assert row["x"] == pytest.approx(0.4 + 0.6 * 0.3 * 16)
    assert row[["y", "y_low", "y_high"]].tolist() == pytest.approx([3.78, 0.9 * 3.78, 1.2 * 3.78])
    assert row[["perplexity", "experts"]].tolist() == pytest.approx([75.6, 16])


@pytest.mark.parametrize("column", ["single", "double"])
@pytest.mark.parametrize("name", ["comparison", "many_experts"])
def test_no_text_overlaps_another_and_the_panels_keep_their_height(
    request: pytest.FixtureRequest, name: str, column: Any
) -> None:
    figure = figure_comparison(request.getfixturevalue(name), text=TEXT, column=column)
    assert crowded(figure, least_height=1.5) == []


def test_a_legend_in_plain_matplotlib_stays_on_the_figure(comparison: pd.DataFrame) -> None:
    for ax, inches in ((plot_perplexity(comparison, text=TEXT), 4.8), (_styled(comparison), 2.4)):
        figure = ax.get_figure(root=True)
        legend = ax.get_legend()
        assert figure is not None
        assert legend is not None
        figure.draw_without_rendering()
        box = legend.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        assert ax.get_window_extent().width > 0.7 * figure.bbox.width
        assert ax.get_window_extent().height > 0.7 * inches * figure.dpi


def _styled(comparison: pd.DataFrame) -> Axes:
    with paper_style():
        return plot_perplexity(comparison, text=TEXT)


def test_a_given_axes_keeps_its_figure_s_size(comparison: pd.DataFrame) -> None:
    figure = Figure(figsize=(4, 3))
    plot_perplexity(comparison, ax=figure.subplots())
    assert figure.get_figheight() == 3


def test_costs_are_bars_with_their_numbers_beside_dense() -> None:
    ax = plot_costs(expanded()[1])
    bars = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    assert [bar.get_width() for bar in bars] == [0.43, 5.2, 6.1]
    assert [text.get_text() for text in ax.texts] == ["0.43", "5.2", "6.1"]
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels == ["FLOPs per token", "stored non-zeros", "stored bytes"]
    (line,) = ax.get_lines()
    assert list(np.asarray(line.get_xdata())) == [1.0, 1.0]
    low, high = ax.get_ylim()
    assert low > high  # from the top down


def test_an_expansion_has_its_errors_beside_its_costs() -> None:
    layers, costs = expanded()
    layers.loc[23, "block"] = None
    figure = figure_expansion(layers, costs)
    left, right = figure.axes
    shown = {str(line.get_label()): points(line)[:, 1] for line in left.get_lines()}
    own = layers[(layers["projection"] == "gate_proj")]
    np.testing.assert_allclose(shown["gate_proj"], 100.0 * own["relative_error"])
    assert len(shown["down_proj"]) == 11
    assert len(right.patches) == 3
    said = caption_of(figure)
    assert "An expansion of 24 layers into 1 to 12 experts with 50 to 83 % zeros" in said
    assert said.endswith("1 layer outside the blocks left out.")
    with pytest.raises(InvalidInput, match=r"`layers`.*sparsity.*`entangle expand`"):
        figure_expansion(layers.drop(columns="sparsity"), costs)


def test_masked_activations_are_drawn_against_their_active_flops() -> None:
    frame = pd.DataFrame([model("dense", 0, 1, 1.0), model("wanda", 50, 1, 2.0)])
    assert figure_comparison(frame).axes[0].get_xlabel().startswith("zeros")
    less = model("teal", 50, 1, 1.5) | {"flops": 0.55, "nonzeros": 1.0}
    mixed = pd.concat([frame, pd.DataFrame([less, model("expansion", 50, 4, 1.8)])])
    figure = figure_comparison(mixed)
    assert figure.axes[0].get_xlabel().startswith("active FLOPs")
    table = drawn(figure)
    found = table.loc[table["series"].eq("TEAL") & table["panel"].eq("flops"), "x"]
    assert 0.55 in found.tolist()
    assert "up to 1 % more FLOPs" in caption_of(figure)  # 0.007 of 0.7: of Wanda's, not TEAL's
