"""Experts of a mixture ablated, pruned, expanded, decomposed; what is counted of them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import entangle
from entangle.activation.rules import Window
from entangle.activation.subject import Subject
from entangle.errors import InvalidInput
from entangle.experts.dsnot import prune_dsnot
from entangle.experts.expand import model_costs
from entangle.models.layers import find_layers, list_layers
from entangle.models.loading import as_language_model
from entangle.texts.calibration import as_calibration
from tests.mixtures import TEXT, mixture, text

EXPERTS: dict[str, Any] = {"layers": 1, "proj": "experts"}
NAMES = ["Mixtral", "GptOss"]


@pytest.mark.parametrize("name", NAMES)
def test_pruned_experts_are_saved_as_an_ordinary_model(name: str, tmp_path: Path) -> None:
    module = mixture(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    out = tmp_path / "pruned"
    pruned = entangle.prune(
        module, TEXT(), sparsity=0.5, out=out, evaluation=text(4, 32, seed=2), **EXPERTS
    )
    seen = set(pruned.layers["layer"])
    layers = {one.name: one for one in list_layers(pruned.model.module)}
    for layer_name in seen:
        zeros = (layers[layer_name].weight == 0).sum(1)
        assert (zeros == layers[layer_name].in_features // 2).all()
    loaded = entangle.load_model(out).module.state_dict()
    for key, value in pruned.model.module.state_dict().items():
        assert torch.equal(value, loaded[key]), key
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    ids = text(2, 16, seed=3)
    assert not torch.equal(pruned.model.module(ids).logits, module(ids).logits)


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_expanded_again(name: str, tmp_path: Path) -> None:
    module, ids = mixture(name), text(2, 16, seed=3)
    same = entangle.expand(module, TEXT(), experts=2, sparsity=0.0, **EXPERTS)
    torch.testing.assert_close(same.model.module(ids).logits, module(ids).logits)  # type: ignore[union-attr]
    out = tmp_path / "expanded"
    found = entangle.expand(module, TEXT(), experts=2, sparsity=0.5, out=out, **EXPERTS)
    logits = found.model.module(ids).logits  # type: ignore[union-attr]
    assert not torch.allclose(logits, module(ids).logits)
    loaded = entangle.load_expanded(out, base=module)
    torch.testing.assert_close(loaded.module(ids).logits, logits)


def test_experts_of_fewer_tokens_than_clusters_stay_unless_they_are_named() -> None:
    module, last = mixture("Qwen2Moe"), {**EXPERTS, "layers": 2}
    counts = entangle.score(module, TEXT(), **last, min_tokens=1).layers.set_index("layer")
    least, k = str(counts["n_tokens"].idxmin()), int(counts["n_tokens"].min()) + 1
    assert k < 16
    found = entangle.expand(module, TEXT(), experts=k, sparsity=0.5, **last)
    assert least not in set(found.layers["layer"])
    assert least in found.manifest["layers_without_tokens"]  # type: ignore[operator]
    with pytest.raises(InvalidInput, match=r"model\.layers\.2\.mlp\.experts"):
        entangle.expand(module, TEXT(), experts=k, sparsity=0.5, layers=least, proj=None)


def test_experts_are_ablated_and_those_of_few_tokens_left_out() -> None:
    module, ids, last = mixture("Qwen2Moe"), text(24, 64), {**EXPERTS, "layers": 2}
    scores = entangle.score(module, ids, **last)
    few = set(scores.frame.loc[scores.frame["flag"] == "few_tokens", "layer"])
    assert 0 < len(few) < len(scores.layers)
    settings: dict[str, Any] = {
        "evaluation": text(4, 32, seed=2), "fraction": 0.1, "strengths": 0.9, "seeds": 1,
        "selections": ("top", "random"), **last,
    }  # fmt: skip
    own, given = (entangle.ablate(module, ids, scores=one, **settings) for one in (None, scores))
    for found in (own, given):
        named = ";".join(found.frame["layer_set"].dropna().unique())
        assert not any(name in named for name in few)
        values = found.frame.loc[found.frame["measure"] == "perplexity", "value"]
        assert np.isfinite(values).all()
        assert values.nunique() > 1
    with pytest.raises(InvalidInput, match="few_tokens"):
        entangle.ablate(
            module, ids, scores=scores, **{**settings, "layers": min(few), "proj": None}
        )
    with pytest.raises(InvalidInput, match="more text"):  # all experts saw too few
        entangle.ablate(module, ids[:2], **settings)


def test_decomposition_and_modes_tell_the_tokens_that_an_expert_sees() -> None:
    module, ids = mixture("Mixtral"), TEXT()
    name = "model.layers.1.mlp.experts.2.gate_proj"
    home = module.get_submodule("model.layers.1.mlp.experts")
    seen: list[torch.Tensor] = []
    handle = home.register_forward_pre_hook(lambda _module, args: seen.extend(args[:2]))
    module(ids)
    handle.remove()
    at = (seen[1] == 2).any(1).nonzero()[:, 0].numpy()
    rows = seen[0][at] @ home.gate_up_proj[2].T[:, :48]  # type: ignore[index]
    modes = entangle.neuron_modes(module, ids, name, [5])
    np.testing.assert_array_equal(modes.at, at)
    np.testing.assert_allclose(modes.outputs[5], rows[:, 5], atol=1e-5)
    found = entangle.decompose(module, ids, layers=name, proj=None, experts=(1, 2), neurons=[5])
    for table in (modes.contexts, found.contexts):
        assert set(table["position"]) <= set(at.tolist())
        outputs = rows[np.searchsorted(at, table["position"]), 5]
        np.testing.assert_allclose(table["output"], outputs, atol=1e-5)
        tokens = ids.flatten().numpy()[table["position"]]
        assert [str(one) for one in tokens.tolist()] == table["token"].tolist()
    assert set(found.pairs["token_a"]) | set(found.router_map["position"]) <= set(at.tolist())
    with pytest.raises(InvalidInput, match="sees 2"):
        entangle.decompose(module, ids, layers=name, proj=None, experts=(len(at) + 1,))
    with pytest.raises(InvalidInput, match="does not tell which tokens"):
        entangle.neuron_modes(mixture("JetMoe"), ids, "model.layers.0.mlp.experts.0.up_proj", [1])


def in_scope(module: Any) -> object:
    model = as_language_model(module)
    return Subject(model, as_calibration(TEXT(), model), "mlp", Window()).layers


@pytest.mark.parametrize(
    "refused",
    [
        lambda module, scores: entangle.allocate(scores, sparsity=0.5, model=module),
        lambda module, _scores: prune_dsnot(module, TEXT(), pruner="wanda", sparsity=0.5),
        lambda module, _scores: in_scope(module),
    ],
)
def test_what_cannot_deal_with_experts_says_so(refused: Any) -> None:
    module = mixture("Mixtral")
    with pytest.raises(InvalidInput, match=r"experts of a mixture.*mlp\.experts\.0\.gate_proj"):
        refused(module, entangle.score(module, TEXT(), layers=1, min_tokens=64, md=False))


def test_costs_count_all_experts_stored_and_the_chosen_ones_active() -> None:
    module: Any = mixture("Mixtral")
    layers = list_layers(module)
    sizes = {one.name: math.prod(one.shape) for one in layers}
    experts = sum(sizes[one.name] for one in layers if one.is_expert)
    others = sum(sizes.values()) - experts
    assert experts == 3 * 4 * 3 * 48 * 32
    (layer,) = find_layers(module, "model.layers.1.mlp.experts.2.up_proj")
    row = {
        "layer": layer.name, "block": 1, "router": 0, "dense_weights": 48 * 32, "flops": 0.0,
        "nonzeros": 100, "bytes": 400, "router_flops": 64, "router_bytes": 12,
    }  # fmt: skip
    found = model_costs(module, [row])
    active = others + experts / 2
    assert found["flops"] == pytest.approx((2 * (active - 48 * 32 / 2) + 64 / 2) / (2 * active))
    stored = others + experts
    assert found["nonzeros"] == pytest.approx((stored - 48 * 32 + 100) / stored)
    assert found["bytes"] == pytest.approx((4 * (stored - 48 * 32) + 412) / (4 * stored))


def test_a_comparison_counts_experts_as_tokens_meet_them() -> None:
    """Half of every expert's weights is half of the scope, however many experts there are."""
    found = entangle.compare(
        mixture("Mixtral"), TEXT(), text(4, 24), ["sparsegpt"], sparsity=0.5, progress=False
    )
    rows = found.frame[found.frame["method"] == "sparsegpt"]
    assert rows["density"].tolist() == pytest.approx([0.5], abs=1e-3)
    assert (rows["token_bytes"] > rows["bytes"]).all()  # a token meets all of the attention


def test_what_is_not_declared_is_not_counted() -> None:
    """A model that does not say how many experts a token meets has no FLOPs."""
    module: Any = mixture("Mixtral")
    layer = find_layers(module, 1, "experts")[0]
    row = {"layer": layer.name, "block": 1, "router": 0, "router_flops": 0, "router_bytes": 0,
           "flops": 1.0, "nonzeros": 1, "bytes": 1, "dense_bytes": 1,
           "dense_weights": math.prod(layer.shape)}  # fmt: skip
    assert math.isfinite(model_costs(module, [row])["flops"])
    for part in module.modules():
        for key in ("top_k", "num_experts_per_tok", "config"):
            part.__dict__.pop(key, None)
    costs = model_costs(module, [row])
    assert math.isnan(costs["flops"])
    assert math.isfinite(costs["nonzeros"])
