"""What the figures of an ablation show, by their artists."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from entangle.errors import InvalidInput, UnknownName
from entangle.plotting import PALETTE, caption_of, drawn, figure_ablation, plot_ablation
from entangle.plotting.arms import SEEDS as SEEDS_TEXT
from tests.plotting.ablation_frames import RATIOS, SEEDS, ablation_frame
from tests.plotting.layout import crowded

TEXT = "WikiText-2, 152 windows of 2,048 tokens"
KINDS = ("prune", "prune-wanda", "zero", "flip-negative")


@pytest.fixture
def frame() -> pd.DataFrame:
    return ablation_frame()


def lines(ax: Axes) -> dict[str, Line2D]:
    return {str(k): v for v, k in zip(*ax.get_legend_handles_labels(), strict=True)}  # type: ignore[misc]


def dots(ax: Axes) -> list[Line2D]:
    return [line for line in ax.get_lines() if str(line.get_label()).startswith("_")]


def numbers(values: Any) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def bars(ax: Axes) -> NDArray[np.float64]:
    """Ends of all bars, shape (bars, 2, 2)."""
    found = [c.get_segments() for c in ax.collections if isinstance(c, LineCollection)]
    return np.concatenate([np.asarray(segments) for segments in found if len(segments)])


def table_of(ax: Axes) -> pd.DataFrame:
    figure = ax.get_figure(root=True)
    assert figure is not None
    return drawn(figure)


def test_points_are_the_ratios_at_equally_spaced_strengths(frame: pd.DataFrame) -> None:
    ax = plot_ablation(frame)
    found = lines(ax)
    assert list(found) == ["top WD", "top variance", "bottom WD", "random (5 seeds)", "dense"]
    for label, ratios in zip(found, RATIOS.values(), strict=False):
        np.testing.assert_allclose(numbers(found[label].get_ydata()), ratios)
        x = numbers(found[label].get_xdata())
        np.testing.assert_allclose(np.diff(x), 1.0)
        assert abs(x[0]) < 0.35
    assert [text.get_text() for text in ax.get_xticklabels()] == ["90", "95", "99"]
    assert ax.get_xlabel() == "zeros in each selected row (%)"
    assert ax.get_ylabel() == "perplexity (× dense)"


def test_bars_are_intervals_and_do_not_lie_on_each_other(frame: pd.DataFrame) -> None:
    found = bars(plot_ablation(frame))
    top = found[:3]
    np.testing.assert_allclose(top[:, 0, 1], 0.9 * np.asarray(RATIOS["top", "wd"]))
    np.testing.assert_allclose(top[:, 1, 1], 1.1 * np.asarray(RATIOS["top", "wd"]))
    places = np.sort(found[:, 0, 0])
    assert len(places) == 12
    assert np.diff(places).min() > 0.02


def test_seeds_are_a_median_dots_and_a_bar_over_all_of_them(frame: pd.DataFrame) -> None:
    ax = plot_ablation(frame[frame["selection"].isin(["random", "dense"])])
    ratios = np.asarray(RATIOS["random", ""])
    np.testing.assert_allclose(numbers(lines(ax)["random (5 seeds)"].get_ydata()), ratios)
    found = bars(ax)
    np.testing.assert_allclose(found[:, 0, 1], 0.9 * (ratios + min(SEEDS)))
    np.testing.assert_allclose(found[:, 1, 1], 1.1 * (ratios + max(SEEDS)))
    (each,) = dots(ax)
    expected = np.sort((ratios[:, None] + SEEDS).ravel())
    np.testing.assert_allclose(np.sort(numbers(each.get_ydata())), expected)
    assert len(np.unique(numbers(each.get_xdata()))) == 3


def test_a_single_seed_is_a_plain_selection(frame: pd.DataFrame) -> None:
    ax = plot_ablation(frame[frame["seed"].isna() | frame["seed"].eq(0)])
    assert "random" in lines(ax)
    assert dots(ax) == []
    assert "seeds" not in legend_words(ax)


def legend_words(ax: Axes) -> str:
    legend = ax.get_legend()
    assert legend is not None
    return legend.get_title().get_text().replace("\n", "; ")


def test_the_legend_says_in_words_what_is_shown(frame: pd.DataFrame) -> None:
    assert legend_words(plot_ablation(frame, text=TEXT)) == "; ".join(
        [
            "SparseGPT", "model tiny", f"evaluated on {TEXT}", "n = 39 neurons in 9 layers",
            "dense perplexity 20",
            "bars: 95 % paired bootstrap over windows",
            SEEDS_TEXT,
        ]
    )  # fmt: skip


def test_a_missing_value_is_a_gap_that_is_named(frame: pd.DataFrame) -> None:
    top = frame["selection"].eq("top") & frame["by"].eq("wd")
    frame.loc[top & frame["strength"].eq(0.95), "value"] = np.inf
    ax = plot_ablation(frame)
    y = numbers(lines(ax)["top WD"].get_ydata())
    np.testing.assert_array_equal(y, [1.9, np.nan, 1580.0])
    assert "left out, not finite: 1 of top WD" in legend_words(ax)
    assert np.isfinite(table_of(ax)["y"]).all()


def test_a_value_without_an_interval_has_a_point_and_no_bar(frame: pd.DataFrame) -> None:
    top = frame[frame["by"].eq("wd") & frame["selection"].eq("top")].copy()
    top.loc[top["strength"].eq(0.99), "high"] = np.inf
    ax = plot_ablation(top)
    assert len(bars(ax)) == 2
    assert ax.get_ylim()[1] > 1580.0


def test_the_scale_is_logarithmic_only_where_values_span_much(frame: pd.DataFrame) -> None:
    assert plot_ablation(frame).get_yscale() == "log"
    assert plot_ablation(frame, measure="perplexity").get_yscale() == "log"
    low = frame[frame["selection"].isin(["bottom", "random", "dense"])]
    assert plot_ablation(low).get_yscale() == "linear"
    shares = frame.assign(measure=frame["measure"].replace("perplexity_ratio", "accuracy"))
    assert plot_ablation(shares, measure="accuracy").get_yscale() == "linear"


@pytest.mark.parametrize("measure", ["perplexity_ratio", "perplexity"])
def test_the_axis_holds_all_bars_and_the_dense_model(frame: pd.DataFrame, measure: str) -> None:
    for rows in (frame, frame[frame["selection"].isin(["top", "dense"])].tail(4), frame.tail(4)):
        ax = plot_ablation(rows, measure=measure)
        low, high = ax.get_ylim()
        found = bars(ax)[:, :, 1]
        assert low < found.min()
        assert high > found.max()
        base = [numbers(lines(ax)["dense"].get_ydata())[0]] if "dense" in lines(ax) else []
        assert all(low < value < high for value in base)
        ticks = ax.get_yticks()
        assert np.sum((ticks >= low) & (ticks <= high)) >= 2


def test_the_dense_model_is_a_line_at_its_value(frame: pd.DataFrame) -> None:
    for measure, value in (("perplexity_ratio", 1.0), ("perplexity", 20.0)):
        ax = plot_ablation(frame, measure=measure)
        assert set(numbers(lines(ax)["dense"].get_ydata())) == {value}
        table = table_of(ax)
        assert table.loc[table["series"] == "dense", "y"].tolist() == [value]
    assert "dense" not in lines(plot_ablation(frame[frame["selection"] != "dense"]))


def divergence(frame: pd.DataFrame) -> pd.DataFrame:
    """The same with ``ratio - 1`` as KL, so that the dense model has none."""
    rows = frame[frame["measure"] == "perplexity_ratio"].assign(measure="kl")
    return rows.assign(**{name: rows[name] - 1.0 for name in ("value", "low", "high")})


def test_a_dense_model_at_zero_is_not_on_a_logarithmic_axis(frame: pd.DataFrame) -> None:
    ax = plot_ablation(divergence(frame), measure="kl")
    assert ax.get_yscale() == "log"
    assert "dense" not in lines(ax)
    assert ax.get_ylim()[0] > 0.0
    rows = divergence(frame)
    rows.loc[rows["selection"].eq("bottom") & rows["strength"].eq(0.9), "value"] = 0.0
    ax = plot_ablation(rows, measure="kl")
    assert ax.get_yscale() == "linear"
    assert "dense" in lines(ax)


def test_a_bar_down_to_zero_leaves_a_logarithmic_axis_at_its_values(frame: pd.DataFrame) -> None:
    rows = divergence(frame)
    rows.loc[rows["selection"].eq("bottom"), "low"] = 0.0
    ax = plot_ablation(rows, measure="kl")
    assert ax.get_yscale() == "log"
    assert 1e-3 < ax.get_ylim()[0] < 0.01
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    assert len(bars(ax)) == 12


def test_selections_have_looks_of_their_own(frame: pd.DataFrame) -> None:
    more = frame[frame["selection"].eq("bottom")]
    matched = frame[frame["selection"].eq("random")]
    rows = [
        frame,
        more.assign(by="mine"),
        more.assign(selection="top", by="weight_norm"),
        more.assign(selection="all", by=""),
        more.assign(selection="listed", by=""),
        matched.assign(selection="random-norm", by="weight_norm"),
        matched.assign(selection="random-variance", by="variance"),
    ]
    found = lines(plot_ablation(pd.concat(rows)))
    del found["dense"]
    looks = {
        (line.get_color(), line.get_marker(), line.get_markerfacecolor()) for line in found.values()
    }
    assert len(found) == len(looks) == 10
    assert to_hex(found["top WD"].get_color()) == PALETTE["top"]
    assert to_hex(found["random (5 seeds)"].get_color()) == PALETTE["typical"]
    norm = found["random, matched weight norm (5 seeds)"]
    assert norm.get_color() == found["top weight norm"].get_color()
    assert to_hex(norm.get_markerfacecolor()) == "#ffffff"
    colors = [
        to_hex(found[f"top {name}"].get_color()) for name in ("WD", "variance", "weight norm")
    ]
    assert len(set(colors)) == 3


def test_a_column_keeps_its_colour_whatever_else_is_drawn(frame: pd.DataFrame) -> None:
    alone = lines(plot_ablation(frame[frame["by"] == "variance"]))["top variance"]
    assert alone.get_color() == lines(plot_ablation(frame))["top variance"].get_color()


def test_experts_are_along_x_at_one_strength() -> None:
    frame = ablation_frame(experts=(1, 4, 16))
    ax = plot_ablation(frame, strength=0.99)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "4", "16"]
    assert ax.get_xlabel() == "number of experts"
    expected = [1580.0, 1.0 + 1579.0 / 4, 1.0 + 1579.0 / 16]
    np.testing.assert_allclose(numbers(lines(ax)["top WD"].get_ydata()), expected)
    ax = plot_ablation(frame, experts=16)
    expected = [1.0 + (ratio - 1.0) / 16 for ratio in RATIOS["top", "wd"]]
    np.testing.assert_allclose(numbers(lines(ax)["top WD"].get_ydata()), expected)
    assert legend_words(ax).startswith("SparseGPT, 16 experts; model tiny")


def test_random_clusters_and_matched_controls_are_drawn_apart() -> None:
    parts = [ablation_frame(strengths=(0.9,), experts=(1,)).assign(router="")]
    routed_frame = ablation_frame(strengths=(0.9,), experts=(4, 16))
    parts += [routed_frame.assign(router=name) for name in ("kmeans", "random")]
    top = parts[0][parts[0]["selection"].eq("top") & parts[0]["by"].eq("wd")]
    parts.append(top.assign(selection="matched", n_rows=700))
    found = lines(plot_ablation(pd.concat(parts, ignore_index=True)))
    routed, control = found["top WD"], found["top WD, random clusters"]
    matched = found["bottom WD, matched perplexity (n = 700)"]
    assert (routed.get_linestyle(), control.get_linestyle()) == ("-", ":")
    assert to_hex(control.get_color()) == to_hex(routed.get_color())
    assert control.get_markerfacecolor() == matched.get_markerfacecolor() == "white"
    assert np.isfinite(numbers(routed.get_ydata())).tolist() == [True, True, True]
    assert np.isfinite(numbers(control.get_ydata())).tolist() == [False, True, True]
    assert np.isfinite(numbers(matched.get_ydata())).tolist() == [True, False, False]


def test_what_one_panel_cannot_hold_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"`experts`.*\b1\b.*\b4\b.*`strength`"):
        plot_ablation(ablation_frame(experts=(1, 4)))
    frame = ablation_frame(interventions=("prune", "zero"))
    with pytest.raises(InvalidInput, match=r"`intervention`.*\bNone\b"):
        plot_ablation(frame)
    assert plot_ablation(frame, intervention="zero").get_xlabel() == "share of the edit (%)"


def test_unknown_measures_are_refused(frame: pd.DataFrame) -> None:
    for draw in (plot_ablation, figure_ablation):
        with pytest.raises(UnknownName, match="'kl'"):
            draw(frame, measure="kl")


@pytest.mark.parametrize("n", [1, 2])
def test_one_arm_is_enough(frame: pd.DataFrame, n: int) -> None:
    top = frame[frame["selection"].eq("top") & frame["measure"].eq("perplexity_ratio")].head(n)
    for figure in (plot_ablation(top).get_figure(root=True), figure_ablation(top)):
        assert isinstance(figure, Figure)
        figure.draw_without_rendering()
        assert drawn(figure)["y"].tolist() == [1.9, 2.0][:n]


def test_many_strengths_keep_readable_ticks(frame: pd.DataFrame) -> None:
    top = frame[frame["selection"].eq("bottom") & frame["strength"].eq(0.9)]
    rows = [top.assign(strength=place / 20) for place in range(21)]
    ax = plot_ablation(pd.concat(rows))
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "15", "30", "45", "60", "75", "90"]
    assert len(numbers(lines(ax)["bottom WD"].get_ydata())) == 21


def test_the_figure_has_a_panel_an_intervention_with_one_y_axis() -> None:
    figure = figure_ablation(ablation_frame(interventions=KINDS), text=TEXT)
    titles = [ax.get_title(loc="left").replace("\n", " ") for ax in figure.axes]
    assert titles == ["SparseGPT", "Wanda", "Outputs set to 0", "Negative outputs change sign"]
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    assert len({ax.get_yscale() for ax in figure.axes}) == 1
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == list(lines(figure.axes[0]))
    assert legend.get_title().get_text() == "tiny"
    assert TEXT in caption_of(figure)
    assert figure.get_supylabel() == "perplexity (× dense)"
    assert set(drawn(figure)["panel"]) == set(titles)


def test_the_figure_has_a_panel_a_strength_where_experts_vary() -> None:
    figure = figure_ablation(ablation_frame(experts=(1, 16)))
    titles = [ax.get_title(loc="left").replace("\u00a0", " ") for ax in figure.axes]
    assert titles == [f"SparseGPT, {percent} % zeros" for percent in (90, 95, 99)]
    assert figure.get_supxlabel() == "number of experts"
    assert {ax.get_xlabel() for ax in figure.axes} == {""}


def test_too_many_panels_are_refused() -> None:
    frame = ablation_frame(interventions=[*KINDS, "mean"], experts=(1, 16))
    with pytest.raises(InvalidInput, match=r"`frame`.*\b12\b.*\b15\b"):
        figure_ablation(frame)
    assert len(figure_ablation(frame[frame["intervention"] != "mean"]).axes) == 12


def test_the_table_holds_what_a_reader_needs() -> None:
    table = drawn(figure_ablation(ablation_frame(experts=(1, 16))))
    rows = table[(table["strength"] == 0.95) & (table["experts"] == 16)]
    top = rows[rows["series"] == "top WD"].iloc[0]
    value = 1.0 + 5.8 / 16
    assert top[["y", "y_low", "y_high"]].tolist() == pytest.approx(
        [value, 0.9 * value, 1.1 * value]
    )
    assert top[["panel", "n_rows"]].tolist() == ["SparseGPT, 95 % zeros", 39]
    each = rows[rows["series"] == "random (5 seeds): each"]
    assert each["seed"].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(each["y"], 1.0 + (0.14 + np.asarray(SEEDS)) / 16)
    assert rows.loc[rows["series"] == "random (5 seeds)", "seeds"].tolist() == [5]


@pytest.mark.parametrize("column", ["single", "double"])
@pytest.mark.parametrize("interventions", [KINDS[:1], KINDS[:3], KINDS])
@pytest.mark.parametrize("experts", [(1,), (1, 4)])
def test_no_text_overlaps_another_and_the_panels_keep_their_height(
    interventions: tuple[str, ...], experts: tuple[int, ...], column: Any
) -> None:
    frame = ablation_frame(interventions=interventions, experts=experts)
    figure = figure_ablation(frame, text=TEXT, column=column)
    assert crowded(figure, least_height=0.9) == []


def test_a_given_axes_keeps_its_figure_s_size(frame: pd.DataFrame) -> None:
    figure = Figure(figsize=(4, 3))
    plot_ablation(frame, ax=figure.subplots())
    assert figure.get_figheight() == 3
