from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from entangle.errors import InvalidInput, UnknownName
from entangle.evaluation import EvaluationText, perplexity
from entangle.experiments import damage
from entangle.experiments.damage import single_neuron_damage
from entangle.experiments.interventions import (
    RowEdit,
    edited_outputs,
    layer_statistics,
    pruned_rows,
    swapped_rows,
)
from entangle.experiments.selection import Selection
from entangle.models.blocks import BlockRunner
from entangle.models.layers import Layer, find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.seeding import torch_rng
from entangle.stats.intervals import window_difference_interval
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import TINY

Tiny = Callable[[str], LanguageModel]
CountHooks = Callable[[nn.Module], int]


@pytest.fixture(scope="module")
def text() -> EvaluationText:
    ids = torch.randint(4, 112, (6, 12), generator=torch_rng(0, "damage"))
    return EvaluationText(ids, "random ids", {})


def two_of_each(layers: tuple[Layer, ...]) -> dict[str, list[int]]:
    """Give the rows in an order other than the one of the result, and one row twice."""
    return {layer.name: [5, 2, 5] for layer in reversed(layers)}


def whole_model(
    model: LanguageModel, text: EvaluationText, change: AbstractContextManager[None]
) -> tuple[float, float, float]:
    """Measure the changed and the dense model from the token ids on."""
    with change:
        changed = perplexity(model, text, batch_size=2).window_losses
    dense = perplexity(model, text, batch_size=2).window_losses
    gap = window_difference_interval(changed, dense, np.full(6, 11), n_boot=40, seed=3)
    return gap.value, gap.low, gap.high


def damages(row: Mapping[Hashable, float] | pd.Series) -> tuple[float, float, float]:
    return row["damage"], row["damage_low"], row["damage_high"]


def alone(layer: Layer, neuron: int) -> Selection:
    return Selection("listed", None, None, {layer.name: np.array([neuron])})


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone().view(torch.int32) for name, p in module.named_parameters()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "gemma3", "phi3"])
def test_edits_equal_those_of_the_whole_model(tiny: Tiny, text: EvaluationText, name: str) -> None:
    model = tiny(name)
    layers = (*find_layers(model.module, 0, "mlp"), *find_layers(model.module, 2))
    found = single_neuron_damage(
        model, text, two_of_each(layers), batch_size=2, n_boot=40, seed=3, progress=False
    )
    assert found["layer"].tolist() == [layer.name for layer in layers for _ in range(2)]
    assert found["neuron"].tolist() == [2, 5] * len(layers)
    by_name = {layer.name: layer for layer in layers}
    for row in found.to_dict("records"):
        layer = by_name[row["layer"]]
        change = edited_outputs([layer], alone(layer, row["neuron"]), "zero")
        assert damages(row) == pytest.approx(whole_model(model, text, change), abs=0)
        assert (row["block"], row["projection"]) == (layer.block, layer.projection)
    assert (found["damage"] != 0).sum() > len(found) / 2
    assert set(found["intervention"]) == {"zero"}
    assert set(found["strength"]) == {1.0}


@pytest.mark.parametrize("intervention", ["prune", "prune-wanda", "prune-magnitude"])
def test_pruned_rows_equal_those_of_the_whole_model(
    tiny: Tiny, text: EvaluationText, calibration: CalibrationSet, intervention: str
) -> None:
    model = tiny("gpt2")
    layers = find_layers(model.module, 1, "mlp")
    grams = layer_statistics(model, calibration, layers).grams
    found = single_neuron_damage(
        model, text, two_of_each(layers), intervention=intervention, strength=0.75,
        grams=None if intervention == "prune-magnitude" else grams, batch_size=2, n_boot=40, seed=3,
    )  # fmt: skip
    by_name = {layer.name: layer for layer in layers}
    pruner = {"prune": "sparsegpt"}.get(intervention, intervention.removeprefix("prune-"))
    for row in found.to_dict("records"):
        layer, index = by_name[row["layer"]], torch.tensor([2, 5])
        weight = pruned_rows(layer, grams[layer.name].gram, index, 0.75, pruner=pruner).weight
        place = [2, 5].index(row["neuron"])
        assert (weight[place] == 0).sum() == round(0.75 * layer.in_features)
        edit = RowEdit(layer, index[[place]], weight[[place]])
        assert damages(row) == whole_model(model, text, swapped_rows([edit]))


@pytest.mark.usefixtures("any_memory")
def test_means_and_strength(tiny: Tiny, text: EvaluationText) -> None:
    model = tiny("llama")
    (layer,) = find_layers(model.module, 1, "up_proj")
    means = {layer.name: torch.linspace(-2.0, 2.0, layer.out_features).double()}
    found = single_neuron_damage(
        model, text, {layer.name: [40]}, intervention="mean", strength=0.5, means=means,
        batch_size=2, n_boot=40, seed=3, memory=0,
    )  # fmt: skip
    change = edited_outputs([layer], alone(layer, 40), "mean", strength=0.5, means=means)
    assert damages(found.iloc[0]) == whole_model(model, text, change)


def test_a_neuron_that_writes_nothing_does_no_damage(text: EvaluationText) -> None:
    module = TINY["llama"]()
    (up, down) = (find_layers(module, 1, name)[0] for name in ("up_proj", "down_proj"))
    down.weight[:, 7] = 0
    found = single_neuron_damage(module, text, {up.name: [7, 8]}, n_boot=20)
    assert damages(found.iloc[0]) == (0.0, 0.0, 0.0)
    assert damages(found.iloc[1])[0] != 0.0


