import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from entangle.errors import InvalidInput
from entangle.plotting import drawn, figure_components, plot_components
from tests.plotting.decomposition_frames import Decomposed


def table(points: list[tuple[float, float]]) -> pd.DataFrame:
    x, y = np.array(points).T
    frame = {"layer": "l", "experts": 4, "cluster": range(len(x)), "tokens": 50}
    return pd.DataFrame({**frame, "components_90": x, "error": y})


def shown(ax: Axes) -> pd.DataFrame:
    figure = ax.get_figure(root=True)
    assert figure is not None
    return drawn(figure)


def words(ax: Axes) -> str:
    key = ax.get_legend()
    assert key is not None
    texts = [key.get_title().get_text(), *(text.get_text() for text in key.get_texts())]
    return "; ".join(texts).replace("\n", " ")


def test_every_cluster_is_a_point_by_number_of_experts(decomposed: Decomposed) -> None:
    points = shown(plot_components(decomposed.components, n_boot=5)).dropna(subset="cluster")
    expected = decomposed.components[["experts", "cluster", "components_90", "error"]]
    found = points[["experts", "cluster", "x", "y"]].to_numpy(np.float64)
    np.testing.assert_allclose(found, expected.to_numpy(np.float64))
    assert points["series"].unique().tolist() == [
        "1 cluster", "2 clusters", "4 clusters", "8 clusters", "16 clusters",
    ]  # fmt: skip


def test_front_is_fitted_to_the_clusters_that_none_beats() -> None:
    law = [(float(x), 0.01 * x**0.5) for x in (4, 16, 64)]
    ax = plot_components(table([*law, (3.0, 0.5), (16.0, 0.9)]), n_boot=5)
    front = shown(ax).query("series == 'front'")
    assert sorted(front["x"]) == [4, 16, 64]
    line = shown(ax).query("series == 'fitted front'")
    np.testing.assert_allclose(line["y"], 0.01 * line["x"] ** 0.5)
    assert "front: error ∝ components^0.50 fitted to the ringed 3" in words(ax)


def test_the_whole_front_is_on_the_axes() -> None:
    points = [(80.0, 0.08), (84.0, 0.23), (150.0, 0.29), (200.0, 0.35), (360.0, 0.44)]
    ax = plot_components(table(points), n_boot=5)
    line = shown(ax).query("series == 'fitted front'")
    assert line["y"].max() > 0.44  # the line ends above its last point
    assert ax.get_ylim()[0] == 0.0
    assert ax.get_ylim()[1] > line["y"].max()


def test_a_power_law_is_straight_where_components_span_much() -> None:
    law = [(float(x), 0.01 * x**0.5) for x in (4, 16, 64)]
    wide, narrow = (plot_components(table(part), n_boot=5) for part in (law, law[:2]))
    assert (wide.get_xscale(), wide.get_yscale()) == ("log", "log")
    assert (narrow.get_xscale(), narrow.get_yscale()) == ("linear", "linear")
    zero = plot_components(table([*law, (8.0, 0.0)]), n_boot=5)
    assert (zero.get_xscale(), zero.get_ylim()[0]) == ("linear", 0.0)


@pytest.mark.parametrize("points", [[(5.0, 0.2)], [(5.0, 0.2), (5.0, 0.3)], [(0.0, 0.1)] * 2])
def test_without_two_places_there_is_no_front(points: list[tuple[float, float]]) -> None:
    assert "front" not in words(plot_components(table(points), n_boot=5))


def test_empty_clusters_are_left_out_and_counted(decomposed: Decomposed) -> None:
    frame = decomposed.components.astype({"error": np.float64})
    frame.loc[frame.index[:2], "error"] = np.nan
    text = words(plot_components(frame, n_boot=5))
    assert "n = 29 clusters" in text
    assert "2 clusters left out: not finite" in text
    with pytest.raises(InvalidInput, match=r"`components`.*\b31\b"):
        plot_components(frame.assign(error=np.nan))


def test_figure_refuses_other_tables(decomposed: Decomposed) -> None:
    with pytest.raises(InvalidInput, match="components_90"):
        figure_components(decomposed.components.drop(columns="components_90"))
    two = pd.concat([decomposed.components, decomposed.components.assign(layer="other")])
    with pytest.raises(InvalidInput, match=r"`layer`.*\bNone\b"):
        figure_components(two)
    assert len(figure_components(two, layer="other", n_boot=5).axes) == 1
