import pytest
import torch
from torch import Tensor, nn

from entangle.errors import InvalidInput, UnknownName
from entangle.experts.linear import RowExperts, SharedRouting, installed
from entangle.experts.router import fit_router
from entangle.models.layers import Layer, find_layers
from entangle.seeding import torch_rng
from tests.reference.routed_rows import routed_outputs
from tests.tiny_models import TINY

FAMILIES = ["llama", "gpt2", "gpt_neox", "opt", "gemma3", "phi3"]
ROWS = torch.tensor([5, 0, 17])


def mlp_layers(name: str) -> tuple[Layer, ...]:
    return find_layers(TINY[name](), 1, "mlp")


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch_rng(0, "row experts", *shape))


def routing_for(layer: Layer, k: int = 3) -> SharedRouting:
    return SharedRouting(fit_router([noise(60, layer.in_features)], k, seed=0, restarts=2))


def experts_for(layer: Layer, k: int = 3) -> Tensor:
    return layer.weight[ROWS] * (noise(k, len(ROWS), layer.in_features) > 0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("batch", [(2, 9), (11,), (), (2, 3, 4), (0,)])
def test_every_token_goes_through_its_own_expert(name: str, batch: tuple[int, ...]) -> None:
    for layer in mlp_layers(name):
        routing, weight = routing_for(layer), experts_for(layer)
        x = noise(*batch, layer.in_features)
        found = RowExperts(layer, ROWS, weight, routing)(x)
        dense = layer.module(x)
        others = torch.ones(layer.out_features, dtype=torch.bool)
        others[ROWS] = False
        assert torch.equal(found[..., others], dense[..., others])
        tokens = x.reshape(-1, layer.in_features)
        clusters = [int(routing.router.route(token)) for token in tokens]
        bias = None if layer.bias is None else layer.bias[ROWS].double().numpy()
        expected = routed_outputs(tokens.double().numpy(), clusters, weight.double().numpy(), bias)
        chosen = found[..., ROWS].reshape(-1, len(ROWS)).double()
        torch.testing.assert_close(chosen, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
        assert len(tokens) < 9 or len(set(clusters)) > 1


def test_a_single_expert_needs_no_routing() -> None:
    layer = mlp_layers("gpt2")[0]
    x, weight = noise(2, 5, layer.in_features), experts_for(layer, 1)
    found = RowExperts(layer, ROWS, weight)(x)
    assert layer.bias is not None
    expected = x @ weight[0].T + layer.bias[ROWS]
    torch.testing.assert_close(found[..., ROWS], expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_equal_to_the_dense_rows_change_no_bit(name: str) -> None:
    for layer in mlp_layers(name):
        same = layer.weight[ROWS].expand(3, -1, -1).clone()
        x = noise(4, 33, layer.in_features)
        module = RowExperts(layer, ROWS, same, routing_for(layer))
        assert torch.equal(module(x), layer.module(x))
        same[2, 1, 0] += 1
        assert not torch.equal(
            RowExperts(layer, ROWS, same, routing_for(layer))(x), layer.module(x)
        )


def test_the_dense_output_itself_is_not_written_to() -> None:
    layer = mlp_layers("llama")[0]
    x, seen = noise(7, layer.in_features), []
    with layer.module.register_forward_hook(lambda _m, _a, output: seen.append(output)):
        RowExperts(layer, ROWS, experts_for(layer), routing_for(layer))(x)
    assert torch.equal(seen[0], layer.module(x))


def test_the_dtype_is_that_of_the_dense_output() -> None:
    layer = find_layers(TINY["llama"]().to(torch.bfloat16), 1, "up_proj")[0]
    module = RowExperts(layer, ROWS, experts_for(layer), routing_for(layer))
    assert module.weight.dtype == torch.bfloat16
    x = noise(5, layer.in_features).to(torch.bfloat16)
    assert module(x).dtype == torch.bfloat16


def test_layers_of_one_input_route_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llama"]()
    gate, up = (find_layers(model, 1, proj)[0] for proj in ("gate_proj", "up_proj"))
    routing = routing_for(gate)
    calls, plain = [], type(routing.router).route

    def counted(self: object, x: Tensor) -> Tensor:
        calls.append(x.shape)
        return plain(self, x)  # type: ignore[arg-type]

    monkeypatch.setattr(type(routing.router), "route", counted)
    modules = {one.name: RowExperts(one, ROWS, experts_for(one), routing) for one in (gate, up)}
    with installed(model, modules):
        model(torch.arange(20)[None])
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("rows", "shape", "k", "message"),
    [
        ([0, 0, 1], (3, 3, 32), 3, r"`rows`.*different"),
        ([0, 1, 48], (3, 3, 32), 3, r"`rows`.*different"),
        ([-1, 1, 4], (3, 3, 32), 3, r"`rows`.*different"),
        ([0, 1, 2], (3, 3, 31), 3, r"`weight`.*shape"),
        ([0, 1, 2], (2, 3, 32), 3, r"`weight`.*shape"),
        ([0, 1, 2], (2, 3, 32), None, r"`routing`.*\bNone\b"),
    ],
)
def test_what_does_not_fit_is_refused(
    rows: list[int], shape: tuple[int, ...], k: int | None, message: str
) -> None:
    layer = mlp_layers("llama")[0]
    routing = None if k is None else routing_for(layer, k)
    with pytest.raises(InvalidInput, match=message):
        RowExperts(layer, torch.tensor(rows), noise(*shape), routing)


def test_a_routing_of_another_width_is_refused() -> None:
    gate, _, down = mlp_layers("llama")
    with pytest.raises(InvalidInput, match=r"`routing`.*\b32\b"):
        RowExperts(gate, ROWS, experts_for(gate), routing_for(down))


def snapshot(model: nn.Module) -> tuple[list[tuple[str, int]], dict[str, Tensor]]:
    modules = [(name, id(child)) for name, child in model.named_modules()]
    return modules, {name: value.clone() for name, value in model.state_dict().items()}


def assert_restored(
    model: nn.Module, before: tuple[list[tuple[str, int]], dict[str, Tensor]]
) -> None:
    modules, tensors = snapshot(model)
    assert modules == before[0]
    assert list(tensors) == list(before[1])
    assert all(torch.equal(value, before[1][name]) for name, value in tensors.items())


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_originals_come_back(name: str, error: type[BaseException] | None) -> None:
    model = TINY[name]()
    ids, before = torch.arange(20)[None], snapshot(model)
    logits = model(ids).logits
    layers = find_layers(model, 1, "mlp")
    modules = {
        one.name: RowExperts(one, ROWS, experts_for(one), routing_for(one)) for one in layers
    }

    def work() -> None:
        with installed(model, modules) as originals:
            assert [originals[one.name] for one in layers] == [one.module for one in layers]
            assert all(model.get_submodule(key) is value for key, value in modules.items())
            assert not torch.equal(model(ids).logits, logits)
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(error):
            work()
    assert_restored(model, before)
    assert torch.equal(model(ids).logits, logits)


def test_originals_come_back_if_a_later_replacement_fails() -> None:
    model = TINY["llama"]()
    before = snapshot(model)
    first, second, third = (layer.name for layer in find_layers(model, 1, "mlp"))
    broken = {first: nn.Identity(), second: "no module", third: nn.Identity()}
    with pytest.raises((ValueError, TypeError), match=r"Module"), installed(model, broken):  # type: ignore[arg-type]
        pytest.fail("the block must not run")
    assert_restored(model, before)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate", ""])
def test_an_unknown_name_replaces_nothing(name: str) -> None:
    model = TINY["llama"]()
    before = snapshot(model)
    modules = {"model.layers.1.mlp.up_proj": nn.Identity(), name: nn.Identity()}
    with pytest.raises(UnknownName, match="unknown module"), installed(model, modules):
        pytest.fail("the block must not run")
    assert_restored(model, before)