def test_all_weights_pruned_without_a_bias_is_zero_output(tiny: Tiny, text: EvaluationText) -> None:
    name = "model.layers.2.mlp.gate_proj"
    zeroed = single_neuron_damage(tiny("llama"), text, {name: [0, 1]}, n_boot=20)
    pruned = single_neuron_damage(
        tiny("llama"), text, {name: [0, 1]}, intervention="prune-magnitude", n_boot=20
    )
    np.testing.assert_allclose(pruned["damage"], zeroed["damage"], rtol=1e-4, atol=1e-7)
    assert zeroed["damage"].abs().min() > 1e-5


def test_strength_0_changes_nothing(tiny: Tiny, text: EvaluationText) -> None:
    rows = {"model.layers.0.mlp.gate_proj": [3]}
    found = single_neuron_damage(tiny("llama"), text, rows, strength=0.0, n_boot=5)
    assert found[["damage", "damage_low", "damage_high"]].iloc[0].tolist() == [0.0, 0.0, 0.0]


def test_one_window_has_no_interval(tiny: Tiny, text: EvaluationText) -> None:
    one = EvaluationText(text.windows[:1], "one", {})
    found = single_neuron_damage(tiny("llama"), one, {"model.layers.0.mlp.gate_proj": [3]})
    assert np.isfinite(found["damage"].item())
    assert found[["damage_low", "damage_high"]].isna().all(axis=None)


def test_only_the_neurons_block_and_later_ones_run(
    tiny: Tiny, text: EvaluationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    class Counting(BlockRunner):
        def run(self, index: int, hidden: Tensor, inputs: object) -> Tensor:
            ran.append(index)
            return super().run(index, hidden, inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(damage, "BlockRunner", Counting)
    rows = {"model.layers.1.mlp.gate_proj": [3, 4], "model.layers.2.mlp.up_proj": [0]}
    single_neuron_damage(tiny("llama"), text, rows, batch_size=6, n_boot=5)
    probe, dense, changed = [0, 1, 2], [0, 1, 2], [1, 2, 1, 2, 2]
    assert sorted(ran) == sorted(probe + dense + changed)


@pytest.mark.parametrize("intervention", ["flip-negative", "prune-magnitude"])
@pytest.mark.parametrize("stop", [True, False])
def test_the_model_comes_back_bit_for_bit(
    text: EvaluationText,
    count_hooks: CountHooks,
    intervention: str,
    stop: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = as_language_model(TINY["opt"]())
    before, layers, seen = bits(model.module), find_layers(model.module, "all", "fc1"), [0]

    class Stopping(BlockRunner):
        def leave(self, hidden: Tensor, ids: Tensor) -> Tensor:
            weights = bits(model.module)
            changed = any(not torch.equal(before[name], weights[name]) for name in before)
            seen[0] += changed or count_hooks(model.module) > 0
            if stop and seen[0] == 3:
                raise KeyboardInterrupt
            return super().leave(hidden, ids)

    monkeypatch.setattr(damage, "BlockRunner", Stopping)
    rows = {layer.name: [0, 1] for layer in layers}
    options = {"intervention": intervention, "strength": 0.5, "n_boot": 5}

    def run() -> None:
        single_neuron_damage(model, text, rows, **options)  # type: ignore[arg-type]

    if stop:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
        assert seen[0] == 2 * len(layers)
    after = bits(model.module)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert count_hooks(model.module) == 0
    assert not any("forward" in child.__dict__ for child in model.module.modules())


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ({"model.layers.0.mlp.gate_pro": [0]}, {}, r"unknown.*'model\.layers\.0\.mlp\.gate_pro'"),
        ({"model.layers.0.mlp.gate_proj": [48]}, {}, r"\[0, 48\).*\b48\b.*\b48\b"),
        ({"model.layers.0.mlp.gate_proj": [-1, 3]}, {}, r"rows.*gate_proj.*-1\b"),
        ({"lm_head": [0]}, {}, "'lm_head'.*outside"),
        ({"model.layers.0.mlp.gate_proj": []}, {}, "at least one neuron"),
        ({}, {"intervention": "nil"}, "unknown.*'nil'"),
        ({}, {"strength": 1.5}, r"`strength`.*\[0, 1\].*\b1\.5\b"),
        ({}, {"intervention": "prune", "strength": 0.5}, "gram"),
        ({}, {"intervention": "mean"}, "`means`.*outputs"),
        ({}, {"seed": -1}, r"`seed`.*-1\b"),
        ({}, {"batch_size": 0}, r"`batch_size`.*\b0\b"),
    ],
)
def test_bad_requests(
    tiny: Tiny,
    text: EvaluationText,
    rows: Mapping[str, list[int]],
    options: dict[str, object],
    says: str,
) -> None:
    given = rows or {"model.layers.0.mlp.gate_proj": [0]}
    with pytest.raises(InvalidInput, match=says) as raised:
        single_neuron_damage(tiny("llama"), text, given, **options)  # type: ignore[arg-type]
    assert isinstance(raised.value, UnknownName) == says.startswith("unknown")
