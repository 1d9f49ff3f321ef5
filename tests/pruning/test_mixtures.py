"""Experts pruned: statistics against loops over tokens, rules by hand, what is left."""

import copy
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import entangle
from entangle.errors import InvalidInput
from entangle.mixtures import (
    MIXTURE_METHODS,
    Statistics,
    gather,
    prune_mixtures,
)
from entangle.mixtures.methods import lowest, scores_of
from entangle.mixtures.statistics import find_mixtures
from entangle.mixtures.super_experts import expert_table, super_overlap
from entangle.results.scores import NeuronScores
from tests.mixtures import mixture, text, with_super
from tests.tiny_models import TINY

IDS = text(4, 24)
DROPS = ("frequency", "ean", "reap", "man", "msan", "easy-ep")
LOOPED = ("Qwen3Moe", "Mixtral", "Olmoe", "DeepseekV3", "GptOss")
RUN = ("Qwen2Moe", "DeepseekV3", "GptOss", "Llama4", "JetMoe", "Dbrx")
WIDTHS = ("num_local_experts", "num_experts", "n_routed_experts")


@cache
def seen(name: str) -> Statistics:
    return gather(mixture(name), IDS, gradients=True)


def module_of(statistics: Statistics) -> Any:
    return statistics.model.module


@contextmanager
def noted(module: nn.Module, key: str) -> Iterator[list[Any]]:
    """Note what the part of block 1 of this name is given, and what it gives."""
    found: list[Any] = []
    part = module.get_submodule(f"model.layers.1.{key}")
    handle = part.register_forward_hook(lambda _m, args, out: found.append((args, out)))
    yield found
    handle.remove()


def neurons(home: Any, number: int, x: Tensor) -> Any:
    """Return what enters an expert's last weight, by the family's formula."""
    stored = home.gate_up_proj[number].double()
    if hasattr(home, "alpha"):  # gpt-oss
        both = x @ stored + home.gate_up_proj_bias[number]
        gate, up = both[::2].clamp(max=home.limit), both[1::2].clamp(-home.limit, home.limit)
        return (up + 1) * gate * torch.sigmoid(home.alpha * gate)
    gate, up = (stored @ x).chunk(2)
    return nn.functional.silu(gate) * up


def output(home: Any, number: int, z: Tensor) -> Any:
    stored = home.down_proj[number].double()
    if hasattr(home, "alpha"):
        return z @ stored + home.down_proj_bias[number]
    return stored @ z


def looped(module: Any, ids: Tensor) -> dict[str, Any]:
    """Add up block 1's experts token by token, as the model itself runs them."""
    with noted(module, "mlp.experts") as calls, noted(module, "post_attention_layernorm") as norms:
        module(ids)
    (hidden, index, weights), routed = calls[0]
    home = module.get_submodule("model.layers.1.mlp.experts")
    state = norms[0][0][0].flatten(0, 1)
    sums: dict[str, Any] = defaultdict(lambda: defaultdict(float))
    for t in range(len(hidden)):
        turned = 1 - torch.cosine_similarity(state[t].double(), (state[t] + routed[t]).double(), 0)
        for number, weight in zip(index[t].tolist(), weights[t].tolist(), strict=True):
            z = neurons(home, number, hidden[t].double())
            y = output(home, number, z)
            size = float(y.square().sum().sqrt())
            for key, value in {
                "counts": 1, "gates": weight, "norms": size, "squares": size**2,
                "gated": weight * size, "turning": weight * size * max(0.0, float(turned)),
                "outputs": y, "outputs_squared": y**2, "neurons": z**2,
                "inputs": hidden[t].double() ** 2,
            }.items():  # fmt: skip
                sums[key][number] = sums[key][number] + value
            sums["peak"][number] = max(sums["peak"][number], float(y.abs().max()))
    return sums


