from collections.abc import Callable

import numpy as np
import pytest
import torch

from entangle.allocation import allocate
from entangle.allocation.measurements import Measurements
from entangle.allocation.rules import OUTLIER, outlier_share, outlier_shares
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel
from entangle.results.scores import NeuronScores
from entangle.seeding import torch_rng
from entangle.texts.calibration_set import CalibrationSet
from tests.allocation.test_measurements import inputs_of
from tests.reference import allocation as reference


def test_share_by_hand() -> None:
    """Saliencies 1, 1, 1, 1, 1, 19 have mean 4; one exceeds 5 times that? 19 < 20: none does."""
    weight = torch.tensor([[1.0, -1, 0.5], [1, 1, 9.5]])
    norms = torch.tensor([1.0, 1, 2], dtype=torch.float64)
    assert outlier_share([weight], [norms]) == 0
    larger = torch.tensor([[1.0, -1, 0.5], [1, 1, 60]])  # 120 > 5 · 125 / 6
    assert outlier_share([larger], [norms]) == 1 / 6


def test_share_against_one_weight_at_a_time() -> None:
    rng = torch_rng(0, "owl")
    weights = [torch.randn(7, 5, generator=rng) ** 5, torch.randn(4, 9, generator=rng) ** 3]
    inputs = [torch.randn(6, 5, generator=rng), torch.randn(6, 9, generator=rng) * 3]
    norms = [one.double().norm(dim=0) for one in inputs]
    expected = reference.outlier_share(weights, inputs, OUTLIER)
    assert 0 < expected < 1
    assert outlier_share(weights, norms) == pytest.approx(expected)
    halves = [one.bfloat16() for one in weights]
    assert outlier_share(halves, norms) == pytest.approx(expected, abs=2 / 71)
    assert outlier_share(weights, [10 * one for one in norms]) == pytest.approx(expected)


def test_blocks_get_what_their_share_earns(
    tiny: Callable[[str], LanguageModel],
    scored: Callable[[str], NeuronScores],
    calibration: CalibrationSet,
) -> None:
    model = tiny("gpt_neox")
    layers = find_layers(model.module, "all")
    seen = inputs_of(model, layers, calibration.ids)
    shares = []
    for block in range(3):
        own = [layer for layer in layers if layer.block == block]
        inputs = [seen[layer.name] for layer in own]
        shares.append(reference.outlier_share([layer.weight for layer in own], inputs, OUTLIER))
    measured = Measurements(model, layers, calibration, memory=2**30)
    groups = np.array([layer.block for layer in layers])
    assert outlier_shares(measured, groups) == pytest.approx(shares)
    kept = np.array(shares) - min(shares)
    kept = 2 * 0.08 * kept / kept.max()
    expected = 0.7 - (kept - kept.mean())  # blocks are of equal size: no common shift
    found = allocate(
        scored("gpt_neox"), sparsity=0.7, rule="owl", model=model, calibration=calibration
    )
    for name, sparsity in found.sparsity.items():
        assert float(sparsity.mean()) == pytest.approx(expected[found.blocks[name]], abs=1e-3)
        assert np.ptp((sparsity * found.in_features[name]).numpy()) <= 1 + 1e-9
