import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection

from entangle.errors import InvalidInput
from entangle.plotting import drawn, figure_distances, plot_distances
from entangle.plotting.pairs import MOST_POINTS
from tests.plotting.decomposition_frames import TOP, TYPICAL, Decomposed


@pytest.fixture
def pairs(decomposed: Decomposed) -> pd.DataFrame:
    """Pairs of the top neuron."""
    return decomposed.pairs[decomposed.pairs["neuron"] == TOP].reset_index(drop=True)


def note(ax: Axes) -> str:
    return ax.texts[0].get_text().replace("\u00a0", " ").replace("\n", "; ")


def test_every_pair_is_a_point(pairs: pd.DataFrame) -> None:
    ax = plot_distances(pairs)
    (points,) = (c for c in ax.collections if isinstance(c, PathCollection))
    expected = pairs[["input_normalised", "output_normalised"]].to_numpy()
    np.testing.assert_array_equal(np.asarray(points.get_offsets()), expected)


def test_mean_ratio_is_the_mapping_difficulty_of_the_pairs(pairs: pd.DataFrame) -> None:
    ratio = float(np.mean(pairs["output_normalised"] / pairs["input_normalised"]))
    assert note(plot_distances(pairs, legend=False)) == f"mean ratio = {ratio:.3f}; n = 600 pairs"


def test_trend_is_the_median_and_quartiles_of_tenths(pairs: pd.DataFrame) -> None:
    figure = plot_distances(pairs).get_figure(root=True)
    assert figure is not None
    trend = drawn(figure).query("series == 'median'")
    tenths = [part for _, part in pairs.groupby(pd.qcut(pairs["input_normalised"], 10))]
    quartiles = [part["output_normalised"].quantile([0.25, 0.5, 0.75]) for part in tenths]
    np.testing.assert_allclose(trend[["y_low", "y", "y_high"]], quartiles)


def test_many_pairs_are_counted_in_hexagons(pairs: pd.DataFrame) -> None:
    many = pd.concat([pairs] * (MOST_POINTS // len(pairs) + 1))
    ax = plot_distances(many, legend=False)
    assert not [c for c in ax.collections if isinstance(c, PathCollection)]
    cells = [c for c in ax.collections if isinstance(c, PolyCollection)]
    assert sum(np.asarray(c.get_array()).sum() for c in cells if c.get_array() is not None) == len(
        many
    )


def test_identical_inputs_and_nan_are_left_out_and_counted(pairs: pd.DataFrame) -> None:
    pairs.loc[:1, "input_normalised"] = 0.0
    pairs.loc[2, "output_normalised"] = np.nan
    assert note(plot_distances(pairs, legend=False)).endswith("n = 597 pairs; 3 left out")
    with pytest.raises(InvalidInput, match=r"`pairs`.*different.*`entangle decompose`"):
        plot_distances(pairs.assign(input_normalised=0.0))


def test_few_pairs_have_no_trend(pairs: pd.DataFrame) -> None:
    figure = plot_distances(pairs.head(1)).get_figure(root=True)
    assert figure is not None
    assert set(drawn(figure)["series"]) == {"token pairs"}


def test_figure_shows_the_top_beside_the_typical_neuron(decomposed: Decomposed) -> None:
    figure = figure_distances(decomposed.pairs, decomposed.neurons)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == [f"top neuron {TOP}", f"typical neuron {TYPICAL}"]
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in figure.axes}) == 1
    assert len(figure_distances(decomposed.pairs, decomposed.neurons, chosen=[TOP]).axes) == 1
    with pytest.raises(InvalidInput, match=r"`chosen`.*\[\]"):
        figure_distances(decomposed.pairs, decomposed.neurons, chosen=[])
    with pytest.raises(InvalidInput, match="output_normalised"):
        figure_distances(decomposed.pairs.drop(columns="output_normalised"), decomposed.neurons)
