from collections.abc import Callable

import pytest
import torch

from entangle.experiments.interventions import layer_statistics
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel
from entangle.recording.hooks import observe
from entangle.scoring.score import score
from entangle.texts.calibration_set import CalibrationSet

Tiny = Callable[[str], LanguageModel]


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt", "gemma3"])
@pytest.mark.parametrize("scored", [False, True])
def test_grams_equal_those_of_recorded_inputs(
    tiny: Tiny, calibration: CalibrationSet, name: str, scored: bool
) -> None:
    model = tiny(name)
    layers = find_layers(model.module, "all", "mlp")
    names = [layer.name for layer in layers]
    scores = score(model, calibration, layers=names, method="sketch") if scored else None
    found = layer_statistics(model, calibration, layers, scores=scores)
    inputs: dict[str, torch.Tensor] = {}
    with observe(layers, lambda layer, x, _: inputs.update({layer.name: x.flatten(0, -2)})):
        model.module(calibration.ids)
    for layer in layers:
        expected = inputs[layer.name].double().T @ inputs[layer.name].double()
        torch.testing.assert_close(
            found.grams[layer.name].gram.double(), expected, rtol=1e-4, atol=1e-4
        )
        assert found.grams[layer.name].count == calibration.n_tokens
    assert found.scores.frame["layer"].unique().tolist() == names


def test_gate_and_up_share_a_gram(tiny: Tiny, calibration: CalibrationSet) -> None:
    model = tiny("llama")
    layers = find_layers(model.module, 0, "mlp")
    grams = layer_statistics(model, calibration, layers).grams
    gate, up, down = (grams[layer.name] for layer in layers)
    assert gate is up
    assert gate is not down


def test_watching_does_not_change_the_scores(tiny: Tiny, calibration: CalibrationSet) -> None:
    model = tiny("llama")
    layers = find_layers(model.module, "all", "mlp")
    with_grams = layer_statistics(model, calibration, layers)
    without = layer_statistics(model, calibration, layers, grams=False)
    assert without.grams == {}
    assert with_grams.scores.frame.equals(without.scores.frame)
