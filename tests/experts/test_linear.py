import copy
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.experts.linear import ExpandedLinear, SharedRouting, pack, unpack
from entangle.experts.router import Router, fit_router


def fitted(features: int, k: int, *, seed: int = 0) -> Router:
    rng = torch.Generator().manual_seed(seed)
    return fit_router([torch.randn(400, features, generator=rng)], k, seed=seed, restarts=2)


def make(features: int = 6, out: int = 5, k: int = 3, *, bias: bool = True) -> ExpandedLinear:
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(k, out, features, generator=rng)
    offset = torch.randn(out, generator=rng) if bias else None
    return ExpandedLinear(weight, offset, SharedRouting(fitted(features, k)))


def one_by_one(layer: ExpandedLinear, tokens: Tensor) -> Tensor:
    """Send every token alone through the expert of its cluster."""
    outputs = []
    for token in tokens.reshape(-1, tokens.shape[-1]):
        expert = layer.weight[int(layer.routing.router.route(token[None]))]
        value = expert @ token
        outputs.append(value if layer.bias is None else value + layer.bias)
    return torch.stack(outputs).reshape(*tokens.shape[:-1], -1)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (40, 6), (2, 7, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_every_token_goes_through_its_own_expert_in_its_place(
    shape: tuple[int, ...], bias: bool
) -> None:
    layer = make(bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(x), one_by_one(layer, x), rtol=1e-5, atol=1e-5)


def test_no_token_gives_no_output() -> None:
    assert make()(torch.empty(0, 6)).shape == (0, 5)


def test_with_one_expert_it_is_the_linear_layer() -> None:
    weight = torch.randn(1, 5, 6)
    router = fit_router([torch.randn(20, 6)], 1, seed=0, kind="single")
    x = torch.randn(3, 4, 6)
    expected = torch.nn.functional.linear(x, weight[0])
    torch.testing.assert_close(ExpandedLinear(weight, None, SharedRouting(router))(x), expected)


def test_hand_worked_routing() -> None:
    # One component along the first axis, centroids at −1 and 1: the sign of x₀ chooses the expert.
    router = fit_router(
        [torch.tensor([[-1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])], 2, seed=0
    )
    left = int(router.route(torch.tensor([[-3.0, 5.0]])))
    weight = torch.zeros(2, 1, 2)
    weight[left] = torch.tensor([[1.0, 10.0]])
    weight[1 - left] = torch.tensor([[2.0, 0.0]])
    layer = ExpandedLinear(weight, torch.tensor([0.5]), SharedRouting(router))
    x = torch.tensor([[[-3.0, 5.0], [3.0, 5.0], [-1.0, 1.0]]])
    assert layer(x).flatten().tolist() == [47.5, 6.5, 9.5]


def test_layers_that_share_an_input_route_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make()
    other = ExpandedLinear(torch.randn(3, 2, 6), None, layer.routing)
    routed: list[int] = []
    plain = Router.route

    def spy(self: Router, x: Tensor) -> Tensor:
        routed.append(x.shape[0])
        return plain(self, x)

    monkeypatch.setattr(Router, "route", spy)
    x = torch.randn(9, 6)
    layer(x)
    other(x)
    assert routed == [9]
    x += 1.0  # the same tensor with other values is routed again
    torch.testing.assert_close(other(x), one_by_one(other, x), rtol=1e-5, atol=1e-5)
    assert len(routed) > 1


def test_half_precision_stays_half() -> None:
    layer = make().to(torch.bfloat16)
    assert layer(torch.randn(4, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_experts_must_fit_the_router() -> None:
    with pytest.raises(InvalidInput, match="one expert a cluster"):
        ExpandedLinear(torch.randn(2, 5, 6), None, SharedRouting(fitted(6, 3)))


def test_inference_mode_gives_the_same_outputs() -> None:
    layer = make()
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(2))
    expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x.clone()), expected)
        inside = x.clone()
        first = layer(inside)
        inside.mul_(-1)
        assert torch.equal(layer(inside), layer(-x))
        assert torch.equal(first, expected)


def test_autocast_gives_the_dtype_of_a_dense_layer() -> None:
    layer = make()
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
        assert layer(x[:0]).dtype == torch.bfloat16
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(x), rtol=0.05, atol=0.05)


def test_the_input_is_not_kept_and_copies_do_not_hold_it() -> None:
    layer = make()
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(2))
    held = weakref.ref(x)
    layer(x)
    del x
    assert held() is None
    start = torch.randn(9, 6, requires_grad=True)
    product = start * 2
    expected = layer(product)
    assert torch.equal(copy.deepcopy(layer)(product), expected)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 19)),
    kept=st.floats(0.0, 1.0),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_packing_keeps_every_bit(
    shape: tuple[int, ...], kept: float, dtype: torch.dtype, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=rng).to(dtype)
    weight = weight * (torch.rand(shape, generator=rng) < kept)
    bitmap, values = pack(weight)
    assert values.numel() == int((weight != 0).sum())
    assert bitmap.numel() == (weight.numel() + 7) // 8
    assert torch.equal(unpack((bitmap, values), shape), weight)


def test_a_packed_row_by_hand() -> None:
    bitmap, values = pack(torch.tensor([[0.0, 2.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 4.0]]))
    assert bitmap.tolist() == [0b01001000, 0b10000000]
    assert values.tolist() == [2.0, 3.0, 4.0]


def test_what_does_not_fit_is_refused() -> None:
    bitmap, values = pack(torch.ones(2, 9))
    with pytest.raises(InvalidInput, match="8 bits"):
        unpack((bitmap, values), (8,))
    with pytest.raises(InvalidInput, match="18 places"):
        unpack((bitmap, values[:-1]), (2, 9))
