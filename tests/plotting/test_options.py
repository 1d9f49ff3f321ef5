"""One contract for all panels: what a user may ask of them, seen in their artists."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import Collection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from entangle import plotting
from entangle.errors import InvalidInput, UnknownName
from entangle.plotting.options import PlotOptions
from entangle.plotting.style import PaperFigure
from tests.plotting.ablation_frames import ablation_frame
from tests.plotting.conftest import (
    allocated,
    evidence,
    expanded,
    histogram_of,
    layer_scores,
    model,
    studied,
)
from tests.plotting.decomposition_frames import TOP, decompose_made_up

Draw = Callable[..., Axes]
NEW = "#12ab34"
PANELS = sorted(name for name in plotting.__all__ if name.startswith("plot_"))
FIGURES = sorted(name for name in plotting.__all__ if name.startswith("figure_"))


def difference() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables of two runs that are compared."""
    rng = np.random.default_rng(0)
    a = rng.uniform(0, 1, 60)
    frame = pd.DataFrame(
        {"layer": "gate", "neuron": range(60), "a": a, "b": a + rng.normal(0, 0.1, 60),
         "moved": ["up", "no", "no"] * 20, "change": rng.normal(0, 0.1, 60), "change_se": 0.1}
    )  # fmt: skip
    rows = [
        {"layer": f"{block}.{name}", "block": block, "projection": name, "top_3": 0.4 + block / 10,
         "top_3_low": 0.3, "top_3_high": 0.8}
        for block in range(3) for name in ("gate_proj", "down_proj")
    ]  # fmt: skip
    return frame, pd.DataFrame(rows)


