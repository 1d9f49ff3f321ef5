import signal
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from entangle.errors import InvalidInput, UnknownName
from entangle.models.layers import Layer, find_layers, list_layers
from entangle.models.loading import LanguageModel
from entangle.recording.hooks import SeenTensor, edit, forward, observe
from entangle.texts.calibration_set import CalibrationSet
from tests.recording.toys import Toy
from tests.tiny_models import CONFIGS

Tiny = Callable[[str], LanguageModel]
CountHooks = Callable[[nn.Module], int]
ARCHITECTURES = sorted(CONFIGS)


def nothing(layer: Layer, inputs: Tensor, outputs: Tensor) -> None:
    pass


def last_hidden(module: nn.Module, ids: Tensor) -> Tensor:
    output = module(ids)
    value = getattr(output, "logits", None)
    tensor: Tensor = output[0] if value is None else value
    return tensor


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_output_is_the_same_bits_with_and_without(
    name: str, tiny: Tiny, calibration: CalibrationSet, count_hooks: CountHooks
) -> None:
    module = tiny(name).module
    before = count_hooks(module)
    plain = last_hidden(module, calibration.ids)
    seen: set[str] = set()

    def check(layer: Layer, inputs: Tensor, outputs: Tensor) -> None:
        again = inputs @ layer.weight.T + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(outputs, again, rtol=1e-4, atol=1e-5)
        assert not inputs.requires_grad
        assert not outputs.requires_grad
        seen.add(layer.name)

    with observe(list_layers(module), check):
        observed = last_hidden(module, calibration.ids)
    assert torch.equal(plain, observed)
    assert count_hooks(module) == before
    assert seen == {layer.name for layer in list_layers(module)}


def test_no_hook_is_left_after_an_error_in_the_model(tiny: Tiny, count_hooks: CountHooks) -> None:
    module = tiny("llama").module
    outside = torch.full((1, 4), 5000)
    with pytest.raises(IndexError), observe(list_layers(module), nothing):
        module(outside)
    assert count_hooks(module) == 0


