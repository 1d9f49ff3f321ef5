from collections.abc import Callable

import numpy as np
import pytest
import torch

from entangle.allocation import allocate
from entangle.allocation.losses import aligner
from entangle.allocation.measurements import Measurements
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel
from entangle.results.scores import NeuronScores
from entangle.texts.calibration_set import CalibrationSet

RANGES = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.2, 0.25]


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_blocks_take_the_best_linear_schedule(
    tiny: Callable[[str], LanguageModel],
    scored: Callable[[str], NeuronScores],
    calibration: CalibrationSet,
    sparsity: float,
) -> None:
    model = tiny("gpt_neox")
    layers = find_layers(model.module, "all")
    errors = {}
    with aligner(Measurements(model, layers, calibration, memory=1)) as align:
        for spread in RANGES[: len(RANGES) if sparsity < 0.8 else -1]:
            schedule = [sparsity - spread, sparsity, sparsity + spread]
            shares = [schedule[layer.block or 0] for layer in layers]
            given = {
                layer.name: torch.full((layer.out_features,), min(max(share, 0.01), 0.99)).double()
                for layer, share in zip(layers, shares, strict=True)
            }
            errors[spread] = align(given).error
    best = min(errors, key=lambda one: errors[one])
    found = allocate(
        scored("gpt_neox"), sparsity=sparsity, rule="neuroal-blocks", model=model,
        calibration=calibration,
    )  # fmt: skip
    means = found.layers.groupby("block")["sparsity"].mean().to_numpy()
    assert means == pytest.approx([sparsity - best, sparsity, sparsity + best], abs=2e-3)


def test_rows_that_feed_what_shrinks_are_kept(
    tiny: Callable[[str], LanguageModel],
    scored: Callable[[str], NeuronScores],
    calibration: CalibrationSet,
) -> None:
    """Within a layer sparsity falls linearly with the loss of norm of the input that it feeds."""
    model = tiny("llama")
    settings = {"sparsity": 0.6, "model": model, "calibration": calibration}
    base = allocate(scored("llama"), rule="neuroal-blocks", **settings)  # type: ignore[arg-type]
    found = allocate(scored("llama"), rule="neuroal", **settings)  # type: ignore[arg-type]
    assert found.layers["zeros"].to_numpy() == pytest.approx(base.layers["zeros"], abs=1.01)
    layers = find_layers(model.module, "all")
    aim = {name: round(float(one.mean()), 2) for name, one in base.sparsity.items()}
    measured = Measurements(model, layers, calibration, memory=1)
    with aligner(measured) as align:
        lost = align({name: torch.full_like(one, aim[name]) for name, one in base.sparsity.items()})
    feeds = {
        "q_proj": "{b}.self_attn.o_proj",
        "o_proj": "{b}.mlp.gate_proj",
        "gate_proj": "{b}.mlp.down_proj",
        "up_proj": "{b}.mlp.down_proj",
    }  # fmt: skip  (down feeds the next block, whose own input pruning does not change)
    off = dict.fromkeys([0.0, *RANGES], 0.0)
    for layer in layers:
        zeros = found.zeros[layer.name].numpy()
        if layer.block == 2 or layer.projection not in feeds:
            assert np.ptp(zeros) <= 1
            continue
        fed = feeds[layer.projection].format(b=layer.block)
        score = lost.difference[f"model.layers.{fed}"].numpy()
        scaled = (score - score.min()) / np.ptp(score)
        for spread in off:
            wish = aim[layer.name] - 2 * spread * (scaled - scaled.mean())
            wanted = wish.clip(0.01, 0.99) * layer.in_features
            off[spread] = max(off[spread], float(np.abs(zeros - wanted).max()))
    best = min(off, key=lambda one: off[one])
    assert best > 0
    assert off[best] < 1.5
    assert sum(one < 1.5 for one in off.values()) <= 2


def test_errors_of_the_rows_do_not_grow(
    tiny: Callable[[str], LanguageModel],
    scored: Callable[[str], NeuronScores],
    calibration: CalibrationSet,
) -> None:
    model = tiny("llama")
    layers = find_layers(model.module, "all", "mlp")
    measured = Measurements(model, layers, calibration, memory=1)
    errors = {}
    for rule in ("neuroal-blocks", "neuroal"):
        found = allocate(
            scored("llama"), sparsity=0.6, rule=rule, model=model, measured=measured, proj="mlp"
        )
        with aligner(measured) as align:
            errors[rule] = align(found.sparsity).error
    assert errors["neuroal"] <= errors["neuroal-blocks"] * 1.02
