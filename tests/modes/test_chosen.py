from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from entangle.errors import InvalidInput, NumericalError
from entangle.experts.rows import RowGroup
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel
from entangle.modes.groups import Chosen, choose, score_rows
from entangle.stats.wasserstein import shape_statistics
from tests.modes.stores import normal, store_of


def frame(wd: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"layer": "a", "neuron": range(len(wd)), "wd": wd})


@pytest.mark.parametrize(
    ("wd", "chosen"),
    [
        ([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.15], [1, 3, 5, 4]),
        ([0.5, 0.5, 0.5, 0.5, 0.5], [0, 1, 2]),  # the typical one is among them
        ([float("nan"), 0.4, float("nan")], [1]),
        ([0.2, 0.1], [0, 1]),
    ],
)
def test_choice_by_hand(wd: list[float], chosen: list[int]) -> None:
    assert choose(frame(wd)) == chosen


def test_nothing_to_choose_from() -> None:
    with pytest.raises(InvalidInput, match=r"'a'.*vary"):
        choose(frame([float("nan")]))


@pytest.fixture
def group(tiny: Callable[[str], LanguageModel]) -> RowGroup:
    layers = find_layers(tiny("gpt2").module, 1, "mlp.c_fc")
    return RowGroup.of(layers, {layers[0].name: torch.arange(48)})


@pytest.mark.parametrize("memory", [1, 2**20])
def test_scores_do_not_depend_on_the_parts(memory: int, group: RowGroup) -> None:
    tokens = normal(100, 32)
    scored = score_rows(group, store_of(tokens), memory=memory)
    outputs = tokens @ group.weight.T + group.bias
    whole = shape_statistics(outputs.T)
    for name in ("wd", "ks", "mean", "std", "skewness", "excess_kurtosis"):
        np.testing.assert_allclose(scored[name], getattr(whole, name), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scored["weight_norm"], group.weight.norm(dim=1), rtol=1e-6)
    assert scored["neuron"].tolist() == list(range(48))


def test_infinite_inputs(group: RowGroup) -> None:
    tokens = normal(20, 32)
    tokens[3, 4] = torch.inf
    with pytest.raises(NumericalError, match=r"\b48\b.*\b48\b.*\bNaN\b"):
        score_rows(group, store_of(tokens), memory=2**20)


def test_chosen_of_the_second_layer(tiny: Callable[[str], LanguageModel]) -> None:
    layers = find_layers(tiny("llama").module, ["*.1.mlp.gate_proj", "*.1.mlp.up_proj"])
    group = RowGroup.of(layers, {layer.name: torch.arange(48) for layer in layers})
    tokens = normal(30, 32)
    chosen = Chosen.of(group, 1, [40, 2], store_of(tokens), 2**20)
    assert chosen.place.tolist() == [88, 50]
    expected = tokens @ layers[1].weight[[40, 2]].T
    torch.testing.assert_close(chosen.outputs, expected.T)
