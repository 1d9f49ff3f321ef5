from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from entangle.allocation import allocate, losses
from entangle.allocation.losses import output_sensitivity
from entangle.allocation.measurements import Measurements
from entangle.errors import InvalidInput
from entangle.models.layers import Layer, find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.pruning import prune
from entangle.results.scores import NeuronScores
from entangle.scoring.score import score
from entangle.texts.calibration_set import CalibrationSet
from tests.allocation.test_measurements import inputs_of
from tests.reference import allocation as reference
from tests.tiny_models import TINY

Tiny = Callable[[str], LanguageModel]
Scored = Callable[[str], NeuronScores]


def losses_of(
    model: LanguageModel, layer: Layer, ids: torch.Tensor, ends: tuple[float, float]
) -> list[tuple[float, float]]:
    rows = inputs_of(model, (layer,), ids)[layer.name]
    gram = rows.T @ rows
    found = [prune(layer.weight, gram, sparsity=end).loss_per_neuron.tolist() for end in ends]
    return list(zip(*found, strict=True))


@pytest.mark.parametrize(("sparsity", "ends"), [(0.5, (0.3, 0.7)), (0.8, (0.7, 0.9))])
@pytest.mark.parametrize("strength", [0.0, 0.4])
def test_loss_against_bisection_on_the_price(
    tiny: Tiny,
    scored: Scored,
    calibration: CalibrationSet,
    sparsity: float,
    ends: tuple[float, float],
    strength: float,
) -> None:
    model = tiny("llama")
    found = allocate(
        scored("llama"), sparsity=sparsity, rule="loss", spread=strength, model=model,
        calibration=calibration, layers=1, proj="mlp",
    )  # fmt: skip
    for layer in find_layers(model.module, 1, "mlp"):
        wd = scored("llama").layer(layer.name).frame["wd"].to_numpy()
        weight = np.exp(strength * (wd - wd.mean()) / wd.std())
        expected = reference.marginal(
            losses_of(model, layer, calibration.ids, ends), ends, layer.in_features,
            weight.tolist(), sparsity * layer.out_features,
        )  # fmt: skip
        zeros = found.zeros[layer.name].numpy()
        assert np.abs(zeros - np.array(expected) * layer.in_features).max() < 1.5


def test_sensitivity_against_bisection_across_layers(
    tiny: Tiny, scored: Scored, calibration: CalibrationSet
) -> None:
    """All neurons at one price: squared gradients are the currency of both layers."""
    model = tiny("llama")
    layers = find_layers(model.module, 1, "mlp")
    found = allocate(
        scored("llama"), sparsity=0.5, rule="sensitivity", spread=0.0, model=model,
        calibration=calibration, layers=1, proj="mlp",
    )  # fmt: skip
    gradient = output_sensitivity(Measurements(model, layers, calibration, memory=1))
    ends = (0.3, 0.7)
    losses, weights = [], []
    for layer in layers:
        losses += losses_of(model, layer, calibration.ids, ends)
        # widths differ: 32 and 48 inputs; the price of a zero is what a share costs by the width
        weights += (gradient[layer.name] / layer.in_features).tolist()
    flat = torch.cat([found.sparsity[layer.name] for layer in layers]).numpy()
    sizes = np.repeat([layer.in_features for layer in layers], [n.out_features for n in layers])
    expected = np.array(reference.marginal(losses, ends, 1, weights, float(flat.sum())))
    assert np.abs((flat - expected) * sizes).max() < 2
    assert np.ptp(flat) > 0.2


