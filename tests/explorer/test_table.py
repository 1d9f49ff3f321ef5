import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entangle.errors import InvalidInput, UnknownName
from entangle.explorer.views import PAGE, NeuronTable
from entangle.results.scores import NeuronScores

FRAME = pd.DataFrame(
    {
        "layer": "a",
        "neuron": range(5),
        "wd": [0.2, np.nan, 0.5, 0.2, 0.1],
        "md": [1.0, 2.0, 3.0, 4.0, 5.0],
        "mean": [-12.25, 3.5, np.nan, np.inf, 0.0],
        "flag": ["", "nan", "", "", ""],
    }
)


def shown(table: NeuronTable) -> list[list[str]]:
    return [line.split() for line in table.lines(0)]


def test_lines_align_under_their_titles() -> None:
    table = NeuronTable.of(FRAME)
    assert [column.title for column in table.columns] == ["neuron", "wd", "md", "mean", "flag"]
    assert shown(table) == [
        ["2", "0.5000", "3.000", "–"],
        ["0", "0.2000", "1.000", "−12.25"],
        ["3", "0.2000", "4.000", "∞"],
        ["4", "0.1000", "5.000", "0.00"],
        ["1", "–", "2.000", "3.50", "nan"],
    ]
    widths = {len(line) for line in table.lines(0)}
    assert widths == {sum(column.width for column in table.columns)}
    assert all(column.width >= len(column.title) + 3 for column in table.columns)
    assert " " not in "".join(table.lines(0))


def test_sorting() -> None:
    table = NeuronTable.of(FRAME)
    assert table.neurons(0) == [2, 0, 3, 4, 1]
    assert table.toggled("wd").neurons(0) == [4, 0, 3, 2, 1]
    assert table.toggled("wd").toggled("wd").neurons(0) == [2, 0, 3, 4, 1]
    assert table.toggled("md").neurons(0) == [4, 3, 2, 1, 0]
    assert table.sorted_by("mean", ascending=True).neurons(0) == [0, 4, 1, 3, 2]
    assert table.sorted_by("neuron", ascending=True).neurons(0) == [0, 1, 2, 3, 4]
    with pytest.raises(UnknownName, match="'flag'"):
        table.toggled("flag")


@given(st.lists(st.floats(width=32), min_size=1, max_size=250), st.booleans())
def test_pages_hold_every_neuron_once_in_order(values: list[float], ascending: bool) -> None:
    frame = pd.DataFrame({"neuron": range(len(values)), "wd": values})
    table = NeuronTable.of(frame).sorted_by("wd", ascending=ascending)
    pages = [table.neurons(page) for page in range(table.n_pages)]
    assert [len(page) for page in pages[:-1]] == [PAGE] * (table.n_pages - 1)
    found = [neuron for page in pages for neuron in page]
    assert sorted(found) == list(range(len(values)))
    wd = np.asarray(values)[found]
    finite = wd[~np.isnan(wd)]
    rising = finite if ascending else finite[::-1]
    assert (rising[1:] >= rising[:-1]).all()
    assert np.isnan(wd[len(finite) :]).all()
    for neuron in (0, len(values) - 1):
        page, row = table.place(neuron)
        assert pages[page][row] == neuron


def test_ranks_and_rows() -> None:
    table = NeuronTable.of(FRAME).toggled("md")
    assert [table.rank(neuron) for neuron in range(5)] == [2, None, 1, 2, 4]
    assert table.row(3)["md"] == 4.0
    with pytest.raises(InvalidInput, match="no neuron 7"):
        table.row(7)


def test_columns_of_scores(scores: NeuronScores) -> None:
    table = NeuronTable.of(scores.layer(scores.layers["layer"].iloc[0]).frame)
    names = [column.name for column in table.columns]
    assert names == [
        "neuron", "wd", "wd_se", "ks", "mean", "std", "skewness", "excess_kurtosis",
        "weight_norm", "md",
    ]  # fmt: skip
    assert len(table.lines(0)) == 48


@pytest.mark.parametrize("value", [0.0, 1e-12, 1e9, np.nan, -1e300])
def test_any_size_of_number_keeps_the_lines_equal(value: float) -> None:
    frame = pd.DataFrame({"neuron": [0, 1], "wd": [value, 0.5], "name\n<b>": [1.0, value]})
    lines = NeuronTable.of(frame).lines(0)
    assert len({len(line) for line in lines}) == 1
    assert not any("…" in line for line in lines)


def test_no_neuron_is_refused() -> None:
    with pytest.raises(InvalidInput, match="got none"):
        NeuronTable.of(FRAME.head(0))
