from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entangle.errors import InvalidInput
from entangle.models.loading import LanguageModel
from entangle.results.scores import LayerHistograms, NeuronScores
from entangle.scoring.score import Method
from entangle.stats.sketch import OutputSketch
from entangle.texts.calibration_set import CalibrationSet
from tests.reference import scoring as reference

Scored = Callable[[str, Method], NeuronScores]


def histograms(outputs: np.ndarray) -> LayerHistograms:
    """Return the histograms of outputs (tokens, neurons)."""
    sketch = OutputSketch(outputs.shape[1], n_groups=1)
    sketch.update(torch.from_numpy(outputs))
    return LayerHistograms.from_sketch(sketch.result())


def check(histogram: "object", y: np.ndarray) -> None:
    import pandas as pd

    assert isinstance(histogram, pd.DataFrame)
    left, right = histogram["left"].to_numpy(), histogram["right"].to_numpy()
    assert (left < right).all()
    assert np.array_equal(left[1:], right[:-1])
    slack = 1e-5 * max(abs(y).max(), np.ptp(y))
    assert left[0] >= y.min() - slack
    assert right[-1] <= y.max() + slack
    assert histogram["count"].sum() == len(y)
    assert histogram["count"].iloc[[0, -1]].gt(0).all()
    below = np.cumsum(histogram["count"])
    low, high = ((y[:, None] <= right + shift).sum(0) for shift in (-slack, slack))
    assert ((low <= below) & (below <= high)).all()


@pytest.mark.parametrize("method", ["exact", "sketch"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_every_distribution_can_be_drawn_again(
    name: str,
    method: Method,
    tiny: Callable[[str], LanguageModel],
    scored: Scored,
    calibration: CalibrationSet,
) -> None:
    scores = scored(name, method)
    layers = list(scores.histograms)
    streams = reference.inputs_and_outputs(tiny(name).module, layers, calibration.ids)
    for layer in layers:
        for neuron in (0, 5, 15):
            check(scores.histogram(layer, neuron), streams[layer][1][:, neuron])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=2, max_size=40, unique=True
    )
)
def test_any_outputs(values: list[float]) -> None:
    y = np.array(values, dtype=np.float32)
    check(histograms(y[:, None]).neuron(0), y.astype(np.float64))


def test_a_case_by_hand() -> None:
    """Outputs 0…99 and −1000: every value of the core keeps its place, the outlier its own bin."""
    y = np.array([*range(100), -1000], dtype=np.float32)
    histogram = histograms(y[:, None]).neuron(0)
    assert histogram["left"].iloc[0] == pytest.approx(-1000)
    assert histogram["right"].iloc[-1] == pytest.approx(99)
    assert histogram["count"].iloc[0] == 1
    core = histogram[histogram["left"] > -100]
    assert core["count"].sum() == 100
    assert (core["right"] - core["left"]).max() < 10


def test_a_constant_neuron_is_one_bin() -> None:
    y = np.stack([np.full(8, 3.0), np.arange(8)], 1).astype(np.float32)
    histogram = histograms(y).neuron(0)
    assert histogram["count"].tolist() == [8]
    assert histogram["left"][0] < histogram["right"][0]
    assert histogram["left"][0] <= 3.0 <= histogram["right"][0]


def test_a_neuron_of_nothing_but_nan_has_a_histogram_of_nothing() -> None:
    y = np.stack([np.full(8, np.nan), np.arange(8)], 1).astype(np.float32)
    assert histograms(y).neuron(0)["count"].sum() in (0, 8)


@pytest.mark.parametrize("neuron", [-1, 2])
def test_neurons_that_do_not_exist(neuron: int) -> None:
    y = np.arange(16, dtype=np.float32).reshape(8, 2)
    with pytest.raises(InvalidInput, match=rf"`neuron`.*\[0, 1\].*{neuron}"):
        histograms(y).neuron(neuron)


def test_a_clipped_end_bin_is_no_spike() -> None:
    """One token just inside its bin must not be as dense as thousands in a bin of full width."""
    y = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    for neuron in range(20):
        outputs = np.append(y, np.float32(5 + neuron / 100))
        frame = histograms(outputs[:, None]).neuron(0)
        density = (frame["count"] / (frame["right"] - frame["left"])).to_numpy()
        assert density[[0, -1]].max() < density.max() / 4
        check(frame, outputs.astype(np.float64))


def test_outliers_beyond_the_open_bins_are_inside_the_last_one() -> None:
    y = np.append(0.01 * np.random.default_rng(0).standard_normal(4000), [100.0, -300.0])
    frame = histograms(y.astype(np.float32)[:, None]).neuron(0)
    assert frame["right"].iloc[-1] == pytest.approx(100.0)
    assert frame["left"].iloc[0] == pytest.approx(-300.0)
    assert frame["count"].sum() == len(y)