def test_losses_at_the_same_zeros_are_measured_once(
    tiny: Tiny, scored: Scored, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both rules start from one sparsity everywhere, as near as floats are to each other."""
    model = tiny("llama")
    solved: list[str] = []
    layers = find_layers(model.module, 1, "mlp")
    measured = Measurements(model, layers, calibration, memory=2**20)
    solve = losses._solve

    def counted(layer: Layer, *given: Any) -> torch.Tensor:
        solved.append(layer.name)
        return solve(layer, *given)

    monkeypatch.setattr(losses, "_solve", counted)
    for rule, sparsity, count in (("loss", 0.617, 3), ("sensitivity", 0.617, 3), ("loss", 0.66, 6)):
        settings: dict[str, Any] = {"model": model, "measured": measured, "layers": 1}
        allocate(scored("llama"), sparsity=sparsity, rule=rule, proj="mlp", **settings)
        assert len(solved) == count


def test_losses_of_layers_are_compared_by_their_energy(
    calibration: CalibrationSet, scored: Scored
) -> None:
    """A layer's outputs in other units (nothing that is measured comes after it) change nothing."""
    names = ["model.layers.2.mlp.gate_proj", "model.layers.2.mlp.down_proj"]
    found = []
    for scale in (1.0, 1000.0):
        model = as_language_model(TINY["llama"]())
        find_layers(model.module, names[1])[0].weight.mul_(scale)
        settings: dict[str, Any] = {"model": model, "calibration": calibration, "layers": names}
        frame = scored("llama").frame
        found.append(allocate(frame, sparsity=0.5, rule="loss", across="model", **settings))
    first, last = (one.layers["sparsity"].to_numpy() for one in found)
    assert first == pytest.approx(last, abs=2e-3)
    assert abs(first[0] - first[1]) > 0.01


def test_rows_that_cost_nothing_go_first(calibration: CalibrationSet) -> None:
    model = as_language_model(TINY["llama"]())
    up = find_layers(model.module, "model.layers.1.mlp.up_proj")[0]
    up.weight[3] = 0
    up.weight[4] = 100 * up.weight[4]
    scores = score(model, calibration, layers=[up.name], method="sketch", md=False)
    assert scores.frame["flag"][3] == "constant"
    found = allocate(
        scores, sparsity=0.5, rule="loss", spread=0.0, model=model, calibration=calibration
    )
    sparsity = found.sparsity[up.name]
    assert float(sparsity[3]) == pytest.approx(0.7, abs=1 / 32)
    assert float(sparsity[4]) == pytest.approx(0.3, abs=1 / 32)


def test_entangled_rows_are_kept_more_with_more_strength(
    tiny: Tiny, scored: Scored, calibration: CalibrationSet
) -> None:
    model = tiny("llama")
    measured = Measurements(model, find_layers(model.module, "all"), calibration, memory=2**30)
    top = scored("llama").top(20)
    means = []
    for strength in (0.0, 0.3, 1.0):
        for rule in ("loss", "sensitivity", "depth"):
            found = allocate(
                scored("llama"), sparsity=0.6, rule=rule, spread=strength, model=model,
                measured=measured,
            )  # fmt: skip
            kept = [
                1 - float(found.sparsity[row.layer][row.neuron])  # type: ignore[index]
                for row in top.itertuples()
            ]
            means.append(np.mean(kept))
    grid = np.reshape(means, (3, 3))
    assert (np.diff(grid, axis=0) > 0.01).all()


def test_depth_is_loss_within_the_layers_rule(
    tiny: Tiny, scored: Scored, calibration: CalibrationSet
) -> None:
    settings: dict[str, Any] = {
        "sparsity": 0.6, "model": tiny("llama"), "calibration": calibration,
    }  # fmt: skip
    depth = allocate(scored("llama"), rule="depth", **settings)
    again = allocate(scored("llama"), rule="loss", across="layer", **settings)
    layered = allocate(scored("llama"), rule="layer", **settings)
    assert all(torch.equal(depth.zeros[name], again.zeros[name]) for name in depth.zeros)
    assert depth.layers["zeros"].to_numpy() == pytest.approx(layered.layers["zeros"], abs=1.01)


def test_sparsities_stay_where_losses_were_measured(
    tiny: Tiny, scored: Scored, calibration: CalibrationSet
) -> None:
    for sparsity, reach in ((0.1, 0.1), (0.5, 0.2), (0.9, 0.05), (1.0, 0.0)):
        found = allocate(
            scored("llama"), sparsity=sparsity, rule="sensitivity", spread=5.0,
            model=tiny("llama"), calibration=calibration, layers=1, proj="mlp",
        )  # fmt: skip
        assert found.n_zeros == round(sparsity * found.n_weights)
        assert found.layers["lowest"].min() > sparsity - reach - 1 / 32
        assert found.layers["highest"].max() < sparsity + reach + 1 / 32


def test_an_error_names_the_layer(calibration: CalibrationSet, scored: Scored) -> None:
    model = as_language_model(TINY["llama"]())
    name = "model.layers.2.mlp.down_proj"
    find_layers(model.module, name)[0].weight[0, 0] = torch.nan
    with pytest.raises(InvalidInput, match=r"model\.layers\.2\.mlp\.down_proj.*`weight`"):
        allocate(
            scored("llama").frame, sparsity=0.5, rule="loss", model=model, calibration=calibration,
            layers=[name],
        )  # fmt: skip
