import numpy as np
import pandas as pd
import pytest

from entangle.errors import InvalidInput, UnknownName
from entangle.plotting.summaries import choose, sparse_neuron, usual_neurons
from tests.plotting.decomposition_frames import LAYER, TOP, TYPICAL, Decomposed


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.DataFrame({"layer": list("aabb"), "experts": [1, 2, 1, 2], "value": range(4)})


def test_rows_with_the_wanted_values_are_kept(frame: pd.DataFrame) -> None:
    assert choose(frame, name="f", layer="b", experts=2)["value"].tolist() == [3]
    assert choose(frame.head(1), name="f", layer=None, experts=None)["value"].tolist() == [0]


def test_what_is_open_is_asked_for(frame: pd.DataFrame) -> None:
    with pytest.raises(InvalidInput, match=r"`layer`.*`f`.*\bNone\b"):
        choose(frame, name="f", layer=None)
    with pytest.raises(InvalidInput, match=r"`experts`.*\b1\b.*\b2\b.*\b3\b"):
        choose(frame, name="f", experts=3)
    with pytest.raises(UnknownName, match=r"'c'.*`f`"):
        choose(frame, name="f", layer="c")


def test_a_long_list_is_cut_short() -> None:
    frame = pd.DataFrame({"neuron": range(100)})
    with pytest.raises(InvalidInput, match=r"`neuron`.*\b0\b.*\b1\b.*\b2\b.*\b3\b.*\b4\b.*\b5\b"):
        choose(frame, name="f", neuron=None)


def test_missing_columns_name_the_command(frame: pd.DataFrame) -> None:
    with pytest.raises(InvalidInput, match=r"`f`.*without.*`entangle decompose`"):
        choose(frame, name="f", neuron=1)
    with pytest.raises(InvalidInput, match=r"`f`.*row.*`entangle decompose`"):
        choose(frame.head(0), name="f", layer=None)


def test_a_neuron_has_its_numbers_and_experts(decomposed: Decomposed) -> None:
    item = sparse_neuron(decomposed.neurons, neuron=TOP, role="top")
    rows = decomposed.neurons[decomposed.neurons["neuron"] == TOP]
    assert (item.layer, item.neuron, item.label) == (LAYER, TOP, f"top neuron {TOP}")
    assert (item.mean, item.std, item.wd) == tuple(rows[["mean", "std", "wd"]].to_numpy()[0])
    assert item.experts == [1, 2, 4, 8, 16]
    np.testing.assert_array_equal(item.rows["ri"], rows["ri"])


def test_a_neuron_that_comes_twice_is_refused(decomposed: Decomposed) -> None:
    twice = pd.concat([decomposed.neurons, decomposed.neurons])
    with pytest.raises(InvalidInput, match=rf"`neurons`.*{TOP}"):
        sparse_neuron(twice, neuron=TOP)


def test_the_usual_neurons_are_the_largest_wd_and_the_median(decomposed: Decomposed) -> None:
    assert usual_neurons(decomposed.neurons, [TYPICAL, TOP]) == [(TOP, "top"), (TYPICAL, "typical")]
    assert usual_neurons(decomposed.neurons, [TYPICAL]) == [(TYPICAL, "top")]


def test_the_median_is_that_of_all_neurons_with_a_wd() -> None:
    frame = pd.DataFrame({"neuron": range(6), "wd": [0.9, 0.8, 0.1, 0.3, 0.2, np.nan]})
    assert usual_neurons(frame, [0, 1, 4, 5]) == [(0, "top"), (4, "typical")]


def test_neurons_without_wd_cannot_be_chosen(decomposed: Decomposed) -> None:
    frame = decomposed.neurons.assign(wd=np.nan)
    with pytest.raises(InvalidInput, match=r"WD.*\b2\b"):
        usual_neurons(frame, [TOP, TYPICAL])
