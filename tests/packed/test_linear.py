"""Modules of packed experts: routed once, compiled in one graph, and gated MLPs found."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from entangle.errors import InvalidInput
from entangle.packed.formats import pack
from entangle.packed.linear import Gating, PackedGated, PackedLinear, PackedRouter, gating_of
from tests.tiny_models import CONFIGS


def router(k: int = 4, features: int = 20, kind: str = "kmeans") -> PackedRouter:
    made, rng = PackedRouter(kind, k, features), torch.Generator().manual_seed(0)
    for name, buffer in made.named_buffers():
        if name == "key":
            buffer.copy_(torch.randint(-(2**62), 2**62, buffer.shape, generator=rng) | 1)
        else:
            buffer.copy_(torch.randn(buffer.shape, generator=rng))
    return made


def layer(rows: int = 6, cols: int = 20, own: PackedRouter | None = None) -> PackedLinear:
    rng, k = torch.Generator().manual_seed(rows), 1 if own is None else own.experts
    weight = torch.randn(k, rows, cols, generator=rng)
    weight *= torch.rand(k, rows, cols, generator=rng) < 0.4
    layout, tensors = pack(weight)
    return PackedLinear.of(layout, tensors, torch.randn(rows, generator=rng), own, torch.float32)


@pytest.mark.parametrize("kind", ["kmeans", "random"])
def test_every_token_goes_through_its_expert(kind: str) -> None:
    one = layer(own=router(kind=kind))
    x = torch.randn(2, 3, 20)
    clusters, found = one.clusters(x), one(x)
    assert found.shape == (2, 3, 6)
    for token, expert, output in zip(x.flatten(0, 1), clusters, found.flatten(0, 1), strict=True):
        torch.testing.assert_close(output, one.dense(int(expert)) @ token + one.bias)


def test_a_single_expert_has_no_router() -> None:
    one, x = layer(), torch.randn(3, 20)
    torch.testing.assert_close(one(x), nn.functional.linear(x, one.dense(0), one.bias))
    with pytest.raises(InvalidInput):
        PackedLinear.of(*pack(torch.ones(2, 3, 4)), None, None, torch.float32)
    with pytest.raises(InvalidInput):
        PackedLinear.of(*pack(torch.ones(2, 3, 4)), None, router(3, 4), torch.float32)


def test_what_one_input_is_routed_to_is_kept_until_it_changes() -> None:
    torch.manual_seed(0)
    shared, calls = router(), []
    route = shared._route
    shared._route = lambda x: calls.append(1) or route(x)  # type: ignore[method-assign, func-returns-value]
    first, second, x = layer(own=shared), layer(7, own=shared), torch.randn(5, 20)
    first(x), second(x)
    assert len(calls) == 1
    x.neg_()
    torch.testing.assert_close(first.clusters(x), route(x))
    assert len(calls) == 2
    assert copy.deepcopy(shared)._last is None
    with torch.inference_mode():
        y = torch.randn(5, 20)
        before = first.clusters(y).clone()
        y.neg_()
        assert not torch.equal(first.clusters(y), before)


def test_gradients_are_refused() -> None:
    one, x = layer(), torch.randn(2, 20, requires_grad=True)
    with pytest.raises(InvalidInput):
        one(x)
    with torch.no_grad():
        one(x)


def test_autocast_gives_its_dtype() -> None:
    one, x = layer(own=router()), torch.randn(4, 20)
    with torch.autocast("cpu", torch.bfloat16):
        found = one(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), one(x), rtol=0.05, atol=0.05)


def mlp(name: str) -> tuple[str, nn.Module]:
    kind, settings = CONFIGS[name]
    auto: Any = hf.AutoModelForCausalLM
    model = auto.from_config(getattr(hf, kind)(**settings))
    return next((n, m) for n, m in model.named_modules() if n.endswith(".mlp"))


@pytest.mark.parametrize(
    ("name", "activation"), [("llama", "silu"), ("gemma3", "gelu_tanh"), ("qwen3", "silu")]
)
def test_gated_mlps_are_found(name: str, activation: str) -> None:
    module, names = mlp(name)[1], ("up_proj", "gate_proj")
    assert gating_of(module, names) == Gating("gate_proj", "up_proj", "down_proj", activation)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.c(nn.functional.silu(self.a(x)) * self.b(x) * 2)
        return found


def test_other_mlps_are_left() -> None:
    assert gating_of(Odd(), ("a", "b")) is None
    assert gating_of(mlp("gpt_neox")[1], ("dense_h_to_4h", "dense_4h_to_h")) is None


def test_a_gated_mlp_computes_what_its_layers_do() -> None:
    shared = router()
    gate, up, down = layer(9, own=shared), layer(9, own=shared), nn.Linear(9, 20)
    down.requires_grad_(False)
    module = PackedGated(Gating("w1", "w3", "w2", "silu"), gate, up, down)
    x = torch.randn(2, 3, 20)
    torch.testing.assert_close(module(x), down(nn.functional.silu(gate(x)) * up(x)))
    assert {n.partition(".")[0] for n, _ in module.named_parameters()} == {"w1", "w3", "w2"}


COMPILED = """
import torch
from torch import nn
from tests.packed.test_linear import layer, router
from entangle.packed.linear import Gating, PackedGated
shared = router()
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = shared
        down = nn.Linear(9, 20).requires_grad_(False)
        pair = layer(9, own=shared), layer(9, own=shared)
        self.mlp = PackedGated(Gating("g", "u", "d", "silu"), *pair, down)
        self.last = layer(own=router(kind="random"))
    def forward(self, x):
        return self.last(self.mlp(x))
block, x = Block(), torch.randn(2, 3, 20)
with torch.no_grad():
    found = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, block(x))
one = torch.export.export(block, (x,)).graph_module.code
assert all(name in one for name in ("sparse_linear", "sparse_gated", "sparse_route")), one
"""


def test_a_graph_is_compiled_whole() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
