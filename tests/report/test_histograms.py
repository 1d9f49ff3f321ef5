import numpy as np
import pytest

from entangle.report.histograms import BARS, LEVELS, SPAN, bars, exact_bars
from entangle.results.scores import LayerHistograms
from entangle.stats.edges import SAVED_FOLD, signed_edges
from tests.report.samples import histograms


@pytest.fixture(scope="module")
def outputs() -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5, 4000))
    rows[1] = 3 * rows[1] - 7
    rows[2] = np.where(rows[2] > 0, rows[2] + 4, rows[2] - 4)
    rows[3] = np.exp(rows[3])
    rows[4] = rows[4] * 1e-3 + 1
    return rows


@pytest.fixture(scope="module")
def kept(outputs: np.ndarray) -> LayerHistograms:
    return histograms(outputs)


def test_small_histograms_are_those_of_the_outputs(
    outputs: np.ndarray, kept: LayerHistograms
) -> None:
    levels, positive = bars(kept, outputs.mean(1), outputs.std(1))
    assert levels.dtype == np.uint8
    assert (levels.max(1) == LEVELS).all()
    z = (outputs - outputs.mean(1, keepdims=True)) / outputs.std(1, keepdims=True)
    for row, own in zip(z, levels, strict=True):
        counts, _ = np.histogram(row.clip(-SPAN, SPAN), BARS, (-SPAN, SPAN))
        assert np.abs(own / LEVELS - counts / counts.max()).max() < 0.08
    assert np.abs(positive - (outputs > 0).mean(1)).max() < 0.02


def test_outputs_that_do_not_vary_stand_in_one_bar() -> None:
    levels, positive = bars(
        histograms(np.full((2, 8), [[3.0], [-1.0]])), np.full(2, 3.0), np.zeros(2)
    )
    assert [np.flatnonzero(one).tolist() for one in levels] == [[BARS // 2]] * 2
    assert positive.tolist() == [1.0, 0.0]


def test_nothing_counted_is_nothing() -> None:
    empty = LayerHistograms(np.zeros((1, 3), np.int32), 0, *(np.zeros(1) for _ in range(4)))
    levels, positive = bars(empty, np.full(1, np.nan), np.full(1, np.nan))
    assert not levels.any()
    assert np.isnan(positive).all()
    assert exact_bars(empty, 0, np.nan, np.nan).counts.sum() == 0


@pytest.mark.parametrize("neuron", range(5))
def test_whole_histograms_are_put_together_again(
    neuron: int, outputs: np.ndarray, kept: LayerHistograms
) -> None:
    mean, std = outputs[neuron].mean(), outputs[neuron].std()
    found = exact_bars(kept, neuron, mean, std)
    frame = kept.neuron(neuron)
    assert found.counts.tolist() == frame["count"].tolist()
    first, location, scale, low, high = found.told
    inner = location + scale * signed_edges(SAVED_FOLD)[first : first + len(frame) - 1]
    edges = mean + std * np.concatenate([[low], inner, [high]])
    np.testing.assert_allclose(edges[:-1], frame["left"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(edges[1:], frame["right"], rtol=1e-9, atol=1e-12)
