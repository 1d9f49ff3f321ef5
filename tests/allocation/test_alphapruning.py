from collections.abc import Callable

import numpy as np
import pytest
import torch

from entangle.allocation import allocate
from entangle.allocation.rules import power_law_exponent
from entangle.errors import InvalidInput, NumericalError
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel
from entangle.results.scores import NeuronScores
from entangle.seeding import torch_rng
from tests.reference import allocation as reference


@pytest.mark.parametrize("shape", [(40, 40), (25, 60), (60, 25), (3, 200)])
@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_exponent_against_loops(shape: tuple[int, int], scale: float) -> None:
    weight = scale * torch.randn(shape, generator=torch_rng(1, "alpha", *shape))
    assert power_law_exponent(weight) == pytest.approx(reference.exponent(weight), rel=1e-4)
    assert power_law_exponent(weight.T) == pytest.approx(power_law_exponent(weight))


@pytest.mark.parametrize("alpha", [2.5, 4.0])
def test_exponent_of_a_power_law(alpha: float) -> None:
    """Eigenvalues at the quantiles of a power law from 1 on: density x^-α."""
    quantiles = (np.arange(600) + 0.5) / 600
    eigenvalues = (1 - quantiles) ** (-1 / (alpha - 1))
    weight = torch.from_numpy(np.diag(np.sqrt(eigenvalues)))
    assert power_law_exponent(weight) == pytest.approx(alpha, rel=0.03)


def test_exponent_by_hand() -> None:
    """Eigenvalues 1, e, e²: the tail from 1 has α = 1 + 3 / 3 and gaps |1 − e^-k − k/3|."""
    weight = torch.diag(torch.tensor([1.0, np.e**0.5, np.e]))
    gaps = {2.0: max(abs(1 - np.exp(-k) - k / 3) for k in range(3))}
    tail = 1 + 2 / 1  # from e: α = 3, and one gap |1 − e^-2 − 1/2|
    gaps[tail] = abs(1 - np.exp(-2.0) - 0.5)
    assert min(gaps, key=lambda one: gaps[one]) == 2.0
    assert power_law_exponent(weight) == pytest.approx(2.0)


@pytest.mark.parametrize("weight", [torch.zeros(4, 5), torch.eye(4), torch.ones(3, 3)])
def test_spectra_without_a_tail(weight: torch.Tensor) -> None:
    with pytest.raises(NumericalError, match="eigenvalues"):
        power_law_exponent(weight)


def test_rank_deficient_weights_have_a_tail() -> None:
    thin = torch.randn(30, 6, generator=torch_rng(2, "thin"))
    wide = torch.cat([thin, torch.zeros(30, 24)], dim=1)
    assert power_law_exponent(wide) == pytest.approx(power_law_exponent(thin))


def test_blocks_against_the_formula(
    tiny: Callable[[str], LanguageModel], scored: Callable[[str], NeuronScores]
) -> None:
    """No text is needed; sparsities keep the ratio of the mapped exponents."""
    model = tiny("llama")
    layers = find_layers(model.module, "all")
    means = [
        np.mean([reference.exponent(layer.weight) for layer in layers if layer.block == block])
        for block in range(3)
    ]
    shape = 0.8 + 0.4 * (np.array(means) - min(means)) / np.ptp(means)
    found = allocate(scored("llama"), sparsity=0.5, rule="alphapruning", spread=0.2, model=model)
    layer_means = found.layers.groupby("block").apply(lambda x: x["zeros"].sum())
    weights = found.layers.groupby("block").apply(lambda x: (x["rows"] * x["in_features"]).sum())
    expected = 0.5 * shape / shape.mean()  # blocks are of equal size
    assert (layer_means / weights).to_numpy() == pytest.approx(expected, abs=1e-3)


def test_strength_in_range(
    tiny: Callable[[str], LanguageModel], scored: Callable[[str], NeuronScores]
) -> None:
    with pytest.raises(InvalidInput, match=r"`strength`.*\[0, 1\); got"):
        allocate(
            scored("llama"), sparsity=0.5, rule="alphapruning", spread=1.0, model=tiny("llama")
        )
