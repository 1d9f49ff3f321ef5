"""WD of the module's own outputs on the text's own tokens, against numerical integration."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from entangle.models.layers import list_layers
from entangle.scoring.score import Method, score
from entangle.texts.calibration_set import CalibrationSet
from tests.reference import scoring as reference
from tests.tiny_models import OTHERS, TINY, build_other

NAMES = [*TINY, *OTHERS]
TABLES = {  # layers that run on relative positions alone, or on nothing without global attention
    "deberta_v2_own_keys": ("pos_key_proj", "pos_query_proj"),
    "deberta": ("pos_proj", "pos_q_proj"),
    "longformer": ("query_global", "key_global", "value_global"),
}
POOLED = {"albert": 3, "gemma3n": 2}

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")


@cache
def build(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TINY[name]() if name in TINY else build_other(name)


def own_outputs(module: nn.Module, ids: Tensor) -> dict[str, np.ndarray]:
    """Return what every layer gives on rows that are as many as the tokens of a pass."""
    kept: dict[str, list[Tensor]] = defaultdict(list)

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if output.shape[:-1].numel() == ids.numel():
                kept[name].append(output.double().flatten(0, -2).clone())

        return hook

    handles = [one.module.register_forward_hook(keep(one.name)) for one in list_layers(module)]
    with torch.no_grad():
        module(ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).numpy() for name, parts in kept.items()}


def chosen_neurons(n: int) -> Iterator[int]:
    yield from {0, n // 3, n - 1}


@pytest.mark.parametrize("method", ["exact", "sketch"])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_modules_own_outputs(
    name: str, method: Method, calibration: CalibrationSet
) -> None:
    module = build(name)
    found = score(module, calibration, layers="all", proj=None, method=method, md=False)
    outputs = own_outputs(module, calibration.ids)
    settings: Any = found.manifest["settings"]
    left = settings["layers_without_tokens"]
    assert {one.rpartition(".")[2] for one in left} >= set(TABLES.get(name, ()))
    assert not set(left) & set(found.frame["layer"])
    seen = found.frame[~found.frame["layer"].str.contains(".experts.", regex=False)]
    for layer, rows in seen.groupby("layer"):  # of experts: tests/scoring/test_mixtures.py
        own = outputs[str(layer)]
        assert set(rows["n_tokens"]) == {len(own)}
        for neuron in chosen_neurons(own.shape[1]):
            row = rows.iloc[neuron]
            y = own[:, neuron]
            if row["flag"] == "constant":
                assert y.std() < 1e-5 * (1 + np.abs(y).max())
                continue
            assert row["mean"] == pytest.approx(y.mean(), rel=1e-4, abs=1e-5)
            assert row["std"] == pytest.approx(y.std(), rel=1e-4)
            room = 5e-6 if method == "exact" else 0.0
            assert abs(row["wd"] - reference.wasserstein(y)) <= row["wd_bound"] + room
    pooled = settings.get("pooled_depths", {})
    assert set(pooled.values()) == ({POOLED[name]} if name in POOLED else set())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "mamba", "albert", "deberta_v2"])
def test_pads_change_nothing(name: str, side: str, calibration: CalibrationSet) -> None:
    """Padded rows against the same sequences, one by one, without pads."""
    module, lengths = build(name), [16, 9, 12, 5]
    ids, mask = torch.full((4, 16), 3), torch.zeros(4, 16, dtype=torch.bool)
    for i, n in enumerate(lengths):
        place = slice(16 - n, 16) if side == "left" else slice(n)
        ids[i, place], mask[i, place] = calibration.ids[i, :n], True
    padded = CalibrationSet(ids, "padded", {}, mask)
    found = score(
        module, padded, layers=1 if name != "albert" else 0, proj=None, method="exact", md=False
    )
    parts = [own_outputs(module, calibration.ids[i : i + 1, :n]) for i, n in enumerate(lengths)]
    for layer, rows in found.frame.groupby("layer"):
        own = np.concatenate([part[str(layer)] for part in parts])
        assert set(rows["n_tokens"]) == {len(own)}
        np.testing.assert_allclose(rows["mean"], own.mean(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(rows["std"], own.std(0), rtol=1e-3)
