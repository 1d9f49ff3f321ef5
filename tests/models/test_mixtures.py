"""Experts in stacked parameters: every family's are found, named, and run as they do."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from entangle.errors import InvalidInput
from entangle.models.layers import find_layers, list_fused_experts, list_layers
from entangle.models.mixtures import ExpertBank, banks_of, one_by_one, put_layer
from entangle.recording.hooks import changed_rows, observe
from tests.mixtures import DECORATED, FAMILIES, mixture, text

RUNS = [(name, kind) for name in DECORATED for kind in ("eager", "grouped_mm", "batched_mm")]
RUNS += [(name, "its own") for name in FAMILIES if name not in DECORATED]


def experts(module: nn.Module) -> list[Any]:
    return list(find_layers(module, "all", "experts"))


@contextmanager
def compared(banks: list[ExpertBank], found: list[float]) -> Iterator[None]:
    """Hold what a mixture gives against what its class makes of the same arguments."""

    def hold(part: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        own = type(part).forward(part, *args, **kwargs)
        found.append(float((own - output).abs().max()))

    parts = [part for bank in banks for part in bank.runs]
    handles = [part.register_forward_hook(hold, with_kwargs=True) for part in parts]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_recorded_outputs_are_those_of_the_module(name: str, kind: str) -> None:
    module: Any = mixture(name)
    if kind != "its own":
        module.set_experts_implementation(kind)
    before, logits = module.state_dict(), module(text(3, 12)).logits
    layers, banks, found = experts(module), banks_of(module), list[float]()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with compared(banks, found), observe(layers, lambda x, i, o: seen.update({x.name: (i, o)})):
        watched = module(text(3, 12)).logits
    most = 1e-5 if kind == "batched_mm" else 1e-6
    assert len(found) == sum(len(bank.runs) for bank in banks)
    assert max(found) < most
    assert float((watched - logits).abs().max()) < most
    assert module.state_dict().keys() == before.keys()
    assert len(seen) > len(layers) // 2
    for layer in layers:
        if layer.name in seen:
            inputs, outputs = seen[layer.name]
            bias = 0 if layer.bias is None else layer.bias
            torch.testing.assert_close(inputs @ layer.weight.T + bias, outputs)
    assert torch.equal(module(text(3, 12)).logits, logits)  # as fast as it was


@pytest.mark.parametrize("name", FAMILIES)
def test_every_projection_has_one_name(name: str) -> None:
    module = mixture(name)
    layers = experts(module)
    mixtures = {bank.name: bank for bank in banks_of(module)}
    expected = [
        f"{bank.name}.{number}.{key}"
        for bank in mixtures.values() for number in range(4) for key in bank.stacks
    ]  # fmt: skip
    assert sorted(layer.name for layer in layers) == sorted(expected)
    assert all(layer.share == (0.25 if name == "Llama4" else 0.5) for layer in layers)
    assert list_fused_experts(module) == ()
    assert all(one.writable and not one.offloaded and one.block is not None for one in layers)
    assert {one.projection for one in find_layers(module, "all", "mlp")} >= {"down_proj"}


def test_the_rows_are_those_of_the_layout() -> None:
    module = mixture("GptOss")
    own: Any = module.get_submodule("model.layers.1.mlp.experts")
    gate, up, down = find_layers(module, "model.layers.1.mlp.experts.2.*")
    assert torch.equal(gate.weight, own.gate_up_proj[2][:, 0::2].T)
    assert torch.equal(up.weight, own.gate_up_proj[2][:, 1::2].T)
    assert torch.equal(down.weight, own.down_proj[2].T)
    torch.testing.assert_close(up.bias, own.gate_up_proj_bias[2, 1::2], rtol=0, atol=0)
    module = mixture("Dbrx")
    inner: Any = module.get_submodule("transformer.blocks.0.ffn.experts.mlp")
    gate, _, down = find_layers(module, "*.0.ffn.experts.3.*")
    assert torch.equal(gate.weight, inner.w1[3 * 48 :])
    assert torch.equal(down.weight, inner.w2[3 * 48 :].T)
    module = mixture("JetMoe")
    pair: Any = module.get_submodule("model.layers.0.mlp")
    gate, up, down = find_layers(module, "model.layers.0.mlp.experts.1.*")
    assert torch.equal(torch.cat([gate.weight, up.weight]), pair.input_linear.weight[1])
    assert torch.equal(down.weight, pair.output_linear.weight[1])


def test_names_on_disk_are_names() -> None:
    module = mixture("Mixtral")
    for spec, proj, name in (
        ("model.layers.1.block_sparse_moe.experts.2.w1", None, "experts.2.gate_proj"),
        ("*.1.block_sparse_moe.experts.3.w2", None, "experts.3.down_proj"),
        ("*.1.mlp.experts.0.*", "w3", "experts.0.up_proj"),
    ):
        (layer,) = find_layers(module, spec, proj)
        assert layer.name == f"model.layers.1.mlp.{name}"
    with pytest.raises(InvalidInput):
        find_layers(module, "model.layers.1.block_sparse_moe.experts.4.w1")


def test_padding_is_passed_over() -> None:
    module = mixture("Mixtral")
    (bank, *_) = banks_of(module)
    index = torch.tensor([[0, 4], [4, 4], [3, 1]])
    assert {n: p.tolist() for n, p in bank.routed(index)} == {0: [0], 1: [5], 3: [4]}
    x, weights = torch.randn(3, 32), torch.rand(3, 2)
    found = bank.run(bank.home, x, index, weights)
    assert not found[1].any()
    torch.testing.assert_close(found[0], weights[0, 0] * bank.expert(0, x[:1])[0])


def test_rows_are_changed_for_a_while() -> None:
    module: Any = mixture("Qwen3Moe")
    (layer,) = find_layers(module, "model.layers.1.mlp.experts.0.down_proj")
    before, ids = module(text(2, 9)).logits, text(2, 9)
    rows = torch.tensor([1, 4])
    with changed_rows([(layer, rows, torch.zeros(2, 16))]):
        assert not module.model.layers[1].mlp.experts.down_proj[0][rows].any()
        assert not torch.equal(module(ids).logits, before)
    assert torch.equal(module(ids).logits, before)


def test_another_module_in_an_experts_place_runs() -> None:
    module: Any = mixture("Olmoe")
    ids, name = text(2, 9), "model.layers.0.mlp.experts.1.up_proj"
    before, (own,) = module(ids).logits, find_layers(module, name)
    same = nn.Linear(32, 48, bias=False)
    same.weight.data.copy_(own.weight)
    copied = copy.deepcopy(module)
    put_layer(copied, name, same)
    torch.testing.assert_close(copied(ids).logits, before)
    same.weight.data.zero_()
    assert not torch.allclose(copied(ids).logits, before)
    assert torch.equal(module(ids).logits, before)
    put_layer(copied, name, find_layers(copied, name.replace("1.up", "2.up"))[0].module)
    home = copied.get_submodule("model.layers.0.mlp.experts")
    assert "forward" not in home.__dict__


def test_nested_and_failing_runs_leave_the_module_alone() -> None:
    module = mixture("Mixtral")
    modules, part = [layer.module for layer in experts(module)], banks_of(module)[0].runs[0]
    with pytest.raises(ZeroDivisionError), one_by_one(modules), one_by_one(modules[:1]):
        raise ZeroDivisionError
    assert "forward" not in part.__dict__


class Packed(nn.Module):
    """Experts of one byte a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 8, dtype=torch.int8), False)
        self.down_proj = nn.Parameter(torch.zeros(4, 8, 8, dtype=torch.int8), False)


def test_quantised_experts_are_refused_by_name() -> None:
    module = mixture("Mixtral")
    module.get_submodule("model.layers.2.mlp").experts = Packed()
    assert [one.name.rpartition(".")[2] for one in list_fused_experts(module)] == [
        "gate_up_proj", "down_proj"
    ]  # fmt: skip
    for spec in ("model.layers.2.mlp.experts", "model.layers.2.mlp.experts.0.gate_proj"):
        with pytest.raises(
            InvalidInput, match=r"model\.layers\.2\.mlp\.experts.*quantised.*Packed"
        ):
            find_layers(module, spec)
    assert not any(layer.is_expert for layer in list_layers(module) if layer.block == 2)
