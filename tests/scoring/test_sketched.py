"""The sketch against the exact scores, and its pairs of tokens against a slow reference."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pandas.testing import assert_frame_equal

from entangle.models.loading import LanguageModel
from entangle.results.scores import NeuronScores
from entangle.scoring.score import Method, score
from entangle.scoring.sketched import _Pairing, _runs
from entangle.seeding import numpy_rng
from entangle.texts.calibration_set import CalibrationSet
from tests.reference import scoring as reference
from tests.tiny_models import CONFIGS

Tiny = Callable[[str], LanguageModel]
Scored = Callable[[str, Method], NeuronScores]
LOOKED_AT = (0, 7, 13)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_sketch_keeps_within_its_bound_of_the_exact_scores(name: str, scored: Scored) -> None:
    exact, sketch = scored(name, "exact"), scored(name, "sketch")
    assert list(sketch.frame.columns) == list(exact.frame.columns)
    assert sketch.frame.dtypes.to_dict() == exact.frame.dtypes.to_dict()
    assert sketch.layers.dtypes.to_dict() == exact.layers.dtypes.to_dict()
    same = ["model", "layer", "block", "projection", "neuron", "weight_norm", "n_tokens", "flag"]
    assert_frame_equal(sketch.frame[same], exact.frame[same])
    error = (sketch.frame["wd"] - exact.frame["wd"]).abs()
    unseen = exact.frame["wd"].isna()
    assert (error.isna() == exact.frame["wd"].isna()).all()
    assert (unseen | (error <= sketch.frame["wd_bound"] + 1e-5)).all()
    assert (unseen | (sketch.frame["wd_bound"] < 0.02)).all()
    for column in ("mean", "std", "skewness", "excess_kurtosis"):
        np.testing.assert_allclose(sketch.frame[column], exact.frame[column], rtol=2e-3, atol=1e-4)
    assert (unseen | (sketch.frame["ks"] <= exact.frame["ks"] + 1e-5)).all()
    assert (unseen | (sketch.frame["ks"] >= exact.frame["ks"] - 0.05)).all()
    assert sketch.layers["method"].eq("sketch").all()
    assert (sketch.frame["md"] / exact.frame["md"]).median() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 17, 64])
def test_pairs_are_disjoint_and_join_the_two_halves(n_tokens: int, share: float) -> None:
    for seed in range(20):
        pairing = _Pairing(seed=seed, share=share)
        tokens = torch.arange(n_tokens)
        x = torch.randn(n_tokens, 3, generator=torch.Generator().manual_seed(seed))
        pairs, half = pairing.of(x), n_tokens // 2
        first, second = [], []
        for one, other, which in _runs(half, pairs.starts, pairs.distance.shape[0]):
            left, right = tokens[:half][one], tokens[half:][other]
            first += left.tolist()
            second += right.tolist()
            torch.testing.assert_close(pairs.distance[which], (x[left] - x[right]).norm(dim=1))
        assert first == [(pairs.starts[0] + i) % half for i in range(len(first))]
        assert second == [half + (pairs.starts[1] + i) % half for i in range(len(second))]
        assert len(first) == len(second) == min(half, round(half * share))
        assert len(set(first)) == len(first)
        assert len(set(second)) == len(second)
        assert all(i < half for i in first)
        assert all(half <= i < 2 * half for i in second)


def test_the_mapping_difficulty_of_the_sketch(tiny: Tiny, calibration: CalibrationSet) -> None:
    """Tokens of a batch's first half are paired with tokens of its second."""
    name = "model.layers.1.mlp.gate_proj"
    scores = score(tiny("llama"), calibration, layers=name, method="sketch", seed=5)
    pairs: list[list[int]] = []
    for batch in range(6):  # one for each group of two sequences of 16 tokens
        start, shift = numpy_rng(5, "pairs", batch, 32).integers(16, size=2).tolist()
        first = [(start + i) % 16 for i in range(16)]
        pairs += [[32 * batch + i, 32 * batch + 16 + (i + shift) % 16] for i in first]
    assert scores.layers[["n_pairs", "n_identical_pairs"]].to_numpy().sum() == len(pairs) == 96
    streams = reference.inputs_and_outputs(tiny("llama").module, [name], calibration.ids)
    inputs, outputs = streams[name]
    for neuron in LOOKED_AT:
        expected = reference.mapping_difficulty(inputs, outputs[:, neuron], pairs)
        first, second = np.array(pairs).T
        distance = np.sort(np.abs(outputs[first, neuron] - outputs[second, neuron]))
        # The sketch's median lies in the bin of the middle ones: between their neighbours.
        low, high = (expected * np.median(distance) / distance[i] for i in (49, 46))
        assert low * 0.98 <= scores.frame["md"][neuron] <= high * 1.02
