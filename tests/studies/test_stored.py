"""What weights look like after their source was quantised, pruned or neither."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import entangle
from entangle.models.loading import LanguageModel
from entangle.seeding import torch_rng
from entangle.studies import stored
from entangle.studies.stored import BITS, FLOATS, MANTISSA, Form, stored_as
from tests.tiny_models import TINY


@pytest.fixture
def model() -> LanguageModel:
    """A model whose weights are written to; 9 are looked at."""
    return entangle.load_model(TINY["llama"]())


def weights(model: LanguageModel) -> list[Tensor]:
    return [
        model.module.get_parameter(f"model.layers.{block}.mlp.{name}_proj.weight").data
        for block in range(3) for name in ("gate", "up", "down")
    ]  # fmt: skip


def gaussian(like: Tensor, seed: int = 0) -> Tensor:
    return 0.03 * torch.randn(like.shape, generator=torch_rng(seed, "weights"))


def whole(weight: Tensor, bits: int = 8, *, offset: float = 0.0) -> Tensor:
    """Every row in whole steps of its own, from an offset of so many."""
    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    made: Tensor = ((weight / step).round() + offset) * step
    return made


def eighth(weight: Tensor, kind: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Every row as floats of 8 bits with a scale of its own."""
    scale = weight.abs().amax(1, keepdim=True) / torch.finfo(kind).max
    return (weight / scale).to(kind).float() * scale


def book(weight: Tensor, size: int) -> Tensor:
    """All rows with one codebook."""
    codes = weight.flatten().quantile((torch.arange(size) + 0.5) / size)
    return codes[(weight[..., None] - codes).abs().argmin(-1)]


def form(weight: Tensor) -> Form:
    layer: Any = SimpleNamespace(offloaded=False, in_features=weight.shape[1], weight=weight)
    return stored._form(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forms(dtype: torch.dtype) -> None:
    weight = 0.03 * torch.randn(48, 64, generator=torch_rng(0, "weights"))
    expected: list[tuple[Tensor, Form]] = [
        (weight, (FLOATS, 0)), (weight + 0.03, (FLOATS, 0)), (weight * weight.abs(), (FLOATS, 0)),
        (whole(weight, 6), (BITS, 6)), (whole(weight), (BITS, 8)),
        (whole(weight, offset=0.3), (BITS, 8)), (eighth(weight), (MANTISSA, 3)),
        (eighth(weight, torch.float8_e5m2), (MANTISSA, 2)), (book(weight, 60), (BITS, 6)),
        (book(weight, 200), (BITS, 8)),
    ]  # fmt: skip
    weight = weight.clone()
    weight[::2] = 0.0  # rows that are pruned whole say nothing of the others
    expected.append((weight, (FLOATS, 0)))
    assert [form(one.to(dtype)) for one, _ in expected] == [said for _, said in expected]


@pytest.mark.parametrize(("steps", "bits"), [(7, 4), (15, 5), (31, 6), (127, 8)])
def test_whole_numbers(steps: int, bits: int) -> None:
    codes = torch.randint(-steps, steps + 1, (48, 64), generator=torch_rng(0, "codes"))
    assert form((0.003 * codes).bfloat16()) == (BITS, bits)


def test_where_weights_differ(model: LanguageModel) -> None:
    first, *others = weights(model)
    for own in others:
        own.copy_(gaussian(own).bfloat16())
    assert stored_as(model) == "float32"
    first.copy_(whole(gaussian(first)))
    assert stored_as(model).startswith(
        "float32; of 9 weights looked at, 1: quantised, about 8 bits"
    )
    dense = gaussian(first)
    first.copy_(torch.where(dense.abs() < dense.abs().median(1, keepdim=True)[0], 0, dense))
    assert "1: 15 zeros among 32 neighbours" in stored_as(model)  # pruned, not quantised


def test_what_cannot_be_told(model: LanguageModel) -> None:
    """Rounding to 16 bits leaves even steps between numbers that are all about one."""
    for own in weights(model):
        own.copy_((1 + gaussian(own)).bfloat16())
    assert stored_as(model).startswith("float32, not told from quantised ones")
    assert form(1 + gaussian(weights(model)[0])) == (FLOATS, 0)


def test_a_model_without_feed_forward_parts_is_told_as_such() -> None:
    from tests.tiny_models import build_other

    found = stored_as(entangle.load_model(build_other("mamba")))
    assert found == "float32, not looked at (no feed-forward parts)"
