from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from entangle.errors import InvalidInput
from entangle.plotting import dense_output, drawn, figure_separated_pairs, plot_separated_pairs
from entangle.plotting.summaries import SparseNeuron
from tests.plotting.decomposition_frames import TOP, Decomposed
from tests.plotting.layout import outside, overlapping, texts

Output = tuple[pd.DataFrame, SparseNeuron]


@pytest.fixture
def output(decomposed: Decomposed) -> Output:
    """Histogram and numbers of the neuron whose pairs are known."""
    return dense_output(decomposed.outputs, decomposed.neurons, neuron=TOP)


def draw(separated: pd.DataFrame, output: Output, **options: Any) -> Figure:
    histogram, item = output
    return figure_separated_pairs(
        separated, histogram, mean=item.mean, std=item.std, wd=item.wd, **options
    )


def test_every_pair_is_a_line_between_its_outputs(decomposed: Decomposed, output: Output) -> None:
    histogram, item = output
    ax = plot_separated_pairs(
        decomposed.separated, histogram=histogram, mean=item.mean, std=item.std, most=3
    )
    figure = ax.get_figure(root=True)
    assert figure is not None
    for rank, row in decomposed.separated.head(3).iterrows():
        line = drawn(figure).query(f"series == 'pair {rank}'")
        ends = (row[["output_a", "output_b"]].to_numpy(np.float64) - item.mean) / item.std
        np.testing.assert_allclose(line["x"], ends)
    assert [text.get_text() for text in ax.texts] == ["0", "1", "2"]


def test_texts_show_both_contexts_with_their_outputs(
    decomposed: Decomposed, output: Output
) -> None:
    figure = draw(decomposed.separated, output, most=2)
    table = drawn(figure).query("panel == 'contexts'")
    assert table["series"].tolist() == ["pair 0, a", "pair 0, b", "pair 1, a", "pair 1, b"]
    first = decomposed.separated.iloc[0]
    assert table["token"].iloc[0] == first["context_a"][first["start_a"] : first["end_a"]]
    assert table["x"].iloc[0] == pytest.approx(first["output_a"])
    _, item = output
    wanted = f"● {(first['output_a'] - item.mean) / item.std:+.2f}".replace("-", "−")
    assert wanted in texts(figure)
    assert any("cosine 0.980, distance 3" in text for text in texts(figure))


def test_ranks_come_in_order_and_not_too_many(decomposed: Decomposed, output: Output) -> None:
    many = pd.concat([decomposed.separated] * 4, ignore_index=True)
    many = many.assign(rank=range(len(many)))[::-1]
    figure = draw(many, output, most=100)
    pairs = drawn(figure).query("panel == 'contexts'")["series"].unique()
    assert pairs[:2].tolist() == ["pair 0, a", "pair 0, b"]
    assert len(pairs) == 24
    assert not overlapping(figure)
    assert not outside(figure)


def test_bad_tables_are_one_clear_line(decomposed: Decomposed, output: Output) -> None:
    with pytest.raises(InvalidInput, match=r"`separated`.*output_a.*output_b"):
        draw(decomposed.separated.drop(columns="cosine"), output)
    with pytest.raises(InvalidInput, match=r"`separated`.*row.*`entangle decompose`"):
        draw(decomposed.separated.head(0), output)
