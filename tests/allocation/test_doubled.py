from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from entangle.allocation.losses import aligner
from entangle.allocation.measurements import Measurements
from entangle.models.blocks import BlockRunner
from entangle.models.layers import Layer, find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.recording.hooks import observe
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import TINY


def norms_of(run: Callable[[], object], layers: tuple[Layer, ...]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def note(layer: Layer, inputs: Tensor, _outputs: Tensor) -> None:
        seen[layer.name] = inputs.flatten(0, -2).double().norm(dim=0)

    with observe(layers, note):
        run()
    return seen


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2", "gemma3"])
def test_against_a_block_by_block_run(calibration: CalibrationSet, name: str) -> None:
    """Run each block dense and pruned by hand, on the outputs of the pruned ones before it."""
    model = as_language_model(TINY[name]())
    layers = find_layers(model.module, "all")
    measured = Measurements(model, layers, calibration, memory=1)
    rng = torch.Generator().manual_seed(0)
    sparsity = {
        layer.name: 0.2 + 0.6 * torch.rand(layer.out_features, generator=rng).double()
        for layer in layers
    }
    with aligner(measured) as align:
        first = align(sparsity)
        again = align(sparsity)
    assert first.error == again.error
    runner, ids = BlockRunner(model.module), calibration.ids[:8]
    hidden, inputs = runner.enter(ids)
    error = 0.0
    for block in range(3):
        own = tuple(layer for layer in layers if layer.block == block)
        states = hidden
        dense = norms_of(lambda b=block, h=states: runner.run(b, h, inputs), own)  # type: ignore[misc]
        kept = [layer.weight.clone() for layer in own]
        for layer in own:
            for row, share in zip(layer.weight, sparsity[layer.name].tolist(), strict=True):
                order = (row.abs().double() * dense[layer.name]).argsort()
                row[order[: int(share * layer.in_features)]] = 0
        sparse = norms_of(lambda b=block, h=states: runner.run(b, h, inputs), own)  # type: ignore[misc]
        hidden = runner.run(block, hidden, inputs)
        for layer, weight in zip(own, kept, strict=True):
            layer.weight.copy_(weight)
            before, after = dense[layer.name], sparse[layer.name]
            error += float((before / before.sum() - after / after.sum()).norm()) / len(before)
            expected = before - after
            scale = float(before.max())
            assert torch.allclose(first.difference[layer.name], expected, atol=1e-5 * scale)
    assert first.error == pytest.approx(error, rel=1e-4)


def test_dense_is_aligned_and_nothing_stays_behind(
    tiny: Callable[[str], LanguageModel],
    calibration: CalibrationSet,
    count_hooks: Callable[[torch.nn.Module], int],
) -> None:
    model = tiny("llama")
    layers = find_layers(model.module, "all")
    before = [parameter.clone() for parameter in model.module.parameters()]
    forwards = [dict(block.__dict__) for block in model.module.get_submodule("model.layers")]  # type: ignore[attr-defined]
    zero = {layer.name: torch.zeros(layer.out_features).double() for layer in layers}
    with aligner(Measurements(model, layers, calibration, memory=1)) as align:
        assert align(zero).error == 0
        assert align({name: one + 1 for name, one in zero.items()}).error > 0
    assert count_hooks(model.module) == 0
    after = list(model.module.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    blocks = model.module.get_submodule("model.layers")
    assert [set(block.__dict__) for block in blocks] == [set(one) for one in forwards]  # type: ignore[attr-defined]


def test_weights_come_back_after_an_error(calibration: CalibrationSet) -> None:
    model = as_language_model(TINY["llama"]())
    layers = find_layers(model.module, "all", "mlp")
    before = [layer.weight.clone() for layer in layers]
    half = {layer.name: torch.full((layer.out_features,), 0.5).double() for layer in layers}
    broken = {name: one for name, one in half.items() if name != layers[-1].name}
    with aligner(Measurements(model, layers, calibration, memory=1)) as align:
        with pytest.raises(KeyError, match="down_proj"):
            align(broken)
        assert align(half).error > 0
    assert all(torch.equal(a, b.weight) for a, b in zip(before, layers, strict=True))


def test_layers_outside_the_blocks_are_left_alone(
    tiny: Callable[[str], LanguageModel], calibration: CalibrationSet
) -> None:
    model = tiny("opt")
    layers = (*find_layers(model.module, 1, "fc1"), *find_layers(model.module, "lm_head"))
    full = {layer.name: torch.ones(layer.out_features).double() for layer in layers}
    with aligner(Measurements(model, layers, calibration, memory=1)) as align:
        assert set(align(full).difference) == {layers[0].name}
