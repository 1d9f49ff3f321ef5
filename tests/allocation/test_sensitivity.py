from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from entangle.allocation.losses import output_sensitivity
from entangle.allocation.measurements import Measurements
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.recording.hooks import edit
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import TINY


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "falcon"])
def test_against_finite_differences(calibration: CalibrationSet, name: str) -> None:
    """Nudge one output at one token of a float64 model; the loss follows the gradient."""
    model = as_language_model(TINY[name]().double())
    text = CalibrationSet(calibration.ids[:1, :5].clone(), "x", {})
    layers = find_layers(model.module, 1)
    found = output_sensitivity(Measurements(model, layers, text, memory=1))

    def loss() -> float:
        logits = model.module(text.ids).logits
        flat, wanted = logits[:, :-1].flatten(0, 1), text.ids[:, 1:].flatten()
        return float(nn.functional.cross_entropy(flat, wanted, reduction="sum"))

    for layer in layers[-2:]:
        for neuron in (0, 11):
            total = 0.0
            for token in range(5):
                sides = []
                for step in (1e-5, -1e-5):

                    def nudge(output: Tensor, *, t: int = token, by: float = step) -> Tensor:
                        moved = output.clone()
                        moved.view(5, -1)[t, neuron] += by  # noqa: B023
                        return moved

                    with edit([(layer, nudge)]):
                        sides.append(loss())
                total += ((sides[0] - sides[1]) / 2e-5) ** 2
            assert float(found[layer.name][neuron]) == pytest.approx(total / 5, rel=1e-4)


def test_a_neuron_that_nothing_reads(calibration: CalibrationSet) -> None:
    model = as_language_model(TINY["llama"]())
    layers = find_layers(model.module, 1, "mlp")
    layers[2].weight[:, 5] = 0  # what gate and up neuron 5 make is dropped by down
    found = output_sensitivity(Measurements(model, layers, calibration, memory=1))
    for layer in layers[:2]:
        assert float(found[layer.name][5]) == 0
        assert int((found[layer.name] == 0).sum()) == 1


def test_the_model_is_as_it_was(
    tiny: Callable[[str], LanguageModel],
    calibration: CalibrationSet,
    count_hooks: Callable[[nn.Module], int],
) -> None:
    model = tiny("bert")
    layers = find_layers(model.module, "all")
    measured = Measurements(model, layers, calibration, memory=1)
    first, again = output_sensitivity(measured), output_sensitivity(measured)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert set(first) == {layer.name for layer in layers}
    assert all(float(one.min()) >= 0 and float(one.max()) > 0 for one in first.values())
    assert count_hooks(model.module) == 0
    assert not any(p.requires_grad or p.grad is not None for p in model.module.parameters())


def test_a_projection_stands_for_all_hidden_states(calibration: CalibrationSet) -> None:
    """An encoder's last linear, before a norm of ours that does nothing: gradients are ± 1."""
    model = as_language_model(TINY["bert"]())
    last = find_layers(model.module, "encoder.layer.2.output.dense")
    norm = model.module.get_submodule("encoder.layer.2.output")
    norm.LayerNorm = nn.Identity()
    found = output_sensitivity(Measurements(model, last, calibration, memory=1))
    assert found[last[0].name].tolist() == [1.0] * 32
