import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from entangle.errors import InvalidInput
from entangle.plotting.summaries import check_columns, output_density, split_top

Floats = NDArray[np.float64]


def three_bins(**changes: list[float]) -> pd.DataFrame:
    return pd.DataFrame(
        {"left": [0.0, 1.0, 3.0], "right": [1.0, 3.0, 4.0], "count": [1.0, 6.0, 1.0], **changes}
    )


def test_missing_columns_are_named_with_the_command_that_makes_them() -> None:
    with pytest.raises(InvalidInput, match=r"`scores`.*without.*`entangle score`"):
        check_columns(pd.DataFrame({"wd": [1.0]}), ("wd", "md", "ks"), name="scores")


def test_an_empty_frame_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"`scores`.*row.*`entangle score`"):
        check_columns(pd.DataFrame({"wd": []}), ("wd",), name="scores")


def test_split_marks_the_largest_and_reports_the_threshold(scores: pd.DataFrame) -> None:
    split = split_top(scores, top=0.03)
    expected = scores.nlargest(6, "wd")
    assert set(split.frame["neuron"][split.is_top]) == set(expected["neuron"])
    assert split.threshold == expected["wd"].min()
    assert split.top_name == "top 3 % by WD"
    assert split.dropped == ""


@pytest.mark.parametrize(("top", "count"), [(1e-6, 1), (0.5, 100), (1.0, 200)])
def test_split_takes_at_least_one_and_at_most_all(
    scores: pd.DataFrame, top: float, count: int
) -> None:
    assert split_top(scores, top=top).is_top.sum() == count


def test_equal_wds_are_taken_in_order(scores: pd.DataFrame) -> None:
    split = split_top(scores.assign(wd=0.1), top=0.02)
    assert np.flatnonzero(split.is_top).tolist() == [0, 1, 2, 3]


def test_flagged_neurons_are_dropped_and_counted(flagged: pd.DataFrame) -> None:
    flagged.loc[20, "md"] = np.nan
    split = split_top(flagged, top=0.5, values=("wd", "md"))
    assert split.dropped == "4 left out: 2 constant, 1 nan, 1 no wd or md"
    assert not {3, 7, 11, 20} & set(split.frame["neuron"])
    assert np.isfinite(split.values("wd")).all()


def test_an_infinite_wd_never_becomes_top(scores: pd.DataFrame) -> None:
    scores.loc[5, "wd"] = np.inf
    split = split_top(scores, top=0.01)
    assert 5 not in set(split.frame["neuron"])
    assert np.isfinite(split.threshold)


@pytest.mark.parametrize("top", [0.0, -0.1, 1.3, float("nan")])
def test_top_outside_its_range_is_refused(scores: pd.DataFrame, top: float) -> None:
    with pytest.raises(InvalidInput, match=r"`top`.*\(0, 1\]"):
        split_top(scores, top=top)


def test_all_nan_and_single_neurons_are_refused(scores: pd.DataFrame) -> None:
    lost = scores.assign(wd=np.nan, flag="constant")
    with pytest.raises(InvalidInput, match=r"`scores`.*\b0\b.*\b200\b.*\b200\b.*constant"):
        split_top(lost, top=0.03)
    with pytest.raises(InvalidInput, match=r"`scores`.*\b2\b.*\b1\b"):
        split_top(scores.head(1), top=0.03)


def test_thousands_of_layers_are_counted_not_listed(scores: pd.DataFrame) -> None:
    frame = pd.concat([scores] * 10).assign(layer=[str(i) for i in range(2000)])
    with pytest.raises(InvalidInput, match=r"`scores`.*\b2,000\b") as caught:
        split_top(frame, top=0.03)
    assert len(str(caught.value)) < 200


def test_density_of_a_hand_worked_histogram() -> None:
    shape = output_density(three_bins(), mean=2.0, std=0.5)
    assert shape.edges.tolist() == [-4.0, -2.0, 2.0, 4.0]
    assert shape.density.tolist() == [1 / 16, 6 / 32, 1 / 16]
    assert shape.n == 8
    assert shape.share_between(0.0, 3.0) == 6 / 16 + 1 / 16
    assert shape.quantile(0.5) == 0.0
    assert shape.at(np.array([-5.0, -4.0, 0.0, 3.0, 5.0])).tolist() == [
        0,
        1 / 16,
        6 / 32,
        1 / 16,
        0,
    ]


def test_density_in_own_units_keeps_the_edges() -> None:
    shape = output_density(three_bins(), mean=2.0, std=0.5, standardized=False)
    assert shape.edges.tolist() == [0.0, 1.0, 3.0, 4.0]
    assert shape.density.tolist() == [1 / 8, 3 / 8, 1 / 8]


@given(
    scale=st.floats(0.01, 100.0), shift=st.floats(-50.0, 50.0), counts=st.lists(st.integers(1, 99))
)
def test_density_integrates_to_one_in_any_unit(
    scale: float, shift: float, counts: list[int]
) -> None:
    counts = [*counts, 1]
    edges = shift + scale * np.arange(len(counts) + 1.0) ** 1.5
    frame = pd.DataFrame({"left": edges[:-1], "right": edges[1:], "count": counts})
    shape = output_density(frame, mean=shift, std=scale)
    assert np.sum(shape.density * np.diff(shape.edges)) == pytest.approx(1.0)
    assert shape.n == sum(counts)


def test_endless_bins_are_counted_but_not_drawn() -> None:
    frame = three_bins(left=[-np.inf, 1.0, 3.0], right=[1.0, 3.0, np.inf])
    shape = output_density(frame, mean=2.0, std=1.0)
    assert shape.edges.tolist() == [-1.0, 1.0]
    assert shape.n == 8
    assert shape.share_between(-10.0, 10.0) == 6 / 8


@pytest.mark.parametrize(
    "changes",
    [
        {"left": [0.0, 1.5, 3.0]},
        {"left": [0.0, 3.0, 1.0], "right": [1.0, 4.0, 3.0]},
        {"right": [1.0, 3.0, 3.0]},
        {"left": [np.nan, 1.0, 3.0]},
        {"left": [0.0, -np.inf, 3.0], "right": [-np.inf, 3.0, 4.0]},
    ],
)
def test_bins_that_do_not_join_are_refused(changes: dict[str, list[float]]) -> None:
    with pytest.raises(InvalidInput, match=r"`histogram`.*join.*\b3\b"):
        output_density(three_bins(**changes), mean=0.0, std=1.0, label="this one")


@pytest.mark.parametrize("count", [[0.0, 0.0, 0.0], [1.0, -1.0, 3.0], [1.0, np.nan, 3.0]])
def test_impossible_counts_are_refused(count: list[float]) -> None:
    with pytest.raises(InvalidInput, match=r"`histogram`.*counts.*\b0\b"):
        output_density(three_bins(count=count), mean=0.0, std=1.0)


@pytest.mark.parametrize(
    ("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (np.nan, 1.0), (0.0, np.nan), (0.0, np.inf)]
)
def test_constant_and_broken_neurons_are_refused(mean: float, std: float) -> None:
    with pytest.raises(InvalidInput, match=r"`mean`.*\bNaN\b"):
        output_density(three_bins(), mean=mean, std=std)
