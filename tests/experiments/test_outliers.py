from collections.abc import Callable
from math import comb
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from entangle.errors import InvalidInput, UnknownName
from entangle.experiments.damage import residual_variance
from entangle.experiments.interventions import layer_statistics
from entangle.experiments.outliers import OUTLIERS, outlier_overlap
from entangle.models.layers import Layer, find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.results.scores import NeuronScores
from entangle.scoring.score import score
from entangle.stats.gram import GramResult
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import TINY

Tiny = Callable[[str], LanguageModel]
DOWN = "model.layers.1.mlp.down_proj"


def scored(
    model: LanguageModel, layer: Layer, wd: list[float], flags: dict[int, str] | None = None
) -> NeuronScores:
    """Scores that say what they are told."""
    n = len(wd)
    frame = pd.DataFrame(
        {"layer": layer.name, "block": layer.block, "neuron": range(n), "wd": wd, "flag": ""}
    )
    for neuron, flag in (flags or {}).items():
        frame.loc[neuron, "flag"] = flag
    manifest = {"model": {"digest": model.digest}}
    return NeuronScores(frame, pd.DataFrame(), {}, manifest)


def model_with(weight: torch.Tensor) -> tuple[LanguageModel, Layer]:
    """A llama whose down projection of block 1, (32, 48), has these weights."""
    module = TINY["llama"]()
    (layer,) = find_layers(module, DOWN)
    layer.weight.copy_(weight)
    return as_language_model(module), layer


def only(frame: pd.DataFrame, kind: str) -> dict[str, Any]:
    (row,) = frame[frame["outliers"] == kind].to_dict("records")
    return {str(key): value for key, value in row.items()}


def gram_with(rms: torch.Tensor) -> GramResult:
    return GramResult(torch.diag(rms.square() * 10), torch.zeros(len(rms)), 10)


def test_weights_by_hand() -> None:
    # the 4 largest of 1,536 weights lie in rows 3, 3, 8 and 20; rows 3, 8 and 9 have the largest WD
    weight = torch.full((32, 48), 0.01)
    weight[3, 5], weight[3, 6], weight[8, 40], weight[20, 0] = 2.0, -3.0, -2.0, 2.5
    model, layer = model_with(weight)
    wd = [1.0 if row in (3, 8, 9) else 0.1 for row in range(32)]
    row = only(
        outlier_overlap(model, scored(model, layer, wd), fraction=0.1, weight_share=4 / 1536),
        "weights",
    )
    assert (row["layer"], row["block"], row["projection"]) == (DOWN, 1, "down_proj")
    assert (row["n_neurons"], row["n_top"], row["n_outliers"], row["overlap"]) == (32, 3, 3, 2)
    assert row["jaccard"] == 2 / 4
    assert row["expected"] == pytest.approx(9 / 32)
    assert row["enrichment"] == pytest.approx(2 / (9 / 32))
    ways = comb(3, 2) * comb(29, 1) + comb(3, 3)
    assert row["p_value"] == pytest.approx(ways / comb(32, 3))
    assert pd.isna(row["n_dimensions"])


def test_inputs_by_hand() -> None:
    # inputs 4 and 7 are above 6 medians, input 9 is not; rows 0, 30 and 31 have their weights there
    weight = torch.full((32, 48), 0.1)
    weight[30, 4], weight[31, 7], weight[0, 4], weight[15, 9] = 5.0, -5.0, 4.0, 50.0
    model, layer = model_with(weight)
    rms = torch.ones(48)
    rms[4], rms[7], rms[9] = 6.1, 60.0, 5.9
    wd = [float(row in (0, 15, 31)) + row / 1000 for row in range(32)]
    scores, grams = scored(model, layer, wd), {DOWN: gram_with(rms)}
    row = only(outlier_overlap(model, scores, fraction=0.1, grams=grams), "inputs")
    assert (row["n_top"], row["n_outliers"], row["n_dimensions"], row["overlap"]) == (3, 3, 2, 2)
    row = only(outlier_overlap(model, scores, fraction=0.1, grams=grams, factor=5.8), "inputs")
    assert (row["n_outliers"], row["n_dimensions"], row["overlap"]) == (3, 3, 2)
    row = only(outlier_overlap(model, scores, fraction=0.1, grams=grams, factor=100), "inputs")
    assert (row["n_outliers"], row["n_dimensions"], row["overlap"], row["p_value"]) == (0, 0, 0, 1)
    assert np.isnan(row["enrichment"])