def routings() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables of what routing does to WD."""
    rng = np.random.default_rng(0)
    names = ("gate_proj", "down_proj")
    frame = pd.DataFrame(
        {"projection": np.repeat(names, 30), "wd_inside": rng.uniform(0.01, 0.2, 60),
         "wd_outside": rng.uniform(0.01, 0.2, 60)}
    )  # fmt: skip
    rows = [
        {"block": block, "projection": name, "drop": 1.1 + block / 10, "low": 1.0, "high": 1.5,
         "control": 1.0, "experts": 4}
        for block in range(3) for name in names
    ]  # fmt: skip
    return frame, pd.DataFrame(rows)


def correlations() -> pd.DataFrame:
    """Two scores against the atoms of two dictionaries, of two layers."""
    rows = [
        {"dictionary": name, "scope": scope, "layer": layer, "predictor": score, "n": 60,
         "n_layers": 2, "spearman": value, "spearman_low": value - 0.1,
         "spearman_high": value + 0.1, "partial": value / 2, "partial_low": value / 2 - 0.1,
         "partial_high": value / 2 + 0.1}
        for name, value in (("itda", -0.2), ("random tokens", 0.3))
        for scope, layer in (("layer", "a"), ("layer", "b"), ("mean of layers", ""))
        for score in ("wd", "md")
    ]  # fmt: skip
    return pd.DataFrame(rows)


def arguments(name: str) -> tuple[tuple[object, ...], dict[str, Any]]:
    """What a panel is drawn from: a table and, by keyword, the rest."""
    d = decompose_made_up()
    scores = pd.concat([layer_scores(block) for block in range(4)], ignore_index=True)
    own, item = plotting.dense_output(d.outputs, d.neurons, neuron=TOP)
    of = {"mean": item.mean, "std": item.std}
    routed = {"neurons": d.neurons, "neuron": TOP, "experts": 4}
    layers, rows = allocated()
    rows = pd.concat([rows.assign(layer=layers["layer"].iloc[i]) for i in (0, 1)])
    models = pd.DataFrame(
        [model("dense", 0, 1, 1.0)]
        + [model(m, p, 1, r + p / 100) for m, r in (("wanda", 2.0), ("sparsegpt", 1.5))
           for p in (50, 70)]
    )  # fmt: skip
    spread = np.random.default_rng(0).normal(size=900)
    made: dict[str, tuple[tuple[object, ...], dict[str, Any]]] = {
        "plot_ablation": ((ablation_frame(),), {}),
        "plot_anchor": ((correlations(),), {}),
        "plot_change": ((d.neurons,), {"experts": 4}),
        "plot_components": ((d.components,), {"n_boot": 20}),
        "plot_contexts": ((d.contexts,), {"modes": d.modes}),
        "plot_costs": ((expanded()[1],), {}),
        "plot_distances": ((d.pairs,), {"neuron": TOP}),
        "plot_experts": ((d.outputs,), routed),
        "plot_layer_profile": ((layers,), {"overall": 0.6}),
        "plot_modes": ((d.modes,), {"histogram": own, **of}),
        "plot_output_distribution": ((histogram_of(spread),), {"mean": 0.0, "std": 1.0}),
        "plot_pair_contexts": ((d.separated,), of),
        "plot_perplexity": ((models,), {}),
        "plot_predictor": ((d.neurons,), {"experts": 4, "n_boot": 20}),
        "plot_router_map": ((d.router_map,), {"experts": 4}),
        "plot_row_sparsity": ((rows,), {"overall": 0.6}),
        "plot_separated_pairs": ((d.separated,), {"histogram": own, **of}),
        "plot_sparse_output": ((d.outputs,), routed),
        "plot_wd_against_md": ((scores[scores["block"] == 1],), {"n_boot": 20}),
        "plot_wd_distribution": ((scores[scores["block"] == 1],), {"floor": (0.01, 0.02)}),
        "plot_wd_heatmap": ((scores,), {}),
        "plot_wd_ridge": ((scores,), {}),
        "plot_two_runs": ((difference()[0],), {}),
        "plot_change_errors": ((difference()[0],), {}),
        "plot_wd_inside": ((routings()[0],), {}),
        "plot_routing_drop": ((routings()[1],), {}),
        "plot_rank_agreement": ((difference()[1],), {"measure": "top_3"}),
        "plot_verdicts": ((studied()[0],), {}),
        "plot_evidence": ((evidence(),), {"claim": "a"}),
        "plot_trace": ((studied()[1],), {}),
    }
    return made[name]


PARTS: dict[str, tuple[str, str]] = {
    "plot_ablation": ("top WD", "random"),
    "plot_anchor": ("itda", "random tokens"),
    "plot_change": ("other neurons", "top 3 % by WD"),
    "plot_components": ("1 cluster", "8 clusters"),
    "plot_contexts": ("mode 0", "mode 1"),
    "plot_costs": ("FLOPs per token", "stored bytes"),
    "plot_distances": ("token pairs", "median"),
    "plot_experts": ("expert 0", "expert 3"),
    "plot_layer_profile": ("gate_proj", "down_proj"),
    "plot_modes": ("mode 0", "mode 1"),
    "plot_output_distribution": ("output", "fitted Gaussian"),
    "plot_pair_contexts": ("pair 0", "pair 3"),
    "plot_perplexity": ("Wanda", "SparseGPT"),
    "plot_predictor": ("other neurons", "top 3 % by WD"),
    "plot_router_map": ("cluster 0", "cluster 3"),
    "plot_row_sparsity": ("rows", "all layers"),
    "plot_separated_pairs": ("pair 0", "pair 3"),
    "plot_sparse_output": ("dense", "sparse"),
    "plot_wd_against_md": ("other neurons", "top 3 % by WD"),
    "plot_wd_distribution": ("other neurons", "Gaussian floor"),
    "plot_wd_heatmap": ("model.layers.0.mlp.gate_proj", "block 3 · gate_proj"),
    "plot_wd_ridge": ("model.layers.0.mlp.gate_proj", "block 3 · gate_proj"),
    "plot_two_runs": ("did not move", "moved up"),
    "plot_change_errors": ("neurons", "if none moved"),
    "plot_wd_inside": ("gate_proj", "down_proj"),
    "plot_routing_drop": ("gate_proj", "down_proj"),
    "plot_rank_agreement": ("gate_proj", "down_proj"),
    "plot_verdicts": ("holds", "weaker"),
    "plot_evidence": ("main comparison", "hardest control"),
    "plot_trace": ("largest", "edge of the top rows"),
}
"""Two parts of every panel, in its own order."""
COLORED = {"plot_wd_heatmap": "top", "plot_modes": "mode 0"}
"""Names of a colour, where the first part has none of its own."""


@pytest.fixture(params=PANELS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def draw(name: str) -> Draw:
    frames, rest = arguments(name)
    function: Draw = getattr(plotting, name)
    return lambda **options: function(*frames, **{**rest, **options})


def figure_of(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def colors(ax: Axes) -> set[str]:
    """Colours of everything in a panel, but of its texts."""
    found: list[object] = []
    for artist in (*ax.findobj(), *(t.get_bbox_patch() for t in ax.texts)):
        for one in ("get_color", "get_facecolor", "get_edgecolor"):
            if hasattr(artist, one) and not isinstance(artist, Text):
                value = getattr(artist, one)()
                found += [value] if isinstance(value, str) else [*np.atleast_2d(value)]
    return {to_hex(one) for one in found if isinstance(one, str) or len(one)}  # type: ignore[arg-type]


def words(ax: Axes) -> list[str]:
    texts = [text for text in ax.findobj(Text) if isinstance(text, Text) and text.get_visible()]
    return [" ".join(text.get_text().split()) for text in texts if text.get_text().strip()]


def artists(ax: Axes) -> list[str]:
    return [f"{type(one).__name__} {one.get_label()}" for one in ax.get_children()]


def state(ax: Axes) -> tuple[object, ...]:
    return artists(ax), words(ax), ax.get_xlim(), ax.get_ylim(), ax.axison


def series(ax: Axes) -> list[tuple[str, str]]:
    """Panel and series of everything drawn, from back to front, each once."""
    table = plotting.drawn(figure_of(ax))
    return list(dict.fromkeys(zip(table["panel"], table["series"], strict=True)))


def test_all_panels_are_here_and_take_the_same_options() -> None:
    assert set(PARTS) == set(PANELS)
    for function in (getattr(plotting, one) for one in PANELS + FIGURES):
        *_, last = inspect.signature(function).parameters.values()
        assert last.kind is last.VAR_KEYWORD
        assert last.name == "options"
    assert all("ax" in inspect.signature(getattr(plotting, one)).parameters for one in PANELS)


def test_it_is_drawn_into_the_axes_and_nowhere_else(draw: Draw) -> None:
    figure = PaperFigure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    other, size = state(right), figure.get_size_inches().tolist()
    assert draw(ax=left, title="Mine") is left
    assert figure.axes == [left, right]
    assert state(right) == other
    assert (figure.texts, figure.legends, figure.get_suptitle()) == ([], [], "")
    assert figure.get_size_inches().tolist() == size
    assert len(plotting.drawn(figure)) > 0


def test_a_refused_option_leaves_the_axes_as_they_were(draw: Draw, name: str) -> None:
    figure = PaperFigure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    before, near = state(ax), PARTS[name][0][:-1] + "x"
    for option in ("palette", "labels", "order", "subset"):
        wrong = {near: NEW} if option in ("palette", "labels") else [near]
        with pytest.raises(UnknownName) as error:
            draw(ax=ax, **{option: wrong})
        assert near in str(error.value)
        assert "Closest" in str(error.value)
        assert state(ax) == before
    for options in ({"width": 4.0}, {"height": 4.0}):
        with pytest.raises(InvalidInput, match="ax"):
            draw(ax=ax, **options)
    assert state(ax) == before


def test_the_palette_is_that_of_the_artists(draw: Draw, name: str) -> None:
    part = COLORED.get(name, PARTS[name][0])
    plain = colors(draw())
    assert NEW not in plain
    assert NEW in colors(draw(palette={part: NEW}))
    turned = colors(draw(palette="tab20"))
    assert turned != plain
    assert colors(draw()) == plain


def test_labels_are_the_words(draw: Draw, name: str) -> None:
    plain = words(draw())
    old = max(plain, key=len)
    said = words(draw(labels={old: "My words"}))
    assert "My words" in said
    assert old not in said
    assert len(said) == len(plain)


def test_the_order_is_that_of_the_parts(draw: Draw, name: str) -> None:
    first, second = PARTS[name]
    assert series(draw()) != [] != series(draw(order=[second]))
    plain, turned = draw(), draw(order=[second, first])
    assert sorted(series(plain)) == sorted(series(turned))
    legends = [ax.get_legend() for ax in (plain, turned)]
    entries = [[t.get_text() for t in key.get_texts()] if key else [] for key in legends]
    assert (
        series(plain) != series(turned) or entries[0] != entries[1] or ticks_differ(plain, turned)
    )
    assert series(draw(order=second)) == series(draw(order=[second]))


def ticks_differ(one: Axes, other: Axes) -> bool:
    """A heat map has its layers along y."""
    tables = [plotting.drawn(figure_of(ax)) for ax in (one, other)]
    return not tables[0].equals(tables[1])


def test_a_subset_is_all_that_is_drawn(draw: Draw, name: str) -> None:
    whole, part = draw(), draw(subset=PARTS[name][0])
    assert len(plotting.drawn(figure_of(part))) < len(plotting.drawn(figure_of(whole)))
    assert count(part) <= count(whole)
    both = draw(subset=PARTS[name])
    rows = [len(plotting.drawn(figure_of(ax))) for ax in (part, both, whole)]
    assert rows == sorted(rows)
    with pytest.raises(InvalidInput):
        draw(subset=[])


def count(ax: Axes) -> int:
    """Artists, and members of collections."""
    inside = [one for one in ax.get_children() if isinstance(one, Collection)]
    return len(ax.get_children()) + sum(len(one.get_paths()) for one in inside)


def test_width_and_height_are_those_of_the_figure(draw: Draw) -> None:
    figure = figure_of(draw(width=5.5, height=3.25))
    assert figure.get_size_inches() == pytest.approx((5.5, 3.25))
    assert figure_of(draw(width=5.5)).get_figwidth() == 5.5
    for wrong in (0.0, -1.0, float("nan"), 800.0, "wide"):
        with pytest.raises(InvalidInput, match=r"width.*inches|width.*finite"):
            draw(width=wrong)


def test_the_title_is_the_own_one(draw: Draw) -> None:
    assert any("My $title" in text for text in words(draw(title="My $title")))
    ax = draw(title="")
    assert ax.get_title() + ax.get_title(loc="left") == ""


def test_the_caption_is_said_or_left_out(draw: Draw) -> None:
    said = "Said in my words"
    assert sum(said in text for text in words(draw(caption=said))) == 1
    ax = draw()
    plain, bare, own = words(ax), words(draw(caption=False)), titles(ax)
    assert not [text for text in bare if "n = " in text.replace("(n = ", "") and text not in own]
    assert len(bare) <= len(plain)
    with pytest.raises(InvalidInput, match="caption"):
        draw(caption=3)


def titles(ax: Axes) -> list[str]:
    return [" ".join(ax.get_title(loc=place).split()) for place in ("left", "center")]


def test_nothing_is_remembered(draw: Draw, name: str) -> None:
    before = state(draw())
    draw(palette="tab20", subset=PARTS[name][0], title="Mine", caption=False)
    with pytest.raises(UnknownName):
        draw(subset="nobody")
    assert state(draw()) == before


@pytest.mark.parametrize(
    "palette", [{"top": "reddish"}, "Dark3", {"top": 3}, [], 5, {3: "red"}, ["red", "no colour"]]
)
def test_colours_that_are_none_are_refused(palette: object) -> None:
    with pytest.raises(InvalidInput, match=r"palette|colour"):
        plotting.plot_wd_distribution(layer_scores(1), palette=palette)  # type: ignore[arg-type]


def test_too_few_colours_are_refused_and_enough_are_all_taken() -> None:
    with pytest.raises(InvalidInput, match="palette"):
        plotting.plot_wd_distribution(layer_scores(1), palette=["red"])
    ax = plotting.plot_wd_distribution(layer_scores(1), palette=["#ff0000", "#00ff00"])
    assert {"#ff0000", "#00ff00"} <= colors(ax)


def test_a_part_keeps_what_stands_behind_its_name() -> None:
    ax = plotting.plot_wd_distribution(layer_scores(1), labels={"other neurons": "rest"})
    assert "rest (n = 194)" in words(ax)
    ax = plotting.plot_costs(expanded()[1], labels={"stored bytes": "disk"})
    figure_of(ax).draw_without_rendering()
    assert "disk" in [tick.get_text() for tick in ax.get_yticklabels()]


def test_a_subset_is_what_the_words_are_about() -> None:
    ax = plotting.plot_ablation(ablation_frame(), subset=["top WD", "dense"])
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["top WD", "dense"]
    assert "seeds" not in legend.get_title().get_text()
    high = plotting.plot_ablation(ablation_frame(), subset="random").get_ylim()[1]
    assert high < 2.0 < ax.get_ylim()[1]


def test_figures_take_panels_and_series() -> None:
    scores = pd.concat([layer_scores(block) for block in range(4)], ignore_index=True)
    names = scores["layer"].unique().tolist()
    floors = pd.DataFrame({"layer": names, "null_floor": 0.01, "null_floor_high": 0.02})
    draw = plotting.figure_wd_distribution
    figure = draw(scores, floors, order=["block 3 · gate_proj"], subset=[names[0], names[3], "top"])
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "block 3 · gate_proj", "block 0 · gate_proj"
    ]  # fmt: skip
    table = plotting.drawn(figure)
    assert set(table["series"]) == {"top 3 % by WD", "top 3 % by WD, each"}
    for options in ({"subset": names[2]}, {"subset": names[:2], "order": names[1]}):
        assert len(draw(scores, floors, **options).axes) == len(np.atleast_1d(options["subset"]))
    with pytest.raises(UnknownName, match="block 2"):
        draw(scores, floors, subset="block 2 · gate_prj")
    with pytest.raises(InvalidInput, match="plot_"):
        draw(scores, floors, ax=None)  # type: ignore[call-arg]


def test_several_figures_share_names() -> None:
    scores = layer_scores(1)
    with plotting.shared_names():
        for draw in (plotting.plot_wd_distribution, plotting.plot_wd_ridge):
            draw(scores, palette={"typical": NEW, "layer": "red"})
    with pytest.raises(UnknownName, match="typicl"), plotting.shared_names():
        plotting.plot_wd_distribution(scores, palette={"typicl": NEW})
    with pytest.raises(UnknownName, match="layer"):
        plotting.plot_wd_distribution(scores, palette={"layer": NEW})


def test_the_options_are_few_and_documented() -> None:
    assert set(PlotOptions.__annotations__) == {
        "palette", "labels", "order", "subset", "width", "height", "title", "caption"
    }  # fmt: skip