@pytest.mark.parametrize("name", LOOPED)
def test_statistics_are_sums_over_tokens(name: str) -> None:
    statistics = seen(name)
    found = next(one for one in statistics.mixtures if ".layers.1." in one.name)
    for key, sums in looped(module_of(statistics), IDS).items():
        for number in range(found.n_experts):
            own = torch.as_tensor(sums.get(number, 0.0))
            torch.testing.assert_close(
                getattr(found, key)[number], own.double().expand_as(getattr(found, key)[number]),
                rtol=2e-5, atol=1e-7,
            )  # fmt: skip
    assert found.tokens == IDS.numel()
    with noted(module_of(statistics), next(
        key for key in ("mlp.gate", "mlp.router")
        if key in dict(module_of(statistics).model.layers[1].named_modules())
    )) as calls:  # fmt: skip
        module_of(statistics)(IDS)
    logits = calls[0][1][0].double()
    torch.testing.assert_close(found.logits, logits.T @ logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Mixtral", "DeepseekV3", "GptOss"])
def test_heapr_is_the_form_of_its_paper(name: str) -> None:
    """s_k = mean z_k² · w_k' M w_k with M the mean outer product of the outputs' gradients."""
    statistics = seen(name)
    module = module_of(statistics)
    found = next(one for one in statistics.mixtures if ".layers.1." in one.name)
    home = module.get_submodule(found.name)
    kept: list[Any] = []

    def keep(_m: Any, args: Any, out: Tensor) -> Tensor:
        out.requires_grad_()
        out.retain_grad()
        kept.append((args, out))
        return out

    handle = home.register_forward_hook(keep)
    logits = module(IDS).logits[:, :-1]
    handle.remove()
    nn.functional.cross_entropy(
        logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum"
    ).backward()
    (hidden, index, weights), out = kept[0]
    expected = torch.full((found.n_experts, found.width), -1.0, dtype=torch.float64)
    for number in range(found.n_experts):
        at, slot = (index == number).nonzero(as_tuple=True)
        if len(at):
            g = out.grad[at].double() * weights[at, slot, None].double()
            outer = g.T @ g / len(at)
            z = torch.stack([neurons(home, number, hidden[t].double()) for t in at])
            down = home.down_proj[number].double()
            columns = down.T if down.shape[0] == hidden.shape[1] else down
            form = torch.einsum("kd,de,ke->k", columns, outer, columns)
            expected[number] = z.square().mean(0) * form
    torch.testing.assert_close(
        scores_of(MIXTURE_METHODS["heapr"], found), expected, rtol=1e-3, atol=1e-12
    )


def by_hand(n_experts: int = 4) -> Statistics:
    """Return a model's mixtures, the first one with numbers to be set."""
    module: Any = mixture("Mixtral")
    known = find_mixtures(module)
    for one in known:
        one.tokens = 10
        one.counts += 5
    return Statistics(entangle.load_model(module), entangle.load_calibration(IDS), known, True)


def test_scores_of_a_mixture_made_by_hand() -> None:
    own = by_hand().mixtures[0]
    own.counts = torch.tensor([4.0, 2.0, 0.0, 2.0], dtype=torch.float64)
    own.norms = torch.tensor([4.0, 6.0, 0.0, 1.0], dtype=torch.float64)
    own.squares = torch.tensor([8.0, 20.0, 0.0, 1.0], dtype=torch.float64)
    own.gates = torch.tensor([2.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    own.gated = torch.tensor([2.0, 3.0, 0.0, 0.5], dtype=torch.float64)
    own.outputs[:, :2] = torch.tensor([[4.0, 0], [4.0, 2.0], [0, 0], [0, 0]], dtype=torch.float64)
    own.outputs_squared[:, :2] = torch.tensor(
        [[4.0, 0], [16.0, 10.0], [0, 0], [0, 0]], dtype=torch.float64
    )
    expected: dict[str, list[float]] = {
        "frequency": [4, 2, 0, 2], "ean": [4, 6, 0, 1], "man": [1, 3, -1, 0.5],
        "msan": [2, 10, -1, 0.5], "reap": [0.5, 1.5, -1, 0.25],
        # variances 0; 8 − 4 and 5 − 1: √8, times 1/10
        "mone": [0, math.sqrt(8) / 10, 0, 0],
    }  # fmt: skip
    for name, values in expected.items():
        found = scores_of(MIXTURE_METHODS[name], own)
        np.testing.assert_allclose(found.numpy(), values, atol=1e-12, err_msg=name)
    assert own.chosen == 1  # 8 calls of 10 tokens


def test_of_equal_scores_the_first_go() -> None:
    assert lowest(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2).tolist() == [True, True, False, False]


def test_merging_keeps_the_most_used_and_joins_those_of_like_logits() -> None:
    statistics = by_hand()
    first = statistics.mixtures[0]
    first.counts = torch.tensor([60.0, 10.0, 29.0, 1.0], dtype=torch.float64)
    # logits of 1 are as those of 2, of 3 as those of 0 but for their size
    first.logits = torch.tensor(
        [[4.0, 0, 0, 2], [0, 1, 0.9, 0], [0, 0.9, 1, 0], [2, 0, 0, 1]], dtype=torch.float64
    )
    for one in statistics.mixtures[1:]:
        one.counts = torch.tensor([20.0, 25.0, 25.0, 30.0], dtype=torch.float64)
        one.logits = torch.eye(4).double()
    pruned = prune_mixtures(statistics, "m-smoe", sparsity=2 / 12)
    assert pruned.changes[0].groups.tolist() == [0, 2, 2, 0]
    assert not any(one.changes for one in pruned.changes[1:])
    home = module_of(statistics).model.layers[0].mlp.experts
    before = home.down_proj.clone()
    with pruned.applied():
        merged = home.down_proj.clone()
    torch.testing.assert_close(merged[1], before[1] * 10 / 39 + before[2] * 29 / 39)
    torch.testing.assert_close(merged[3], before[0] * 60 / 61 + before[3] / 61)
    assert torch.equal(merged[1], merged[2])
    assert torch.equal(home.down_proj, before)


def test_stun_keeps_the_central_expert_of_each_cluster_of_router_rows() -> None:
    statistics = by_hand()
    module = module_of(statistics)
    for place, block in enumerate(module.model.layers):
        rows = torch.zeros(4, 32)
        rows[:, 0] = torch.tensor([0.0, 1.0, 10.0, 30.0]) * (1 + place)
        block.mlp.gate.weight.copy_(rows)
    experts = module.model.layers[0].mlp.experts
    for one in statistics.mixtures:
        one.counts, one.tokens = torch.full((4,), 5.0).double(), 20  # a token to one expert
    found = prune_mixtures(statistics, "stun-experts", sparsity=3 / 12).changes
    # heights of the merges: 1, 10 and 30 times the place: the lowest three are 1, 2, 3
    assert [one.dropped.sum().item() for one in found] == [1, 1, 1]
    found = prune_mixtures(statistics, "stun-experts", sparsity=4 / 12).changes
    assert [one.dropped.sum().item() for one in found] == [2, 1, 1]
    experts.down_proj[:3] = 0
    experts.gate_up_proj[:3] = torch.tensor([0.0, 3.0, 4.0])[:, None, None]
    found = prune_mixtures(statistics, "stun-experts", sparsity=4 / 12).changes
    assert found[0].dropped.tolist() == [True, False, True, False]  # 3 is nearest to 7/3


def smaller(module: Any, gone: list[list[int]]) -> Any:
    """Return a model of the class that never had some experts, as many in every block."""
    config = copy.deepcopy(module.config)
    n = module.get_submodule("model.layers.1.mlp.experts").down_proj.shape[0]
    for key in WIDTHS:
        if key in vars(config) or getattr(config, key, None) == n:
            setattr(config, key, n - len(gone[0]))
    made = type(module)(config).eval().requires_grad_(False)
    state, blocks = module.state_dict(), iter(gone)
    dense = module.config.to_dict().get("first_k_dense_replace", 0)
    blocks_of = {dense + i: own for i, own in enumerate(blocks)}
    for key, value in state.items():
        block = blocks_of.get(int(key.split(".")[2])) if ".layers." in key else None
        if block and "mlp" in key and "shared" not in key and value.shape[0] == n:
            state[key] = value[[i for i in range(n) if i not in block]]
    made.load_state_dict(state)
    return made


@pytest.mark.parametrize(
    "name", ["Mixtral", "Qwen3Moe", "Qwen2Moe", "Olmoe", "GptOss", "DeepseekV2", "Glm4Moe"]
)
def test_a_dropped_expert_is_one_that_the_model_never_had(name: str) -> None:
    statistics = seen(name)
    pruned = prune_mixtures(statistics, "reap", sparsity=0.5)
    gone = [one.dropped.nonzero()[:, 0].tolist() for one in pruned.changes]
    assert [len(one) for one in gone] == [2] * len(gone)
    ids = text(2, 16, seed=3)
    with pruned.applied():
        found = module_of(statistics)(ids).logits
    torch.testing.assert_close(
        found, smaller(module_of(statistics), gone)(ids).logits, rtol=1e-5, atol=1e-6
    )


def test_a_novice_gives_the_mean_output() -> None:
    statistics = seen("Mixtral")
    module, ids = module_of(statistics), text(2, 16, seed=3)
    pruned = prune_mixtures(statistics, "mone", sparsity=0.25)
    for change in pruned.changes[::2]:
        change.novices[:] = False
    change = pruned.changes[1]
    (number,) = change.novices.nonzero()[:, 0].tolist()
    with pruned.applied(), noted(module, "mlp.experts") as calls:
        module(ids)
    (hidden, index, weights), found = calls[0]
    home = module.get_submodule(change.mixture.name)
    mean = change.mixture.outputs[number] / change.mixture.counts[number]
    expected = torch.zeros_like(found).double()
    for t in range(len(hidden)):
        for e, weight in zip(index[t].tolist(), weights[t].tolist(), strict=True):
            y = output(home, e, neurons(home, e, hidden[t].double()))
            expected[t] += weight * (mean if e == number else y)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    calls_of = torch.bincount(index.flatten(), minlength=4)
    row = pruned.layers.iloc[1]
    cost = calls_of.sum() * 3 * 48 * 32 - calls_of[number] * (3 * 48 * 32 - 32)
    assert row["active"] == pytest.approx(float(cost) / len(hidden))
    assert row["stored"] == 3 * 3 * 48 * 32 + 32


def test_neurons_that_go_are_as_zeros_in_the_weights() -> None:
    statistics = seen("Mixtral")
    module, ids = module_of(statistics), text(2, 16, seed=3)
    pruned = prune_mixtures(statistics, "heapr", sparsity=0.3)
    with pruned.applied():
        found = module(ids).logits
        costs = pruned.costs()
    zeroed = copy.deepcopy(module)
    left = 0
    for block, change in zip(zeroed.model.layers, pruned.changes, strict=True):
        keep = change.neurons.float()
        block.mlp.experts.down_proj.mul_(keep[:, None, :])
        block.mlp.experts.gate_up_proj.mul_(keep.repeat(1, 2)[:, :, None])
        left += int(block.mlp.experts.gate_up_proj.count_nonzero())
        left += int(block.mlp.experts.down_proj.count_nonzero())
    torch.testing.assert_close(found, zeroed(ids).logits, rtol=1e-5, atol=1e-6)
    flat = torch.cat([one.neurons.flatten() for one in pruned.changes])
    assert int((~flat).sum()) == round(0.3 * len(flat))
    experts = 3 * 4 * 3 * 48 * 32
    assert pruned.layers["stored"].sum() == left
    everything = sum(math.prod(x.shape) for x in entangle.models.layers.list_layers(module))
    assert costs["nonzeros"] == pytest.approx((everything - experts + left) / everything)


def test_what_a_model_is_tried_on_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = prune_mixtures(seen("Mixtral"), "heapr", sparsity=0.3)
    for module in ("entangle.models.blocks", "entangle.evaluation.logits"):
        monkeypatch.setattr(f"{module}.MOST_LOGITS", 112)
    with pruned.applied():
        entangle.perplexity(module_of(seen("Mixtral")), IDS, progress=False)
    assert pruned.tokens == IDS.numel()
    assert all(float(one.calls.sum()) == 2 * IDS.numel() for one in pruned.changes)


def test_wanda_zeroes_what_stun_leaves_to_it() -> None:
    statistics = seen("Mixtral")
    module = module_of(statistics)
    pruned = prune_mixtures(statistics, "stun", sparsity=0.5)
    with pruned.applied():
        module(IDS[:1])
        left = 0
        for block, change in zip(module.model.layers, pruned.changes, strict=True):
            kept = ~change.dropped
            for stored in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
                zeros = (stored[kept] == 0).sum(-1)
                assert len(zeros.unique()) == 1
                left += int(stored[kept].count_nonzero())
        costs = pruned.costs()
    total = pruned.layers["stored_before"].sum()
    assert pruned.layers["stored"].sum() == left
    assert left / total == pytest.approx(0.5, abs=0.01)
    assert costs["bytes"] > costs["nonzeros"]


@pytest.mark.parametrize("name", RUN)
def test_density_one_is_the_model_and_others_leave_it_as_it_was(name: str) -> None:
    statistics = seen(name)
    module, ids = module_of(statistics), text(2, 12, seed=3)
    dense = module(ids).logits
    state = {key: value.clone() for key, value in module.state_dict().items()}
    refused = set()
    for method in MIXTURE_METHODS:
        try:
            whole = prune_mixtures(statistics, method, sparsity=0.0)
        except InvalidInput:
            refused.add(method)
            continue
        with whole.applied():
            assert torch.equal(module(ids).logits, dense), method
        assert set(whole.costs().values()) == {1.0}
        with (pruned := prune_mixtures(statistics, method, sparsity=0.5)).applied():
            changed = module(ids).logits
        assert changed.isfinite().all()
        assert not torch.equal(changed, dense), method
        assert pruned.costs()["nonzeros"] < 1
        assert torch.equal(module(ids).logits, dense), method
    assert refused == ({"reap", "easy-ep", "mone"} if name == "JetMoe" else set())
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("name", "key"), [("GptOss", "bias"), ("Glm4Moe", "e_score_correction_bias")]
)
def test_an_expert_that_no_token_reaches_goes_at_no_change(name: str, key: str) -> None:
    module: Any = mixture(name)
    for part in module.modules():
        if type(part).__name__.lower().endswith("topkrouter"):
            getattr(part, key)[2] = -100.0
    pruned = prune_mixtures(gather(module, IDS), "frequency", sparsity=0.25)
    assert all(one.mixture.counts[2] == 0 for one in pruned.changes)
    assert all(one.mixture.counts[one.dropped].tolist() == [0] for one in pruned.changes)
    dense = module(IDS).logits
    with pruned.applied():
        torch.testing.assert_close(module(IDS).logits, dense, rtol=1e-5, atol=1e-6)


def test_groups_of_experts_without_an_expert_are_passed_over() -> None:
    """DeepSeek-V3 picks groups first: what went is never chosen with a weight."""
    statistics = seen("DeepseekV3")
    pruned = prune_mixtures(statistics, "frequency", sparsity=0.5)
    for change in pruned.changes:
        change.dropped[:] = torch.tensor([True, True, False, False])
    with pruned.applied(), noted(module_of(statistics), "mlp.experts") as calls:
        module_of(statistics)(IDS)
    (_, index, weights), _ = calls[0]
    assert set(index[weights != 0].tolist()) == {2, 3}


def test_experts_that_see_no_token_go_first() -> None:
    module = mixture("Qwen2Moe")
    statistics = gather(module, text(1, 2), gradients=True)
    for one in statistics.mixtures:
        idle = one.counts == 0
        assert int(idle.sum()) > 0
        for method in ("man", "msan", "reap", "heapr", "frequency", "ean", "easy-ep", "mone"):
            scores = scores_of(MIXTURE_METHODS[method], one)
            scores = scores.flatten(1).amax(1) if scores.ndim > 1 else scores
            assert scores[idle].max() <= scores[~idle].min(), method
    for method in MIXTURE_METHODS:
        with prune_mixtures(statistics, method, sparsity=0.25).applied():
            assert module(IDS).logits.isfinite().all(), method


def test_one_expert_a_token_may_be_the_last() -> None:
    module: Any = mixture("Mixtral", num_experts_per_tok=1)
    statistics = gather(module, IDS)
    with (pruned := prune_mixtures(statistics, "reap", sparsity=0.75)).applied():
        assert module(IDS).logits.isfinite().all()
    assert pruned.layers["experts"].tolist() == [1, 1, 1]
    with pytest.raises(InvalidInput, match="a token is sent to 1"):
        prune_mixtures(statistics, "reap", sparsity=1.0)


@pytest.mark.parametrize("method", [*DROPS, "stun", "stun-experts"])
def test_fewer_experts_than_a_token_is_sent_to_are_refused(method: str) -> None:
    with pytest.raises(InvalidInput, match=r"1 of 4 experts of 'model\.layers\.0.*sent to 2"):
        prune_mixtures(seen("Mixtral"), method, sparsity=0.75 if method != "stun" else 0.94)


def test_shared_experts_and_what_is_not_a_mixture_stay() -> None:
    statistics = seen("Qwen2Moe")
    module = module_of(statistics)
    with prune_mixtures(statistics, "stun", sparsity=0.5).applied():
        for name, parameter in module.named_parameters():
            if "shared" in name:
                assert parameter.count_nonzero() == parameter.numel()


def test_an_expert_that_is_not_finite_is_named() -> None:
    module: Any = mixture("Mixtral")
    module.model.layers[1].mlp.experts.down_proj[3, 0, 0] = math.nan
    statistics = gather(module, IDS, gradients=True)
    for method in MIXTURE_METHODS:
        if method != "frequency":
            with pytest.raises(InvalidInput, match=r"layers\.1.*not finite"):
                prune_mixtures(statistics, method, sparsity=0.25)
    with pytest.raises(InvalidInput, match=r"expert \d of 'model\.layers\.1.*finite"):
        expert_table(statistics)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidInput, match="stacked"):
        gather(TINY["llama"](), IDS)
    with pytest.raises(InvalidInput, match="gradients"):
        prune_mixtures(gather(mixture("Mixtral"), IDS), "heapr", sparsity=0.5)
    statistics = seen("JetMoe")
    for method in ("reap", "easy-ep", "mone"):
        with pytest.raises(InvalidInput, match="routing weight"):
            prune_mixtures(statistics, method, sparsity=0.5)
    with pytest.raises(InvalidInput, match="run"):
        prune_mixtures(seen("Mixtral"), "reap", sparsity=0.5).costs()


@pytest.fixture
def own() -> Iterator[None]:
    MIXTURE_METHODS.register("first", lambda one: torch.arange(one.n_experts), source="here")
    MIXTURE_METHODS.register("each", lambda one: torch.ones(one.n_experts, one.width).cumsum(1))
    MIXTURE_METHODS.register("wrong", lambda one: one.counts[:1])
    yield
    for name in ("first", "each", "wrong"):
        MIXTURE_METHODS.remove(name)


def test_a_method_of_ones_own_comes_in_by_the_door(own: None) -> None:
    pruned = prune_mixtures(seen("Mixtral"), "first", sparsity=0.5)
    assert all(one.dropped.tolist() == [True, True, False, False] for one in pruned.changes)
    for one in prune_mixtures(seen("Mixtral"), "each", sparsity=0.25).changes:
        assert torch.equal(one.neurons, (torch.arange(48) >= 12).expand(4, 48))
    with pytest.raises(InvalidInput, match="shape"):
        prune_mixtures(seen("Mixtral"), "wrong", sparsity=0.5)
    with pytest.raises(InvalidInput):
        MIXTURE_METHODS.register("number", 3)


def test_a_comparison_holds_them_beside_weights(own: None) -> None:
    methods = ["reap", "mone", "heapr", "first"]
    found = entangle.compare(
        mixture("Mixtral"), IDS, text(4, 24), methods, density=[0.5, 0.25], progress=False
    )
    settings: Any = found.manifest["settings"]
    assert settings["plugins"] == {"first": "here"}
    rows: Any = found.frame.set_index(["method", "sparsity"])
    assert rows.loc[("reap", 0.5), "flops"] == pytest.approx(1.0)
    attention, head, experts = 3 * (2 * 32 * 32 + 2 * 32 * 16), 112 * 32, 3 * 4 * 3 * 48 * 32
    left = (attention + head + experts / 2) / (attention + head + experts)
    assert rows.loc[("reap", 0.5), "nonzeros"] == pytest.approx(left)
    assert rows.loc[("heapr", 0.5), "density"] < 0.6
    assert np.isnan(rows.loc[("reap", 0.75), "perplexity"])  # one expert, but a token needs two
    assert np.isfinite(rows.loc[("mone", 0.75), "perplexity"])
    plain = entangle.compare(
        TINY["llama"](), IDS[:1], IDS[:1], ["reap", "magnitude"], density=0.5, progress=False
    )
    values = plain.frame.set_index("method")["perplexity"]
    assert np.isnan(values["reap"])
    assert np.isfinite(values["magnitude"])


def test_the_order_of_calibration_does_not_matter_much() -> None:
    turned = gather(mixture("Olmoe"), IDS.flip(0))
    for one, other in zip(seen("Olmoe").mixtures, turned.mixtures, strict=True):
        torch.testing.assert_close(one.gated, other.gated, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(one.turning, other.turning, rtol=1e-4, atol=1e-8)


def test_super_experts_are_early_and_far_above_the_others() -> None:
    module = with_super()
    statistics = gather(module, IDS)
    table = expert_table(statistics)
    assert len(table) == 12
    assert not table["super"].any()  # the largest lies in the last block
    module.model.layers[2].mlp.experts.down_proj[1] *= 1e-5
    table = expert_table(gather(module, IDS))
    chosen = table[table["super"]]
    assert chosen[["block", "expert"]].to_numpy().tolist() == [[0, 2]]
    with noted(module, "mlp.experts") as calls:
        module(IDS)
    (hidden, index, _), _ = calls[0]
    home = module.get_submodule("model.layers.1.mlp.experts")
    peaks = [
        max(float(output(home, e, neurons(home, e, hidden[t].double())).abs().max())
            for t in (index == e).any(1).nonzero()[:, 0])
        for e in range(4)
    ]  # fmt: skip
    np.testing.assert_allclose(table[table["block"] == 1]["peak"], peaks, rtol=1e-5)


def test_overlap_counts_top_neurons_in_super_experts() -> None:
    name = "model.layers.1.mlp.experts"
    rows = [(f"{name}.{e}.up_proj", n, 0.1) for e in range(4) for n in range(48)]
    frame = pd.DataFrame(rows, columns=["layer", "neuron", "wd"]).assign(projection="up_proj")
    floors = pd.DataFrame({"layer": frame["layer"].unique(), "null_floor": [0.5, 0.1, 0.1, 0.01]})
    own = frame["layer"] == f"{name}.3.up_proj"
    frame["wd"] += frame["layer"].map(floors.set_index("layer")["null_floor"])
    frame.loc[own & (frame["neuron"] < 12), "wd"] += 0.1  # above its floor more than any other
    scores = NeuronScores(frame, floors, {}, {})
    table = pd.DataFrame({"mixture": name, "expert": range(4), "super": [False] * 3 + [True]})
    row = super_overlap(table, scores, top=12 / (4 * 48)).iloc[0]
    assert (row["neurons"], row["tops"], row["top_share"]) == (48, 12, 0.25)
    assert (row["rank"], row["others"], row["experts"]) == (1, 0.0, 4)
    frame.loc[frame["layer"] == f"{name}.0.up_proj", "wd"] += 0.5
    row = super_overlap(table, scores, top=0.1 + 48 / (4 * 48)).iloc[0]
    assert (row["tops"], row["rank"]) == (12, 2)
    frame["wd"] = math.nan
    with pytest.raises(InvalidInput, match="--proj experts"):
        super_overlap(table, scores)
