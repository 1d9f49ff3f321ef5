"""An expansion honours an allocation per row, per expert and per layer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from entangle.allocation import Allocation
from entangle.errors import InvalidInput
from entangle.experts.build import check_shared, planned_experts
from entangle.experts.checkpoint import load_expanded
from entangle.experts.expand import Expansion, expand
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel
from entangle.recording.groups import shared_inputs
from entangle.texts.calibration_set import CalibrationSet
from tests.allocation.samples import random_allocation
from tests.cli.expansions import experts_of
from tests.tiny_models import TINY

DECODERS = [name for name in TINY if name not in ("bert", "mixtral")]
Tiny = Callable[[str], LanguageModel]


def run(
    model: LanguageModel, calibration: CalibrationSet, allocation: Allocation, **settings: object
) -> Expansion:
    chosen: dict[str, object] = {"experts": 3, "restarts": 1, "progress": False, "sparsity": None}
    return expand(model, calibration, allocation=allocation, **{**chosen, **settings})  # type: ignore[arg-type]


def with_experts(allocation: Allocation, *counts: int) -> Allocation:
    """Give the groups gate and up, then down, of each of three blocks these numbers."""
    names = list(allocation.zeros)
    numbers = [counts[2 * (i // 3) + (i % 3 == 2)] for i in range(len(names))]
    return replace(allocation, experts=dict(zip(names, numbers, strict=True)))


@pytest.mark.parametrize("name", DECODERS)
def test_the_zeros_of_every_row_are_the_allocations(
    name: str, tiny: Tiny, calibration: CalibrationSet
) -> None:
    model = tiny(name)
    allocation = random_allocation(model)
    experts = experts_of(run(model, calibration, allocation).model)
    assert list(experts) == list(allocation.zeros)
    for layer, weight in experts.items():
        assert torch.equal((weight == 0).sum(2), allocation.zeros[layer].expand(3, -1))


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_groups_hold_the_zeros_of_their_row(
    name: str, group: int, tiny: Tiny, calibration: CalibrationSet, tmp_path: Path
) -> None:
    model = tiny(name)
    allocation = random_allocation(model, group=group)
    made = run(model, calibration, allocation, out=tmp_path / "x")
    for layer, weight in experts_of(made.model).items():
        groups = (weight == 0).unflatten(2, (-1, group)).sum(3)
        each = allocation.zeros[layer] // groups.shape[2]
        assert torch.equal(groups, each[:, None].expand_as(groups))
    stored = sum(int((w == 0).sum()) for w in experts_of(made.model).values())
    assert stored == 3 * allocation.n_zeros
    loaded = experts_of(load_expanded(tmp_path / "x", base=tiny(name)))
    for layer, weight in experts_of(made.model).items():
        assert torch.equal(weight, loaded[layer])
    assert isinstance(made.manifest["settings"], dict)
    assert made.manifest["settings"]["pattern"] == f"n:{group}"


@pytest.mark.parametrize("pruner", ["wanda", "magnitude", "random"])
def test_for_every_pruner(pruner: str, tiny: Tiny, calibration: CalibrationSet) -> None:
    allocation = random_allocation(tiny("llama"))
    found = run(tiny("llama"), calibration, allocation, experts=1, pruner=pruner)
    for layer, weight in experts_of(found.model).items():
        assert torch.equal((weight[0] == 0).sum(1), allocation.zeros[layer])


def test_attention_layers_can_be_allocated_too(tiny: Tiny, calibration: CalibrationSet) -> None:
    allocation = random_allocation(tiny("llama"), proj=None)
    found = run(tiny("llama"), calibration, allocation, proj=None, experts=2)
    for layer, weight in experts_of(found.model).items():
        assert torch.equal((weight == 0).sum(2), allocation.zeros[layer].expand(2, -1))


def test_layers_have_their_own_numbers_of_experts(
    tiny: Tiny, calibration: CalibrationSet, tmp_path: Path
) -> None:
    allocation = with_experts(random_allocation(tiny("llama")), 4, 1, 2, 2, 1, 3)
    found = run(tiny("llama"), calibration, allocation, out=tmp_path / "x", experts=16)
    weights = experts_of(found.model)
    assert [len(weight) for weight in weights.values()] == [4, 4, 1, 2, 2, 2, 1, 1, 3]
    for layer, weight in weights.items():
        assert torch.equal((weight == 0).sum(2), allocation.zeros[layer].expand(len(weight), -1))
    assert found.layers["experts"].tolist() == [len(weight) for weight in weights.values()]
    settings = found.manifest["settings"]
    assert isinstance(settings, dict)
    assert settings["experts"] == allocation.experts
    assert settings["allocation"]["settings"]["rule"] == "drawn"
    loaded = load_expanded(tmp_path / "x", base=tiny("llama"))
    for layer, weight in experts_of(loaded).items():
        assert torch.equal(weight, weights[layer])


def test_stored_nonzeros_are_counted_over_the_experts(
    tiny: Tiny, calibration: CalibrationSet
) -> None:
    allocation = with_experts(random_allocation(tiny("llama")), 4, 1, 2, 2, 1, 3)
    found = run(tiny("llama"), calibration, allocation)
    assert allocation.experts is not None
    expected = {
        name: allocation.experts[name] * int((allocation.in_features[name] - zeros).sum())
        for name, zeros in allocation.zeros.items()
    }
    assert dict(zip(found.layers["layer"], found.layers["nonzeros"], strict=True)) == expected


def test_equal_numbers_give_the_expansion_of_that_number(
    tiny: Tiny, calibration: CalibrationSet
) -> None:
    allocation = random_allocation(tiny("llama"))
    routed = run(tiny("llama"), calibration, with_experts(allocation, *[2] * 6), experts=16)
    plain = run(tiny("llama"), calibration, allocation, experts=2)
    assert isinstance(routed.manifest["settings"], dict)
    assert routed.manifest["settings"]["experts"] == 2
    for layer, weight in experts_of(plain.model).items():
        assert torch.equal(weight, experts_of(routed.model)[layer])


def test_layers_that_share_a_router_must_agree(tiny: Tiny, calibration: CalibrationSet) -> None:
    model = tiny("llama")
    allocation = random_allocation(model)
    numbers = dict.fromkeys(allocation.zeros, 2) | {"model.layers.1.mlp.up_proj": 3}
    broken = replace(allocation, experts=numbers)
    message = r"'model\.layers\.1\.mlp\.gate_proj'.*'model\.layers\.1\.mlp\.up_proj'.*\b2\b.*\b3\b"
    with pytest.raises(InvalidInput, match=message):
        run(model, calibration, broken)
    groups = shared_inputs(model.module, find_layers(model.module, "all", "mlp"), calibration.ids)
    with pytest.raises(InvalidInput, match=message):
        check_shared(groups, numbers)


def test_what_does_not_fit_is_one_clear_line(
    tiny: Tiny, calibration: CalibrationSet, tmp_path: Path
) -> None:
    model = tiny("llama")
    allocation = random_allocation(model)
    cases: list[tuple[Allocation, dict[str, object], str]] = [
        (random_allocation(tiny("qwen3")), {}, r"allocation.*digest"),
        (allocation, {"proj": None}, r"'model\.layers\.0\.self_attn\.q_proj'"),
        (allocation, {"proj": "up_proj"}, r"includes.*model\.layers\.0\.mlp\.gate"),
        (_transposed(allocation), {}, r"\(48, 32\).*\(32, 48\)"),
        (allocation, {"pattern": "2:4"}, r"`pattern`.*'row'.*'2:4'"),
        (with_experts(allocation, *[500] * 6), {}, r"`experts`.*\b500\b"),
    ]
    for one, settings, message in cases:
        with pytest.raises(InvalidInput, match=message) as caught:
            run(model, calibration, one, out=tmp_path / "x", **settings)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def _transposed(allocation: Allocation) -> Allocation:
    """Give every layer as many rows as it has inputs, and the other way round."""
    widths = {name: len(zeros) for name, zeros in allocation.zeros.items()}
    zeros = {n: torch.zeros(allocation.in_features[n], dtype=torch.int64) for n in widths}
    return replace(allocation, zeros=zeros, in_features=widths)


def test_numbers_of_experts_are_checked(tiny: Tiny) -> None:
    layers = find_layers(tiny("llama").module, 0, "mlp")
    assert planned_experts(layers, None, 5, tokens=9) == {layer.name: 5 for layer in layers}
    with pytest.raises(InvalidInput, match=r"`experts`.*\b1\b.*\bTrue\b"):
        planned_experts(layers, None, True, tokens=9)
