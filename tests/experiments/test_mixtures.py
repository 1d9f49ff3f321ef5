from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from entangle.errors import InvalidInput, UnknownName
from entangle.experiments.outliers import _bic, _sample, gmm_components, mixture_components
from entangle.experiments.selection import select
from entangle.experts.routed_rows import RowIndices
from entangle.models.loading import LanguageModel
from entangle.results.scores import NeuronScores
from entangle.scoring.score import score
from entangle.texts.calibration_set import CalibrationSet
from tests.reference.mixtures import best_bic

Floats = NDArray[np.float64]


def humps(means: list[float], n: int = 600, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(mean, 1.0, size=n // len(means)) for mean in means])


@pytest.fixture(scope="module")
def scores(tiny: Callable[[str], LanguageModel], calibration: CalibrationSet) -> NeuronScores:
    return score(tiny("llama"), calibration, layers=[0, 1], proj="gate_proj")


@pytest.mark.parametrize("means", [[0.0], [-6.0, 6.0], [-12.0, 0.0, 12.0]])
def test_bic_agrees_with_plain_expectation_maximisation(means: list[float]) -> None:
    values = humps(means)
    z = (values - values.mean()) / values.std()
    starts = [(mean - values.mean()) / values.std() for mean in means]
    found = _bic(values, 3, 0)
    assert found[len(means) - 1] == pytest.approx(best_bic(z.tolist(), starts), abs=0.1)
    assert np.argmin(found) == len(means) - 1


def test_one_component_by_hand() -> None:
    # variance 1 after standardising: -2 log L = n (log 2π + 1), and there are two parameters
    n = 100
    expected = n * (np.log(2 * np.pi) + 1) + 2 * np.log(n)
    assert _bic(np.tile([-3.0, 7.0], 50), 1, 0) == pytest.approx([expected], abs=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_separate_humps_are_counted(count: int) -> None:
    values = humps([10.0 * i for i in range(count)])
    assert mixture_components(values) == count
    assert mixture_components(values, max_components=2) == min(count, 2)
    assert mixture_components(values[::-1]) == count
    assert mixture_components(1e-6 * values - 1e-3) == count


def test_a_heavy_tail_counts_as_more_than_one() -> None:
    assert mixture_components(np.random.default_rng(0).standard_t(2, size=2000)) > 1


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        (np.ones(100), {}, r"\b100\b.*\b100\b.*\b1\b.*\b1\b"),
        (np.array([*range(99), np.nan]), {}, r"\b99\b.*\b100\b"),
        (np.arange(39.0), {}, r"\b40\b.*\(39,\)"),
        (np.zeros((40, 1)), {}, r"\(40, 1\)"),
        (np.arange(99.0), {"max_components": 0}, r"`max_components`.*1; got 0"),
        (np.arange(99.0), {"seed": -1}, r"`seed`.*-1\b"),
    ],
)
def test_values_without_a_mixture_are_refused(
    values: Floats, options: dict[str, int], says: str
) -> None:
    with pytest.raises(InvalidInput, match=says):
        mixture_components(values, **options)


def test_samples_follow_the_histogram(scores: NeuronScores) -> None:
    layer = scores.layers["layer"][0]
    histogram = scores.histogram(layer, 3)
    sample = _sample(scores, layer, 3, 20_000, 0)
    edges = np.append(histogram["left"], histogram["right"].iloc[-1])
    share = np.histogram(sample, edges)[0] / len(sample)
    np.testing.assert_allclose(share, histogram["count"] / histogram["count"].sum(), atol=0.015)
    row = scores.frame.iloc[3]
    assert sample.mean() == pytest.approx(row["mean"], abs=0.05 * row["std"])
    assert sample.std() == pytest.approx(row["std"], rel=0.05)


def test_every_neuron_by_itself(scores: NeuronScores) -> None:
    layers = scores.layers["layer"].tolist()
    rows: dict[str, RowIndices] = {layers[1]: [7, 2], layers[0]: np.array([0])}
    found = gmm_components(scores, rows=rows, points=200)
    assert found["layer"].tolist() == [layers[1], layers[1], layers[0]]
    assert found["neuron"].tolist() == [7, 2, 0]
    for layer, neuron, count in found.itertuples(index=False):
        assert count == mixture_components(_sample(scores, layer, neuron, 200, 0))
    alone = gmm_components(scores, rows={layers[1]: [2]}, points=200)
    assert alone["gmm_components"].item() == found["gmm_components"][1]
    top = select(scores.frame, "top", count=1)
    assert len(gmm_components(scores, rows=top.rows, points=40)) == 2
    merged = scores.frame.merge(found, on=["layer", "neuron"], how="left")
    assert merged["gmm_components"].notna().sum() == 3


def test_all_neurons_and_flags(scores: NeuronScores) -> None:
    frame = scores.frame.copy()
    frame.loc[5, "flag"] = "constant"
    flagged = NeuronScores(frame, scores.layers, scores.histograms, scores.manifest)
    layer = flagged.layer(scores.layers["layer"][0])
    found = gmm_components(layer, points=40, max_components=1, progress=False)
    assert found["neuron"].tolist() == list(range(48))
    assert np.isnan(found["gmm_components"][5])
    assert (found["gmm_components"].drop(5) == 1).all()


def test_bad_requests(scores: NeuronScores) -> None:
    layer = scores.layers["layer"][0]
    with pytest.raises(UnknownName, match="'nowhere'"):
        gmm_components(scores, rows={"nowhere": [0]})
    with pytest.raises(InvalidInput, match=r"\b0\b.*47.*\b48\b"):
        gmm_components(scores, rows={layer: [48]})
    with pytest.raises(InvalidInput, match=r"`rows\[.*got"):
        gmm_components(scores, rows={layer: np.array([0.5])})
    with pytest.raises(InvalidInput, match=r"`points`.*\b10\b.*\b40\b.*\b39\b"):
        gmm_components(scores, points=39)
    with pytest.raises(InvalidInput, match=r"max_components.*\b0\b"):
        gmm_components(scores, max_components=0)
