from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from entangle.allocation.measurements import Measurements
from entangle.errors import InvalidInput, NumericalError
from entangle.models.layers import Layer, find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.recording.hooks import observe
from entangle.runs.progress import Progress
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import TINY


def inputs_of(model: LanguageModel, layers: tuple[Layer, ...], ids: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    with observe(layers, lambda layer, x, _: seen.update({layer.name: x.flatten(0, -2).clone()})):
        model.module(ids)
    return seen


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2", "bert"])
@pytest.mark.parametrize("memory", [2**30, 10_000, 1])
def test_inputs_against_recorded_ones(
    tiny: Callable[[str], LanguageModel], calibration: CalibrationSet, name: str, memory: int
) -> None:
    model = tiny(name)
    layers = find_layers(model.module, "all")
    seen = inputs_of(model, layers, calibration.ids)
    measured = Measurements(model, layers, calibration, memory=memory)
    found = {layer.name: gram for group, gram in measured.grams() for layer in group}
    assert set(found) == set(seen)
    for layer in layers:
        rows = seen[layer.name].double()
        expected = rows.T @ rows
        scale = float(expected.diagonal().max())
        assert torch.allclose(found[layer.name].gram.double(), expected, atol=1e-5 * scale)
        assert torch.allclose(measured.input_norms[layer.name], rows.norm(dim=0), rtol=1e-5)


def test_layers_with_one_input_share_it(
    tiny: Callable[[str], LanguageModel], calibration: CalibrationSet
) -> None:
    model = tiny("llama")
    measured = Measurements(model, find_layers(model.module, 1), calibration, memory=2**30)
    names = [[layer.projection for layer in group] for group in measured.groups]
    assert names == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip


class Counter(Progress):
    def __init__(self) -> None:
        self.totals: list[int] = []
        self.done = 0

    def start(self, total: int, unit: str) -> None:
        self.totals.append(total)

    def advance(self, count: int = 1) -> None:
        self.done += count


def test_one_pass_if_the_memory_holds_all(
    tiny: Callable[[str], LanguageModel], calibration: CalibrationSet
) -> None:
    model = tiny("llama")
    layers = find_layers(model.module, "all", "mlp")
    for memory, passes in ((2**30, 1), (4 * (32**2 + 48**2), 3), (1, 6)):
        progress = Counter()
        measured = Measurements(model, layers, calibration, memory=memory, progress=progress)
        assert len(list(measured.grams())) == 6
        assert progress.totals == [12] * passes
        assert progress.done == 12 * passes


@pytest.mark.parametrize(("memory", "passes"), [(2**30, 1), (4 * (32**2 + 48**2), 6)])
def test_grams_are_kept_where_the_memory_holds_all(
    tiny: Callable[[str], LanguageModel], calibration: CalibrationSet, memory: int, passes: int
) -> None:
    layers = find_layers(tiny("llama").module, "all", "mlp")
    progress = Counter()
    measured = Measurements(tiny("llama"), layers, calibration, memory=memory, progress=progress)
    first, again = list(measured.grams()), list(measured.grams())
    assert len(progress.totals) == passes
    for (layers_first, gram), (layers_again, same) in zip(first, again, strict=True):
        assert layers_first == layers_again
        assert torch.equal(gram.gram, same.gram)


def test_a_quantity_is_measured_once(
    tiny: Callable[[str], LanguageModel], calibration: CalibrationSet
) -> None:
    model = tiny("llama")
    measured = Measurements(model, find_layers(model.module, 1), calibration, memory=1)
    calls: list[int] = []

    def measure() -> Any:
        calls.append(1)
        return torch.ones(1).double().numpy()

    assert measured.once(("a", 1), measure) is measured.once(("a", 1), measure)
    measured.once(("a", 2), measure)
    assert len(calls) == 2


def test_what_cannot_be_measured(calibration: CalibrationSet) -> None:
    model = as_language_model(TINY["llama"]())
    layers = find_layers(model.module, 1, "mlp")
    with pytest.raises(InvalidInput, match="`calibration`"):
        _ = Measurements(model, layers, None, memory=1).calibration
    assert Measurements(model, layers, None, memory=1).described is None
    foreign = CalibrationSet(torch.tensor([[5000]]), "x", {})
    with pytest.raises(InvalidInput, match=r"token.*\b5000\b"):
        Measurements(model, layers, foreign, memory=1)
    model.module.get_submodule("model.layers.1.mlp.gate_proj").weight.fill_(torch.nan)  # type: ignore[operator]
    measured = Measurements(model, layers, calibration, memory=2**20)
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.down_proj.*\bNaN\b"):
        list(measured.grams())
    assert not any(module._forward_hooks for module in model.module.modules())


def test_a_layer_that_does_not_run(calibration: CalibrationSet) -> None:
    module = TINY["llama"]()
    module.add_module("spare", nn.Linear(3, 3))
    model = as_language_model(module)
    measured = Measurements(model, find_layers(module, "spare"), calibration, memory=1)
    with pytest.raises(InvalidInput, match="'spare'"):
        _ = measured.groups
