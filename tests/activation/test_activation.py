"""Activation sparsity: masks against slow references, costs against counts, edges."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from entangle.activation import (
    ACTIVATION_METHODS,
    chunk_sparsity,
    fit,
    input_method,
    lazy_neurons,
    measure,
    perplexity_sparsity,
    routing_consistency,
    search_levels,
)
from entangle.activation.methods import Teal
from entangle.activation.neurons import Chooser, feed_forwards
from entangle.activation.rules import Rule, Scores, Turn, Window, largest
from entangle.errors import InvalidInput, UnknownName
from entangle.evaluation import perplexity
from tests.tiny_models import TINY

IDS = torch.randint(4, 112, (4, 16), generator=torch.Generator().manual_seed(0))
PROMPTED = ("griffin", "coreinfer")
PLAIN = [name for name in ACTIVATION_METHODS if name not in PROMPTED and "greedy" not in name]


def model(name: str = "llama") -> Any:
    return TINY[name]()


def test_quantiles_are_those_of_the_sorted_scores_to_a_256th() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1)).abs() * 3
    scores, parts = Scores(), Scores()
    scores.update(values)
    for part in values.split(700):
        parts.update(part)
    for share in (0.01, 0.3, 0.5, 0.97):
        exact = float(values.quantile(share))
        assert scores.quantile(share) == pytest.approx(exact, rel=1 / 64, abs=0.002)
        assert parts.quantile(share) == scores.quantile(share)
        assert scores.above(exact) == pytest.approx(1 - share, abs=0.004)
    assert scores.quantile(0.0) == -1
    assert scores.quantile(1.0) == float("inf")
    assert scores.above(-1.0) == 1
    assert scores.above(float("inf")) == 0


def test_zeros_are_never_above_a_threshold_among_them() -> None:
    scores = Scores()
    scores.update(torch.cat([torch.zeros(70), torch.ones(30)]))
    assert scores.above(scores.quantile(0.4)) == pytest.approx(0.3)


def test_as_many_are_kept_as_asked_and_they_are_the_largest() -> None:
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(12) + 0.1
    rule = Rule(0.75, Window(), "topk", scale=scale)
    inputs, keep = rule(x)
    order = (x.abs() * scale).argsort(-1, descending=True)[..., :3]
    for row, best in zip(keep.flatten(0, 1), order.flatten(0, 1), strict=True):
        assert set(row.nonzero()[:, 0].tolist()) == set(best.tolist())
    assert torch.equal(inputs, x * keep)
    kept = rule.share_kept()
    assert kept is not None
    assert float(kept.sum()) == pytest.approx(3)


def test_a_turn_and_back_is_the_input_and_dead_gains_stay_dead() -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q
    gain = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0, 1.0])
    x = torch.randn(4, 6) * (gain != 0)
    turn = Turn(basis, gain)
    torch.testing.assert_close(turn.back(turn.into(x)), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt", "gemma3"])
@pytest.mark.parametrize("method", PLAIN)
def test_at_level_0_the_model_is_the_dense_one_and_costs_what_it_does(
    name: str, method: str
) -> None:
    module = model(name)
    try:
        made = fit(module, IDS, method, scope="all").at(0.0)
    except InvalidInput:
        assert method in ("wina", "larosa")
        return
    found = measure(made, IDS, progress=False)
    dense = perplexity(module, IDS, progress=False)
    assert np.array_equal(found.perplexity.window_losses, dense.window_losses)
    assert found.density == pytest.approx(1)
    assert found.flops == pytest.approx(1)


@pytest.mark.parametrize("method", PLAIN)
def test_measured_density_is_near_the_one_asked_for(method: str) -> None:
    found = measure(fit(model(), IDS, method, scope="mlp").at_density(0.7), IDS, progress=False)
    assert found.density == pytest.approx(0.7, abs=0.08)  # 32 inputs a layer: steps of 1/32
    assert found.perplexity.value != perplexity(model(), IDS, progress=False).value


def test_what_a_model_is_tried_on_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where logits come in parts, the model first runs on a few made-up tokens."""
    made = fit(TINY["gemma3"](), IDS, "teal").at(0.5)
    whole = measure(made, IDS, batch_size=1, progress=False)
    tokens = made.rules[0].tokens
    for module in ("entangle.models.blocks", "entangle.evaluation.logits"):
        monkeypatch.setattr(f"{module}.MOST_LOGITS", 112)
    found = measure(made, IDS, batch_size=1, progress=False)
    assert made.rules[0].tokens == tokens == IDS.numel()
    assert found.density == whole.density


