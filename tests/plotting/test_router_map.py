import numpy as np
import pandas as pd
import pytest

from entangle.errors import InvalidInput
from entangle.plotting import drawn, figure_router_map, plot_router_map
from tests.plotting.decomposition_frames import Decomposed


def test_every_token_is_in_its_cluster(decomposed: Decomposed) -> None:
    figure = plot_router_map(decomposed.router_map, experts=4).get_figure(root=True)
    assert figure is not None
    found = drawn(figure).sort_values("position")
    rows = decomposed.router_map[decomposed.router_map["experts"] == 4].sort_values("position")
    np.testing.assert_array_equal(found[["x", "y"]], rows[["x", "y"]])
    assert found["series"].tolist() == [f"cluster {c}" for c in rows["cluster"]]


def test_a_panel_a_number_of_experts_with_common_axes(decomposed: Decomposed) -> None:
    one = decomposed.router_map.query("experts == 2").assign(experts=1, cluster=0)
    figure = figure_router_map(pd.concat([one, decomposed.router_map]))
    titles = [ax.get_title(loc="left").replace("\u00a0", " ") for ax in figure.axes]
    assert [title.split("\n")[0] for title in titles[:2]] == [
        "2 experts, n = 600 tokens",
        "4 experts, n = 600 tokens",
    ]
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in figure.axes}) == 1
    assert len(figure_router_map(decomposed.router_map, experts=8).axes) == 1


def test_numbers_that_would_cover_others_are_left_out_and_counted() -> None:
    frame = pd.DataFrame(
        {
            "layer": "l", "experts": 3, "position": range(6), "x": [0.0, 0, 0, 0, 0, 9],
            "y": [0.0, 0, 0, 0, 0, 9], "cluster": [0, 1, 1, 1, 0, 2],
        }
    )  # fmt: skip
    ax = plot_router_map(frame)
    assert {text.get_text() for text in ax.texts} == {"1", "2"}
    assert "2 of 3 numbered" in ax.get_title() + ax.get_title(loc="left")


def test_sixty_four_clusters_are_drawn() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(640, 2)), columns=["x", "y"])
    frame = frame.assign(layer="l", experts=64, position=range(640), cluster=np.arange(640) % 64)
    assert drawn(figure_router_map(frame))["series"].nunique() == 64


def test_bad_tables_are_one_clear_line(decomposed: Decomposed) -> None:
    frame = decomposed.router_map
    lost = frame.assign(x=frame["x"].where(frame["position"] > 2))
    assert "3 left out: not finite" in plot_router_map(lost, experts=2).get_title().replace(
        "\n", " "
    )
    with pytest.raises(InvalidInput, match=r"router_map.*finite.*`entangle decompose`"):
        plot_router_map(frame.assign(x=np.nan), experts=2)
    with pytest.raises(InvalidInput, match=r"\b2\b.*\b1\b.*`entangle decompose --experts 1,4,16`"):
        figure_router_map(frame.assign(experts=1))
    with pytest.raises(InvalidInput, match=r"router_map.*cluster.*`entangle decompose`"):
        figure_router_map(frame.drop(columns="cluster"))