def test_outputs_by_hand() -> None:
    model, layer = model_with(torch.randn(32, 48))
    variance = torch.ones(32, dtype=torch.float64)
    variance[2], variance[5], variance[6] = 9.0, 4.0, 8.0
    wd = [float(row in (2, 6, 7)) for row in range(32)]
    found = outlier_overlap(
        model, scored(model, layer, wd), fraction=0.1, residual={DOWN: variance}
    )
    assert found["outliers"].tolist() == ["weights", "outputs"]
    row = only(found, "outputs")
    assert (row["n_top"], row["n_outliers"], row["overlap"]) == (3, 3, 2)


def test_flagged_neurons_take_no_part() -> None:
    weight = torch.full((32, 48), 0.01)
    weight[3, 5], weight[8, 40] = 9.0, 8.0
    model, layer = model_with(weight)
    variance = torch.arange(32.0)
    wd = [float(row) for row in range(32)]
    scores = scored(model, layer, wd, {3: "constant", 31: "nan"})
    found = outlier_overlap(
        model, scores, fraction=0.06, weight_share=2 / 1536, residual={DOWN: variance}
    )
    weights, outputs = only(found, "weights"), only(found, "outputs")
    assert (weights["n_neurons"], weights["n_outliers"], weights["overlap"]) == (30, 1, 0)
    assert (outputs["n_outliers"], outputs["overlap"], outputs["jaccard"]) == (2, 2, 1.0)


def test_chance_alone_is_not_enriched() -> None:
    enrichment, p = [], []
    for seed in range(60):
        rng = torch.Generator().manual_seed(seed)
        model, layer = model_with(torch.randn(32, 48, generator=rng))
        wd = torch.rand(32, generator=rng).tolist()
        row = only(
            outlier_overlap(model, scored(model, layer, wd), fraction=0.25, weight_share=0.005),
            "weights",
        )
        enrichment.append(row["enrichment"])
        p.append(row["p_value"])
    assert np.mean(enrichment) == pytest.approx(1.0, abs=0.15)
    assert np.mean(np.array(p) <= 0.05) <= 0.12


def test_a_model_that_was_scored(tiny: Tiny, calibration: CalibrationSet) -> None:
    model = tiny("gpt2")
    layers = find_layers(model.module, "all", "mlp")
    scores = score(model, calibration, layers=[layer.name for layer in layers], method="sketch")
    known = layer_statistics(model, calibration, layers, scores=scores)
    found = outlier_overlap(
        model, scores, grams=known.grams, residual=residual_variance(model, calibration)
    )
    expected = [
        (layer.name, kind)
        for layer in layers
        for kind in OUTLIERS
        if kind != "outputs" or layer.projection == "c_proj"
    ]
    assert list(zip(found["layer"], found["outliers"], strict=True)) == expected
    assert ((found["p_value"] > 0) & (found["p_value"] <= 1)).all()
    assert (found["overlap"] <= found[["n_top", "n_outliers"]].min(axis=1)).all()
    assert (found["jaccard"] == found["overlap"] / (
        found["n_top"] + found["n_outliers"] - found["overlap"])).all()  # fmt: skip
    pd.testing.assert_frame_equal(
        outlier_overlap(model, scores), found[found["outliers"] == "weights"].reset_index(drop=True)
    )


def test_bad_requests(tiny: Tiny, calibration: CalibrationSet) -> None:
    model, layer = model_with(torch.zeros(32, 48))
    scores = scored(model, layer, [float(row) for row in range(32)])
    nothing = only(outlier_overlap(model, scores), "weights")
    assert nothing["n_outliers"] == 0
    with pytest.raises(InvalidInput, match=r"'LlamaForCausalLM'.*digest.*scores"):
        outlier_overlap(tiny("llama"), scores)
    with pytest.raises(InvalidInput, match=r"weight_share.*\b0\.0\b"):
        outlier_overlap(model, scores, weight_share=0.0)
    with pytest.raises(InvalidInput, match=r"`factor`.*0; got -1"):
        outlier_overlap(model, scores, factor=-1.0)
    with pytest.raises(InvalidInput, match=r"`fraction`.*\b0\.0\b"):
        outlier_overlap(model, scores, fraction=0.0)
    with pytest.raises(UnknownName, match="'wc'"):
        outlier_overlap(model, scores, by="wc")
    with pytest.raises(InvalidInput, match=r"`grams`.*\(48, 48\)"):
        outlier_overlap(model, scores, grams={DOWN: gram_with(torch.ones(3))})
    with pytest.raises(InvalidInput, match=r"`residual`.*\(32,\)"):
        outlier_overlap(model, scores, residual={DOWN: torch.ones(48)})
