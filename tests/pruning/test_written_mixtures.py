"""Pruned mixtures as ordinary folders: what transformers loads is what was measured."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import entangle
from entangle.errors import InvalidInput
from entangle.mixtures import MIXTURE_METHODS, gather, prune_mixtures, write_mixtures
from entangle.mixtures.routers import find_router
from entangle.models.layers import list_layers
from entangle.models.mixtures import banks_of
from entangle.results.expansion import PruneReport
from entangle.testing import check_mixture_method
from entangle.texts.evaluation import EvaluationText
from tests.mixtures import made, mixture, text
from tests.tiny_models import GROUPED

IDS = text(4, 24)


def written(module: Any, method: str, sparsity: float, folder: Path) -> tuple[Any, Any, Any]:
    """Return what was pruned, what was written, and the same as transformers loads it."""
    pruned = prune_mixtures(gather(module, IDS, gradients=True), method, sparsity=sparsity)
    found = write_mixtures(pruned, folder)
    return pruned, found, AutoModelForCausalLM.from_pretrained(folder)


def same_logits(pruned: Any, module: Any, loaded: Any) -> bool:
    with pruned.applied(), torch.no_grad():
        expected = module(text(3, 20, seed=5)).logits
    with torch.no_grad():
        return torch.allclose(loaded(text(3, 20, seed=5)).logits, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "Olmoe", "GptOss", "Dbrx"])
def test_fewer_experts_are_an_ordinary_model(name: str, tmp_path: Path) -> None:
    module = mixture(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    pruned, found, loaded = written(module, "reap", 0.25, tmp_path / "out")
    assert same_logits(pruned, module, loaded)
    assert [bank.n_experts for bank in banks_of(loaded)] == [3, 3, 3]
    assert (found.report.layers["experts"] == 3).all()
    sizes = [sum(one.numel() for one in model.parameters()) for model in (loaded, module)]
    gone = sizes[1] - sizes[0]
    experts = sum(one.stored_before for one in pruned.changes)
    assert 0 <= gone - experts / 4 < 0.05 * gone  # and the routers' rows
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key
    report = entangle.load_result(tmp_path / "out")
    assert isinstance(report, PruneReport)
    assert report.costs["flops"] == 1
    assert report.costs["bytes"] == pytest.approx(report.costs["nonzeros"], abs=1e-12)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("Ernie4_5_Moe", {**GROUPED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}),
     ("Gemma4", {**GROUPED, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
                 "enable_moe_block": True, "head_dim": 8, "global_head_dim": 8,
                 "hidden_size_per_layer_input": 0})],
)  # fmt: skip
def test_numbers_beside_the_router_go_with_their_experts(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Ernie's choose, Gemma 4's are factors of the routing weights."""
    config = {"Gemma4": "Gemma4TextConfig"}.get(name, f"{name}Config")
    module = made(name, config, {**settings, "num_hidden_layers": 2})
    bank = banks_of(module)[0]
    router = find_router(module, bank)
    for number in (*router.biases, *router.scales):
        number.data.copy_(torch.arange(4.0).view_as(number) + 1)  # Ernie's alone choose the last
    seen = gather(module, IDS)
    for one in seen.mixtures:  # the last goes
        one.counts = torch.tensor([5, 4, 4, 3]).double() * (one.tokens // 8)
    pruned = prune_mixtures(seen, "frequency", sparsity=0.25)
    write_mixtures(pruned, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_logits(pruned, module, loaded)
    assert {layer.share for layer in list_layers(module) if layer.is_expert} == {0.5}
    with pruned.applied(), torch.no_grad():
        module(IDS)
    assert pruned.costs()["flops"] == 1


def test_costs_that_nobody_knows_are_written_as_such(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("entangle.models.mixtures._CHOSEN", ())
    monkeypatch.setattr("entangle.models.mixtures._CONFIGURED", ())
    written(mixture("Mixtral"), "reap", 0.25, tmp_path / "out")
    report: Any = entangle.load_result(tmp_path / "out")
    assert math.isnan(report.costs["flops"])
    assert 0 < report.costs["nonzeros"] < 1
    report.plot()


def test_groups_of_experts_must_be_left_alike(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="groups"):
        written(mixture("DeepseekV3"), "reap", 0.25, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    module = mixture("Glm4Moe")  # of one group
    pruned, _, loaded = written(module, "reap", 0.25, tmp_path / "out")
    assert loaded.config.n_routed_experts == 3
    assert same_logits(pruned, module, loaded)


@pytest.mark.parametrize(("name", "narrow"), [("Mixtral", True), ("GptOss", True),
                                              ("DeepseekV3", False)])  # fmt: skip
def test_neurons_go_or_become_zeros(name: str, narrow: bool, tmp_path: Path) -> None:
    """Experts are narrower where the configuration has a width of their own alone."""
    module: Any = mixture(name)
    seen = gather(module, IDS, gradients=True)
    for one in seen.mixtures:  # the first half of every expert goes, and one neuron more
        one.sensitivity[:] = one.neurons[:] = torch.arange(one.width) + 1.0
        one.counts[:] = 1
    width = seen.mixtures[0].width
    pruned = prune_mixtures(seen, "heapr", sparsity=0.5)
    found = write_mixtures(pruned, tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_logits(pruned, module, loaded)
    config = loaded.config
    kept = getattr(config, "moe_intermediate_size", config.intermediate_size)
    assert kept == (width // 2 if narrow else width)
    assert found.report.costs["nonzeros"] < 1
    assert (found.report.costs["bytes"] < 1) == narrow


@pytest.mark.parametrize(("method", "said"), [("mone", "constants"), ("m-smoe", "merged"),
                                              ("stun", "to 3 experts")])  # fmt: skip
def test_what_no_configuration_can_say_is_refused(method: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=said):
        written(mixture("Qwen3Moe"), method, 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_takes_nothing_away_is_refused(tmp_path: Path) -> None:
    module = mixture("Qwen3Moe")
    with pytest.raises(InvalidInput, match="`sparsity`"):
        written(module, "reap", 0.05, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    _, found, _ = written(module, "reap", 0.3, tmp_path / "out")
    assert (found.report.layers["sparsity"] == 0.25).all()
    said = found.report._told()[0][0]
    assert "0.25" in said
    assert "0.3" in said


def test_perplexity_is_that_of_what_was_written(tmp_path: Path) -> None:
    module, evaluation = mixture("Olmoe"), EvaluationText(text(3, 24, seed=3), "ids", {})
    pruned = prune_mixtures(gather(module, IDS), "ean", sparsity=0.5)
    found = write_mixtures(pruned, tmp_path / "out", evaluation=evaluation)
    with pruned.applied():
        measured = entangle.perplexity(module, evaluation, progress=False).value
    assert found.perplexity is not None
    assert found.perplexity.value == pytest.approx(measured, rel=1e-6)
    assert found.dense is not None
    assert found.dense.value != pytest.approx(measured, rel=1e-6)
    with pytest.raises(InvalidInput, match="exists"):
        write_mixtures(pruned, tmp_path / "out")


def test_a_model_without_finite_logits_is_not_taken_for_a_wrong_one(tmp_path: Path) -> None:
    module: Any = mixture("Qwen3Moe")
    module.model.layers[2].mlp.experts.down_proj[:, 3, 3] = torch.nan  # whichever experts stay
    pruned = prune_mixtures(gather(module, IDS), "frequency", sparsity=0.25)
    with pytest.raises(InvalidInput, match="finite"):
        write_mixtures(pruned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_of_odd_widths_are_loaded_and_pruned(tmp_path: Path) -> None:
    """transformers' default product refuses rows that are no whole 16 bytes."""
    module: Any = mixture("Olmoe", intermediate_size=27)
    module.set_experts_implementation("eager")
    module.save_pretrained(tmp_path / "odd")
    loaded = entangle.load_model(tmp_path / "odd")
    with torch.no_grad():
        assert torch.allclose(loaded.module(IDS).logits, module(IDS).logits, atol=1e-6)
    pruned = prune_mixtures(gather(loaded, IDS), "reap", sparsity=0.25)
    found = write_mixtures(pruned, tmp_path / "out")
    assert same_logits(pruned, loaded.module, found.model.module)


@pytest.mark.parametrize("name", list(MIXTURE_METHODS))
def test_our_methods_keep_the_contract_of_their_door(name: str) -> None:
    check_mixture_method(MIXTURE_METHODS[name], name=name)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda one: one.counts[:2], "shape"),
        (lambda one: one.counts * float("nan"), "finite"),
        (lambda one: torch.rand(6), "repeated"),
        (lambda one: one.counts.add_(1.0), "changed|repeated"),
        (lambda one: torch.arange(6.0), "order"),
        (lambda one: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_method_that_breaks_the_contract_is_told_so(wrong: Any, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_mixture_method(wrong)
    assert "__checked__" not in MIXTURE_METHODS