def test_at_level_1_nothing_enters_the_layers() -> None:
    found = measure(fit(model(), IDS, "teal", scope="mlp").at(1.0), IDS, progress=False)
    assert found.density == 0


def reference_teal(module: nn.Module, level: float) -> dict[str, float]:
    """Thresholds by sorting, of the inputs of every linear of the feed-forward parts."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        child.register_forward_pre_hook(lambda _m, a, n=name: seen.setdefault(n, []).append(a[0]))
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and ".mlp." in name
    ]
    with torch.no_grad():
        module(IDS)
    for handle in handles:
        handle.remove()
    return {name: float(torch.cat(x).abs().quantile(level)) for name, x in seen.items()}


def test_teal_is_a_threshold_on_each_input() -> None:
    module = model()
    limits = reference_teal(module, 0.4)

    def sparse(name: str) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        return lambda _m, a: (torch.where(a[0].abs() > limits[name], a[0], 0.0),)

    handles = [
        child.register_forward_pre_hook(sparse(name))
        for name, child in module.named_modules()
        if name in limits
    ]
    wanted = perplexity(module, IDS, progress=False).value
    for handle in handles:
        handle.remove()
    found = measure(fit(module, IDS, "teal", scope="mlp").at(0.4), IDS, progress=False)
    assert found.perplexity.value == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize("method", ["cats", "chess"])
def test_cats_and_chess_mask_by_the_activated_gate(method: str) -> None:
    module = model()
    seen: dict[str, list[Tensor]] = {}
    for name in ("gate_proj", "up_proj"):
        for i, block in enumerate(module.model.layers):
            part = block.mlp.get_submodule(name)
            part.register_forward_hook(
                lambda _m, _a, y, n=f"{i}{name}": seen.setdefault(n, []).append(y)
            )
    with torch.no_grad():
        module(IDS)
    states = {k: torch.cat([y.flatten(0, 1) for y in v]) for k, v in seen.items()}
    module = model()
    for i, block in enumerate(module.model.layers):
        ubar = states[f"{i}up_proj"].abs().mean(0) if method == "chess" else torch.ones(48)
        limit = float((silu(states[f"{i}gate_proj"]).abs() * ubar).quantile(0.5))

        def masked(x: Tensor, mlp: Any = block.mlp, u: Tensor = ubar, t: float = limit) -> Any:
            gate = silu(mlp.gate_proj(x))
            z = gate * mlp.up_proj(x)
            return mlp.down_proj(torch.where(gate.abs() * u > t, z, 0.0))

        block.mlp.forward = masked
    wanted = perplexity(module, IDS, progress=False).value
    found = measure(fit(model(), IDS, method, scope="mlp").at(0.5), IDS, progress=False)
    assert found.perplexity.value == pytest.approx(wanted, rel=2e-3)
    assert found.density == pytest.approx(1 / 3 + 1 / 3, abs=0.01)


def test_a_pruned_model_costs_the_non_zero_weights_of_what_is_kept() -> None:
    module = model()
    for block in module.model.layers:
        for part in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
            part.weight[:, ::2] = 0
    made = fit(module, IDS, "teal", scope="mlp", form="topk").at(0.5)
    found = measure(made, IDS, progress=False)
    kept = {name: rule.share_kept() for name, rule in made.inputs.items()}
    for row in found.layers.to_dict("records"):
        share = kept[row["layer"]]
        assert share is not None
        wanted = row["dense"] / len(share) * float(share[1::2].sum())
        assert row["active"] == pytest.approx(wanted)


def test_a_turn_is_charged_once_for_the_layers_that_share_it() -> None:
    found = measure(fit(model(), IDS, "wina", scope="all").at(0.5), IDS, progress=False)
    dense = float(found.layers["dense"].sum())
    assert (found.density - found.without_turns) * dense == pytest.approx(3 * 2 * 32 * 32)


def test_the_first_tokens_are_dense_where_asked() -> None:
    module = model()
    made = fit(module, IDS, "teal", form="topk", dense_prefix=15).at(0.9)
    found = measure(made, IDS, progress=False)
    assert found.density == pytest.approx((15 + 0.1) / 16, abs=0.01)
    every = fit(module, IDS, "teal", dense_prefix=16).at(0.9)
    losses = measure(every, IDS, progress=False).perplexity.window_losses
    assert np.array_equal(losses, perplexity(module, IDS, progress=False).window_losses)


@pytest.mark.parametrize("method", PROMPTED)
def test_prompts_choose_neurons_for_the_rest(method: str) -> None:
    module = model()
    found = measure(fit(module, IDS, method, dense_prefix=8).at(0.5), IDS, prefix=8, progress=False)
    assert found.perplexity.n_tokens == len(IDS) * 8
    assert found.density < 0.71
    with pytest.raises(InvalidInput, match="prefix"):
        fit(module, IDS, method).at(0.5)
    with pytest.raises(InvalidInput, match="prefix"):
        measure(fit(module, IDS, method, dense_prefix=8).at(0.5), IDS, prefix=15)


def test_griffin_and_coreinfer_by_hand() -> None:
    z = torch.tensor([[[3.0, 0.0, 4.0, 0.0], [0.0, 0.0, 1.0, 0.1]]])
    assert Chooser("griffin", 0.5)(z).tolist() == [[True, False, True, False]]
    votes = Chooser("coreinfer", 0.5, votes=1.0)(z)  # two positive entries a token
    assert votes.tolist() == [[True, False, True, False]] or votes.tolist()[0][2]


@pytest.mark.parametrize(
    ("name", "gated"), [("llama", True), ("phi3", True), ("gpt2", False), ("opt", False)]
)
def test_feed_forward_parts_are_found_by_what_they_compute(name: str, gated: bool) -> None:
    parts = feed_forwards(model(name), IDS)
    assert len(parts) == 3
    assert all((part.gate is not None) == gated for part in parts)
    if name == "phi3":
        assert parts[0].gate is not None
        assert parts[0].up is not None
        assert (parts[0].gate.start, parts[0].up.start) == (0, 48)


@pytest.mark.parametrize(
    ("name", "activation"), [("phi3", "silu"), ("gemma3", "gelu"), ("gpt2", "gelu")]
)
def test_feed_forward_parts_are_found_in_bfloat16(name: str, activation: str) -> None:
    """Roundings of bfloat16 are larger than what tells activations apart in float32."""
    parts = feed_forwards(model(name).to(torch.bfloat16), IDS)
    assert len(parts) == 3
    assert all(str(part.activation).startswith(activation) for part in parts)
    assert all((part.gate is None) == (name == "gpt2") for part in parts)


def test_what_lacks_feed_forward_parts_is_told_and_costs_need_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for method in ("teal", "cats"):
        made = fit(model(), IDS, method).at(0.5)
        with pytest.raises(InvalidInput, match="applied"):
            made.density()
    monkeypatch.setattr("entangle.activation.subject.feed_forwards", lambda *_: ())
    with pytest.raises(InvalidInput, match="feed-forward"):
        fit(model(), IDS, "griffin", dense_prefix=2).at(0.5)


def test_errors_of_rows_leave_counts_alone_and_know_first_tokens_and_halves() -> None:
    made = fit(model("phi3"), IDS, "cats", scope="mlp", dense_prefix=4).at(0.5)
    whole = measure(made, IDS[:1], prefix=2, progress=False)
    errors = made.row_errors()
    assert made.density()["density"] == whole.density
    ups = errors[errors["layer"] == "model.layers.0.mlp.gate_up_proj"]
    assert ups["neuron"].tolist() == list(range(48, 96))  # the upper half is `up`
    every = fit(model("phi3"), IDS, "cats", scope="mlp").at(0.5).row_errors()
    assert errors["relative_error"].mean() < every["relative_error"].mean()


def test_errors_of_rows_are_those_of_the_products() -> None:
    module = model()
    made = fit(module, IDS, "column-norm", scope="mlp", form="topk").at(0.5)
    errors = made.row_errors()
    name = "model.layers.1.mlp.gate_proj"
    seen: list[Tensor] = []
    layer = module.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _m, a: seen.append(a[0].flatten(0, 1)))
    with torch.no_grad():
        module(IDS)
    handle.remove()
    x, weight = torch.cat(seen).double(), layer.weight.double()
    order = (x.abs() * weight.norm(dim=0)).argsort(1, descending=True)[:, :16]
    keep = torch.zeros_like(x).scatter_(1, order, 1.0)
    y, wrong = x @ weight.T, (x * (1 - keep)) @ weight.T
    wanted = wrong.square().sum(0) / (y - y.mean(0)).square().sum(0)
    found = errors.loc[errors["layer"] == name, "relative_error"].to_numpy()
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4)


def test_a_search_of_levels_is_no_worse_than_one_level_for_all() -> None:
    method = fit(model(), IDS, "teal", form="topk")
    assert isinstance(method, Teal)
    paths = search_levels(method, step=0.25, most=0.5, sequences=2)
    for path in paths.values():
        assert path.means[0] == 0
        assert path.means[-1] >= 0.5
        assert list(path.means) == sorted(path.means)
        changed = [sum(a[n] != b[n] for n in a) for a, b in zip(path.levels, path.levels[1:])]  # noqa: B905
        assert set(changed) == {1}


def test_a_method_of_ones_own() -> None:
    own = input_method("own", lambda x, w: x.abs() * w.norm(dim=0))
    a = measure(fit(model(), IDS, own, form="topk").at(0.5), IDS, progress=False)
    b = measure(fit(model(), IDS, "column-norm", form="topk").at(0.5), IDS, progress=False)
    assert np.array_equal(a.perplexity.window_losses, b.perplexity.window_losses)
    for wrong in (lambda x, w: x[:1], lambda x, w: -x.abs() - 1, lambda x, w: x.abs() / 0):
        with pytest.raises(InvalidInput, match="scores"):
            fit(model(), IDS, input_method("bad", wrong))


def test_what_is_no_number_is_kept_by_a_threshold() -> None:
    rule = Rule(0.5, Window(), "threshold")
    rule.scores.update(torch.arange(8.0))
    rule.settle()
    inputs, keep = rule(torch.tensor([[1.0, 6.0, float("nan"), float("inf")]]))
    assert keep.tolist() == [[False, True, True, True]]
    assert inputs[0].isnan().tolist() == [False, False, True, False]


def test_a_function_that_raises_is_told() -> None:
    def fails(_inputs: Tensor, _weight: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(InvalidInput, match="ZeroDivisionError"):
        fit(model(), IDS, input_method("bad", fails))


def test_scores_of_ones_own_may_be_minus_zero_and_must_leave_inputs_alone() -> None:
    none = fit(model(), IDS, input_method("none", lambda x, w: -0.0 * x.abs())).at(0.5)
    assert measure(none, IDS, progress=False).density == 0
    with pytest.raises(InvalidInput, match="change"):
        fit(model(), IDS, input_method("writes", lambda x, w: x.mul_(2).abs()))


def test_names_and_numbers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UnknownName, match="teal"):
        fit(model(), IDS, "teel")
    with pytest.raises(UnknownName):
        fit(model(), IDS, scope="attn")
    with pytest.raises(InvalidInput, match="density"):
        fit(model(), IDS, "cats", scope="mlp").at_density(0.2)
    teal, cats = fit(model(), IDS, "teal"), fit(model(), IDS, "cats")
    for wrong in (-0.1, 1.5, float("nan"), {"x": 0.5}, {}):
        for method in (teal, cats):
            with pytest.raises(InvalidInput):
                method.at(wrong)
    for outside in (-0.1, 1.5, float("nan")):
        with pytest.raises(InvalidInput):
            teal.at_density(outside)


def test_as_many_are_kept_with_ties_and_with_what_is_no_number() -> None:
    rng = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (5, 7, 16), generator=rng).float()
    scores[0, 0, 3], scores[1, 2, 5] = float("nan"), float("inf")
    for count in (0, 1, 6, 15, 16):
        keep = largest(scores, count)
        assert (keep.sum(-1) == count).all()
        ranked = scores.nan_to_num(nan=torch.inf).sort(-1, descending=True).values
        kept = scores.nan_to_num(nan=torch.inf).masked_fill(~keep, -1).sort(-1, descending=True)
        assert torch.equal(kept.values[..., :count], ranked[..., :count])


def test_lazy_neurons_and_chunks_by_hand() -> None:
    active = lazy_neurons(model("opt"), IDS)["active"]
    assert 0 < active.mean() < 1
    assert (lazy_neurons(model(), IDS)["active"] == 1).all()
    keep = torch.zeros(1, 9, 2, dtype=torch.bool)
    keep[0, 0, 0] = keep[0, 8, 1] = True
    assert chunk_sparsity(keep) == (1 - 2 / 18, 0.5)
    with pytest.raises(InvalidInput):
        chunk_sparsity(keep[:, :7])


def test_ppl_sparsity_stays_within_the_increase() -> None:
    found = perplexity_sparsity(model("opt"), IDS, IDS, increase=0.001, steps=6)
    assert found.reached <= 0.001
    assert 0 <= found.active <= 1


def test_routing_consistency_by_hand() -> None:
    same = routing_consistency(torch.arange(4)[:, None].expand(4, 64), size=1)
    assert (same.fixed, same.cached) == (1.0, 63 / 64)
    turns = routing_consistency(torch.arange(64)[None] % 3, segment=6, size=2)
    assert turns.fixed == pytest.approx(4 / 6)
    assert turns.cached == pytest.approx(2 / 6)  # 0 1 2 0 1 2: one of two is held each round
    with pytest.raises(InvalidInput):
        routing_consistency(torch.full((2, 8), -1), segment=8)
