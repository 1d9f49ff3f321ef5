from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from entangle.allocation import RULES, Allocation, InfeasibleBudget, allocate, losses, rules
from entangle.allocation.measurements import Measurements
from entangle.errors import InvalidInput, UnknownName
from entangle.models.layers import Layer, find_layers
from entangle.models.loading import LanguageModel
from entangle.pruning import prune
from entangle.results.scores import NeuronScores
from entangle.scoring.score import score
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import TINY

Tiny = Callable[[str], LanguageModel]
Scored = Callable[[str], NeuronScores]


def zeros_after_pruning(layers: Sequence[Layer], allocation: Allocation) -> int:
    """Prune the layers and count; rows of one length are pruned together, each as it would be."""
    together: dict[int, list[Layer]] = {}
    for layer in layers:
        together.setdefault(layer.in_features, []).append(layer)
    count = 0
    for members in together.values():
        weight = torch.cat([layer.weight for layer in members])
        sparsity = torch.cat([allocation.sparsity[layer.name] for layer in members])
        found = (prune(weight, method="magnitude", sparsity=sparsity).weight == 0).sum(1)
        assert torch.equal(found, torch.cat([allocation.zeros[layer.name] for layer in members]))
        count += int(found.sum())
    return count


@pytest.mark.parametrize("name", sorted(set(TINY) - {"mixtral"}))
def test_budget_is_exact_for_every_rule(
    tiny: Tiny, calibration: CalibrationSet, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long rules look for the best of what they try is cut short: no matter here."""
    monkeypatch.setattr(losses, "_RANGES", (0.04, 0.2))
    monkeypatch.setattr(rules, "_RATES", (0.04, 0.08))
    monkeypatch.setattr(rules, "_STEPS", 2)
    model = tiny(name)
    before = [parameter.clone() for parameter in model.module.parameters()]
    layers = find_layers(model.module, "all")
    text = CalibrationSet(calibration.ids[:2].clone(), "random ids", {})
    scores = score(model, text, proj=None, method="sketch", md=False)
    measured = Measurements(model, layers, text, memory=2**30)
    weights = sum(layer.weight.numel() for layer in layers)
    for rule in RULES:
        found = allocate(scores, sparsity=0.617, rule=rule, model=model, measured=measured)
        assert found.n_weights == weights
        assert zeros_after_pruning(layers, found) == round(0.617 * weights), rule
        assert found.manifest["budget"]["remainder"] == 0  # type: ignore[index]
        found.check(layers, model.digest)
    after = list(model.module.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_exact_in_the_layers_own_dtype_and_orientation(tiny: Tiny, scored: Scored) -> None:
    """GPT-2 stores weights transposed: rows of the allocation are neurons all the same."""
    found = allocate(scored("gpt2"), sparsity=0.5, model=tiny("gpt2"), proj="c_fc")
    assert {found.rows(name) for name in found.zeros} == {48}
    assert set(found.in_features.values()) == {32}


@pytest.mark.parametrize("sparsity", [0, 1, 0.0, 1.0, 1e-5])
def test_extreme_budgets(tiny: Tiny, scored: Scored, sparsity: float) -> None:
    found = allocate(scored("llama"), sparsity=sparsity, rule="linear", model=tiny("llama"))
    assert found.n_zeros == round(sparsity * found.n_weights)


def table(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"layer": ["a"] * 4 + ["b"] * 2, "neuron": [0, 1, 2, 3, 0, 1], **columns})


WIDTHS = {"a": 10, "b": 30}


def test_protect_by_hand() -> None:
    """The largest of each layer stays dense; the three and the one others pay, layer by layer."""
    scores = table(wd=[1.0, 5, 2, 3, 0, 1])
    found = allocate(scores, sparsity=0.5, protect=0.25, in_features=WIDTHS)
    assert found.zeros["a"].tolist() == [7, 0, 6, 7]
    assert found.zeros["b"].tolist() == [30, 0]
    partly = allocate(scores, sparsity=0.5, protect=0.25, protect_sparsity=0.2, in_features=WIDTHS)
    assert partly.zeros["a"].tolist() == [6, 2, 6, 6]
    assert partly.zeros["b"].tolist() == [24, 6]


def test_protect_across_layers_by_hand() -> None:
    """Two of six neurons, both of layer a: 50 zeros on 80 other weights."""
    scores = table(wd=[1.0, 5, 2, 3, 0, 1])
    found = allocate(scores, sparsity=0.5, protect=1 / 3, across="model", in_features=WIDTHS)
    assert found.zeros["a"].tolist() == [6, 0, 7, 0]  # 6.25, 6.25, 18.75, 18.75
    assert found.zeros["b"].tolist() == [18, 19]


def test_what_a_layer_cannot_hold_goes_to_the_others_by_their_size() -> None:
    """Half of layer b is protected, so that it holds 30 of 60; a and c share the rest as 1 : 10."""
    scores = pd.DataFrame(
        {
            "layer": ["a"] * 4 + ["b"] * 2 + ["c"] * 4,
            "neuron": [0, 1, 2, 3, 0, 1, 0, 1, 2, 3],
            "wd": [5.0] * 4 + [1.0] * 2 + [5.0] * 4,
        }
    )
    found = allocate(
        scores, sparsity=0.2, protect=0.5, rule="protect", across="layer",
        in_features={"a": 10, "b": 30, "c": 100},
    )  # fmt: skip
    without = allocate(
        scores, sparsity=0.2, protect=0.0, rule="protect", across="layer",
        in_features={"a": 10, "b": 30, "c": 100},
    )  # fmt: skip
    assert found.n_zeros == without.n_zeros == 100
    assert found.layers["zeros"].tolist() == without.layers["zeros"].tolist()
    tight = allocate(
        scores, sparsity=0.46, protect=0.5, rule="protect", across="layer",
        in_features={"a": 10, "b": 30, "c": 100},
    )  # fmt: skip
    assert tight.layers["zeros"].tolist() == pytest.approx([18.2, 30, 181.8], abs=1.01)


def test_blocks_come_from_the_scores_without_a_model() -> None:
    scores = table(wd=[1.0] * 6, block=pd.array([0] * 4 + [None] * 2, dtype="Int64"))
    found = allocate(scores, sparsity=0.5, in_features=WIDTHS)
    assert found.blocks == {"a": 0}
    assert list(found.layers["block"].isna()) == [False, True]
    assert found.manifest["model"] is None


def test_flagged_neurons_are_neither_protected_nor_lost() -> None:
    scores = table(wd=[1.0, np.nan, 2, 3, 0, 1])
    found = allocate(scores, sparsity=0.5, protect=0.25, in_features=WIDTHS)
    assert found.zeros["a"].tolist() == [7, 6, 7, 0]
    assert found.manifest["settings"]["filled"] == {"wd": 1}  # type: ignore[index]
    with pytest.raises(InvalidInput, match=r"'wd'.*finite"):
        allocate(table(wd=[np.nan] * 6), sparsity=0.5, in_features=WIDTHS)


def test_layers_can_be_chosen(tiny: Tiny, scored: Scored) -> None:
    found = allocate(scored("llama"), sparsity=0.5, model=tiny("llama"), layers=1, proj="mlp")
    assert list(found.zeros) == [f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert set(found.blocks.values()) == {1}


def test_rows_of_all_rules_keep_to_the_layers_of_another(tiny: Tiny, scored: Scored) -> None:
    model, scores = tiny("llama"), scored("llama")
    layers = allocate(scores, sparsity=0.6, rule="alphapruning", model=model).layers
    for rule in ("linear", "rank"):
        found = allocate(scores, sparsity=0.6, rule=rule, across="alphapruning", model=model)
        assert found.layers["sparsity"].to_numpy() == pytest.approx(
            layers["sparsity"].to_numpy(), abs=2 / (32 * 16)
        )
        assert (found.layers["highest"] > found.layers["lowest"] + 0.05).all()


def test_clips_hold_for_every_rule(tiny: Tiny, scored: Scored, calibration: CalibrationSet) -> None:
    model = tiny("opt")
    for rule in RULES:
        found = allocate(
            scored("opt"), sparsity=0.6, rule=rule, model=model, calibration=calibration,
            lowest=0.45, highest=0.7, protect_sparsity=0.5,
        )  # fmt: skip
        assert found.n_zeros == round(0.6 * found.n_weights)
        assert found.layers["lowest"].min() >= 0.45
        assert found.layers["highest"].max() <= 0.7


def test_pattern_gives_every_group_its_zeros(tiny: Tiny, scored: Scored) -> None:
    model = tiny("llama")
    found = allocate(
        scored("llama"), sparsity=0.6, rule="linear", model=model, pattern="n:8", spread=0.2
    )
    for name, zeros in found.zeros.items():
        assert not (zeros % (found.in_features[name] // 8)).any()
    budget = found.manifest["budget"]
    assert isinstance(budget, dict)
    assert found.n_zeros + budget["remainder"] == round(0.6 * found.n_weights)
    assert abs(budget["remainder"]) <= 32 // 8 // 2
    assert found.pattern == "n:8"
    assert allocate(scored("llama"), sparsity=0.6, rule="linear", model=model).pattern == "row"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.2}, r"`sparsity`.*\[0, 1\].*\b1\.2\b"),
        ({"sparsity": float("nan")}, r"`sparsity`.*\[0, 1\].*\bnan\b"),
        ({"protect": -0.1}, r"`protect`.*\[0, 1\]"),
        ({"lowest": 0.8, "highest": 0.2}, r"`lowest`.*`highest`.*\b0\.8\b.*\b0\.2\b"),
        ({"lowest": 0.2}, r"protect_sparsity.*\[0\.2, 1\].*\b0\b"),
        ({"rule": "rank", "spread": float("inf")}, r"`spread`.*got inf"),
        ({"rule": "trim", "spread": 0.1}, r"'trim'.*\b0\.1\b"),
        ({"pattern": "2:4"}, r"`pattern`.*n:m.*'2:4'"),
        ({"pattern": "n:4"}, r"\b4\b.*'a'.*\b10\b"),
        ({"rule": "uniform", "across": "model"}, r"`across`.*'uniform'"),
        ({"rule": "owl"}, r"'owl'.*`model`"),
        ({"across": "owl"}, r"'owl'.*`model`"),
        ({"layers": 1}, r"`layers`.*`proj`.*`model`"),
        ({"in_features": {"a": 10}}, r"'b'.*`model`"),
        ({"in_features": {"a": 10, "b": 0}}, r"in_features.*b.*got 0"),
        ({"in_features": None}, r"'a'.*`model`.*in_features"),
    ],
)
def test_settings_that_break_a_rule(changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"sparsity": 0.5, "in_features": WIDTHS} | changes
    with pytest.raises(InvalidInput, match=message) as caught:
        allocate(table(wd=[1.0] * 6), **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "protekt"}, "'protekt'"),
        ({"across": "layers"}, r"`across`.*'layers'"),
        ({"across": "rank"}, r"`across`.*'rank'"),
        ({"by": "wdd"}, "'wdd'"),
    ],
)
def test_unknown_names(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownName, match=message):
        allocate(table(wd=[1.0] * 6), sparsity=0.5, in_features=WIDTHS, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 0.95, "highest": 0.9}, r"\b0\b.*\b54\b.*\b0\b.*\b0\.54\b"),
        ({"sparsity": 0.1, "lowest": 0.3, "protect_sparsity": 0.3}, r"'protect'.*\b30\b.*\b72\b"),
        ({"sparsity": 0.9, "protect": 0.5}, r"'protect'.*\b0\.5\b.*\b0\b"),
    ],
)
def test_budgets_that_cannot_be_met(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InfeasibleBudget, match=message):
        allocate(table(wd=[1.0, 2, 3, 4, 5, 6]), in_features=WIDTHS, **changes)


def test_scores_of_another_model(tiny: Tiny, scored: Scored) -> None:
    with pytest.raises(InvalidInput, match=r"'Qwen3ForCausalLM'.*digest.*scores"):
        allocate(scored("llama"), sparsity=0.5, model=tiny("qwen3"))
    with pytest.raises(UnknownName, match=r"scores.*another model"):
        allocate(scored("llama").frame, sparsity=0.5, model=tiny("gpt2"))
    frame = scored("llama").frame
    odd = frame[(frame["layer"] != "model.layers.0.self_attn.o_proj") | (frame["neuron"] < 5)]
    with pytest.raises(InvalidInput, match=r"\b32\b.*model\.layers\.0\.self_attn\.o"):
        allocate(odd, sparsity=0.5, model=tiny("llama"))


def test_layers_without_scores(tiny: Tiny, scored: Scored) -> None:
    part = scored("llama").layer("model.layers.1.mlp.up_proj")
    with pytest.raises(InvalidInput, match=r"model\.layers\.0\.mlp.*\b1\b"):
        allocate(part, sparsity=0.5, model=tiny("llama"), proj="mlp")
    with pytest.raises(InvalidInput, match=r"'layer'.*row"):
        allocate(part.frame.iloc[:0], sparsity=0.5, model=tiny("llama"))


def test_text_that_a_rule_needs(tiny: Tiny, scored: Scored, calibration: CalibrationSet) -> None:
    model = tiny("llama")
    with pytest.raises(InvalidInput, match=r"'trim'.*`calibration`"):
        allocate(scored("llama"), sparsity=0.5, rule="trim", model=model)
    others = Measurements(model, find_layers(model.module, 0), calibration, memory=2**20)
    with pytest.raises(InvalidInput, match=r"`measured`.*\b21\b"):
        allocate(scored("llama"), sparsity=0.5, rule="trim", model=model, measured=others)


def test_the_manifest_says_where_it_comes_from(
    tiny: Tiny, scored: Scored, calibration: CalibrationSet
) -> None:
    found = allocate(
        scored("llama"), sparsity=0.5, rule="rank", by="wd+skewness", combine="rank",
        model=tiny("llama"), calibration=calibration,
    )  # fmt: skip
    manifest: Any = found.manifest
    assert manifest["kind"] == "allocation"
    assert manifest["model"]["digest"] == tiny("llama").digest
    assert manifest["calibration"]["digest"] == calibration.digest
    assert manifest["scores"]["calibration"]["digest"] == calibration.digest
    settings = manifest["settings"]
    assert settings["by"] == ["wd", "skewness"]
    assert (settings["rule"], settings["strength"], settings["across"]) == ("rank", 0.1, "uniform")
    assert manifest["budget"] == {
        "sparsity": 0.5, "zeros": found.n_zeros, "weights": found.n_weights, "remainder": 0,
    }  # fmt: skip
    assert {"seconds", "peak_memory_bytes", "packages"} <= set(manifest)
    again = allocate(
        scored("llama"), sparsity=0.5, rule="rank", by=["wd", "skewness"], combine="rank",
        model=tiny("llama"),
    )  # fmt: skip
    assert all(torch.equal(again.zeros[name], zeros) for name, zeros in found.zeros.items())