def test_no_hook_is_left_when_one_cannot_be_registered(
    tiny: Tiny, count_hooks: CountHooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny("llama").module
    layers = list_layers(module)

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(layers[3].module, "register_forward_hook", refuse)
    with pytest.raises(RuntimeError, match="no"), observe(layers, nothing):
        pytest.fail("the block must not run")
    assert count_hooks(module) == 0


def test_wrong_names_never_reach_a_hook(tiny: Tiny, count_hooks: CountHooks) -> None:
    module = tiny("llama").module
    with pytest.raises(UnknownName):
        find_layers(module, ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.gate"])
    assert count_hooks(module) == 0


def test_nested_blocks_see_the_same_and_end_apart(
    tiny: Tiny, calibration: CalibrationSet, count_hooks: CountHooks
) -> None:
    module = tiny("llama").module
    layers = find_layers(module, 1, "gate_proj")
    outer: list[Tensor] = []
    inner: list[Tensor] = []
    with observe(layers, lambda _layer, _inputs, outputs: outer.append(outputs)):
        with observe(layers, lambda _layer, _inputs, outputs: inner.append(outputs)):
            assert count_hooks(module) == 2
            module(calibration.ids)
        assert count_hooks(module) == 1
        module(calibration.ids)
    assert count_hooks(module) == 0
    assert (len(outer), len(inner)) == (2, 1)
    assert torch.equal(outer[0], inner[0])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_edit_takes_the_place_of_the_output(
    name: str, tiny: Tiny, calibration: CalibrationSet, count_hooks: CountHooks
) -> None:
    module = tiny(name).module
    layers, plain = find_layers(module, 1), last_hidden(module, calibration.ids)
    seen: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}

    def note(layer: Layer, _inputs: Tensor, outputs: Tensor) -> None:
        seen[layer.name].append(outputs.clone())  # Falcon adds to it in place

    halves = [(layer, lambda output: output / 2) for layer in layers]
    with observe(layers, note), edit(halves), observe(layers, note):
        assert not torch.equal(last_hidden(module, calibration.ids), plain)
    for before, after in seen.values():
        assert torch.equal(after, before / 2)
    assert count_hooks(module) == 0
    with edit([(layer, lambda output: output) for layer in layers]), edit([]):
        assert torch.equal(last_hidden(module, calibration.ids), plain)


def test_edits_run_in_the_order_of_registration(
    calibration: CalibrationSet, count_hooks: CountHooks
) -> None:
    toy = Toy()
    add, double = (lambda y: y + 1), (lambda y: y * 2)
    a, c = find_layers(toy, ["a", "c"])
    plain = toy(calibration.ids)
    with edit([(c, add), (c, double)]):
        assert torch.equal(toy(calibration.ids), (plain + 1) * 2)
    with edit([(c, double)]):
        with edit([(a, torch.zeros_like), (c, add)]):
            assert count_hooks(toy) == 3
            rest = toy.c(toy.b(torch.zeros(12, 16, 8)))  # also edited
            assert torch.equal(toy(calibration.ids), rest)
        assert torch.equal(toy(calibration.ids), plain * 2)
    assert count_hooks(toy) == 0


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda y: y[..., :4], r"\(12, 16, 4\) of torch.float32 on cpu"),
        (lambda y: y.double(), r"\(12, 16, 8\) of torch.float64 on cpu"),
        (lambda y: y.to("meta"), "on meta"),
        (lambda y: None, "NoneType"),
    ],
)
def test_an_edit_must_keep_shape_dtype_and_device(
    function: Callable[[Tensor], Tensor], found: str, calibration: CalibrationSet
) -> None:
    toy = Toy()
    message = rf"'b'.*\(12, 16, 8\).*torch\.float32.*{found}"
    with pytest.raises(InvalidInput, match=message), edit([(find_layers(toy, "b")[0], function)]):
        toy(calibration.ids)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_no_edit_is_left_after_an_error(
    error: type[BaseException], tiny: Tiny, calibration: CalibrationSet, count_hooks: CountHooks
) -> None:
    module = tiny("llama").module

    def fail(_output: Tensor) -> Tensor:
        assert count_hooks(module) == 7
        if error is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
        raise error("in the edit")

    with pytest.raises(error), edit([(layer, fail) for layer in find_layers(module, 1)]):
        module(calibration.ids)
    assert count_hooks(module) == 0


def test_no_edit_is_left_when_one_cannot_be_registered(
    tiny: Tiny, count_hooks: CountHooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny("llama").module
    layers = list_layers(module)

    def refuse(_hook: object, **_options: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(layers[3].module, "register_forward_hook", refuse)
    edits = [(layer, torch.zeros_like) for layer in layers]
    with pytest.raises(RuntimeError, match="no"), edit(edits):
        pytest.fail("the block must not run")
    assert count_hooks(module) == 0


def test_forward_keeps_no_cache_and_no_gradient(tiny: Tiny, calibration: CalibrationSet) -> None:
    output: object = forward(tiny("llama").module.requires_grad_(), calibration.ids)
    tiny("llama").module.requires_grad_(requires_grad=False)
    logits = getattr(output, "logits", None)
    assert getattr(output, "past_key_values", None) is None
    assert isinstance(logits, Tensor)
    assert logits.shape == (12, 1, 112)
    assert not logits.requires_grad
    full = forward(tiny("llama").module, calibration.ids, all_logits=True)
    assert getattr(full, "logits", logits).shape == (12, 16, 112)


def test_a_tensor_is_known_again_until_it_is_written_to() -> None:
    x = torch.arange(6.0)
    seen = SeenTensor.of(x.detach())
    assert seen.same_as(x)
    assert seen.same_as(x.view(6))
    assert not seen.same_as(x.clone())
    assert not seen.same_as(x[:5])
    assert not seen.same_as(x.view(2, 3))
    assert not SeenTensor.of(x[:2]).same_as(x[::3])
    x.add_(1)
    assert not seen.same_as(x)
    assert SeenTensor.of(x).same_as(x.detach())
