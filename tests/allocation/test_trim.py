from collections.abc import Callable

import numpy as np
import pytest
import torch

from entangle.allocation import allocate
from entangle.allocation.rules import trim_rows
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel
from entangle.results.scores import NeuronScores
from entangle.seeding import torch_rng
from entangle.texts.calibration_set import CalibrationSet
from tests.allocation.test_measurements import inputs_of
from tests.reference import allocation as reference


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7, 0.97])
@pytest.mark.parametrize("seed", range(3))
def test_against_real_outputs(target: float, seed: int) -> None:
    rng = torch_rng(seed, "trim")
    weight = torch.randn(9, 24, generator=rng, dtype=torch.float64) ** 3
    inputs = torch.randn(40, 24, generator=rng, dtype=torch.float64)
    inputs[:, :3] *= 6
    found = trim_rows(weight, inputs.T @ inputs, target)
    expected = reference.trim(weight, inputs, target)
    assert found.numpy() == pytest.approx(expected, abs=1e-4)
    assert float(found.mean()) == pytest.approx(target)


def test_rows_differ_where_that_helps() -> None:
    """One row lives on a single weight; it can lose the others at no loss of direction."""
    rng = torch_rng(0, "one weight")
    weight = torch.randn(6, 50, generator=rng)
    weight[0] = 1e-4 * weight[0]
    weight[0, 7] = 10.0
    inputs = torch.randn(200, 50, generator=rng)
    found = trim_rows(weight, inputs.T @ inputs, 0.6)
    assert int(found.argmax()) == 0
    assert float(found[0]) > 0.65


@pytest.mark.parametrize("kind", ["equal rows", "zero rows", "dead inputs", "one row"])
def test_edges(kind: str) -> None:
    rng = torch_rng(3, kind)
    weight, inputs = torch.randn(5, 16, generator=rng), torch.randn(30, 16, generator=rng)
    if kind == "equal rows":
        weight[:] = weight[0]
    if kind == "zero rows":
        weight[:] = 0
    if kind == "dead inputs":
        inputs[:] = 0
    if kind == "one row":
        weight = weight[:1]
    found = trim_rows(weight, inputs.T @ inputs, 0.5)
    assert found.tolist() == pytest.approx([0.5] * len(weight))


def test_layers_keep_their_share(
    tiny: Callable[[str], LanguageModel],
    scored: Callable[[str], NeuronScores],
    calibration: CalibrationSet,
) -> None:
    model = tiny("llama")
    layers = find_layers(model.module, 1, "mlp")
    seen = inputs_of(model, layers, calibration.ids)
    found = allocate(
        scored("llama"), sparsity=0.6, rule="trim", model=model, calibration=calibration,
        layers=1, proj="mlp",
    )  # fmt: skip
    for layer in layers:
        wanted = reference.trim(layer.weight, seen[layer.name], 0.6)
        zeros = found.zeros[layer.name].numpy()
        assert np.abs(zeros - wanted * layer.in_features).max() < 1.01
    owl = allocate(
        scored("llama"), sparsity=0.6, rule="trim", across="owl", model=model,
        calibration=calibration,
    )  # fmt: skip
    layered = allocate(
        scored("llama"), sparsity=0.6, rule="owl", model=model, calibration=calibration
    )
    assert owl.layers["zeros"].to_numpy() == pytest.approx(
        layered.layers["zeros"].to_numpy(), abs=1.01
    )


def test_no_row_above_the_ceiling(
    tiny: Callable[[str], LanguageModel],
    scored: Callable[[str], NeuronScores],
    calibration: CalibrationSet,
) -> None:
    for sparsity, highest in ((0.9, 0.95), (0.99, 0.99)):
        found = allocate(
            scored("opt"), sparsity=sparsity, rule="trim", model=tiny("opt"),
            calibration=calibration, layers=1,
        )  # fmt: skip
        assert found.n_zeros == round(sparsity * found.n_weights)
        assert found.layers["highest"].max() <= highest + 1 / 32
