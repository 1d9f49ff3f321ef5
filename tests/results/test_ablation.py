"""Comparisons of arms, and results of earlier versions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from entangle.evaluation import (
    EvaluationText,
    MinimalPairs,
    accuracy_difference,
    load_evaluation,
    minimal_pair_scores,
    perplexity,
    perplexity_ratio,
)
from entangle.experiments.ablate import ablate
from entangle.experiments.selection import Selection
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.results.ablation import AblationResult, layer_names, load_ablation
from entangle.seeding import torch_rng
from entangle.texts.calibration_set import CalibrationSet
from tests.saved import without_digests
from tests.tiny_models import TINY, tiny_tokenizer

WORDS = ("seven cats sleep", "a dog barks", "it rains today", "he sees 12 birds")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return as_language_model(TINY["llama"](), tiny_tokenizer())


@pytest.fixture(scope="module")
def text() -> EvaluationText:
    ids = torch.randint(4, 112, (6, 12), generator=torch_rng(1, "evaluation tokens"))
    return load_evaluation(ids)


@pytest.fixture(scope="module")
def pairs() -> MinimalPairs:
    good = [f"{words} {i}" for i in range(6) for words in WORDS]
    bad = [f"{i} {words[::-1]}" for i in range(6) for words in WORDS]
    return MinimalPairs(tuple(good), tuple(bad), ("order", "number") * 12, "here", {})


@pytest.fixture(scope="module")
def result(
    model: LanguageModel, calibration: CalibrationSet, text: EvaluationText, pairs: MinimalPairs
) -> AblationResult:
    return ablate(
        model, calibration, evaluation=text, pairs=pairs,
        measures=("perplexity", "divergence", "pairs"), fraction=0.2, seeds=2,
        strengths=(0.9,), experts=(1, 2), router=("kmeans", "random"), layers=[0, 2],
        interventions=("prune", "zero"),
    )  # fmt: skip


def _zeroed(model: LanguageModel, result: AblationResult, selection: str) -> LanguageModel:
    """Zero the selected rows of a model of its own, biases there are none."""
    own = as_language_model(TINY["llama"](), tiny_tokenizer())
    chosen = result.selections[result.selections["selection"] == selection]
    for layer in find_layers(own.module, [0, 2], "mlp"):
        layer.weight[chosen.loc[chosen["layer"] == layer.name, "neuron"].tolist()] = 0.0
    return own


def test_comparisons_equal_those_of_models_changed_by_hand(
    model: LanguageModel, text: EvaluationText, pairs: MinimalPairs, result: AblationResult
) -> None:
    changed, dense = _zeroed(model, result, "top"), as_language_model(TINY["llama"]())
    arm = {"selection": "top", "intervention": "zero"}
    expected = perplexity_ratio(perplexity(changed, text), perplexity(dense, text))
    found = result.compare(arm, "dense")
    for name in ("value", "low", "high"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5)
    scores = [minimal_pair_scores(one, pairs, tiny_tokenizer()) for one in (changed, dense)]
    by_hand = accuracy_difference(*scores)
    accuracy = result.compare(arm, "dense", measure="accuracy")
    assert accuracy.value == pytest.approx(by_hand.value)
    assert (accuracy.low, accuracy.high) == pytest.approx((by_hand.low, by_hand.high), abs=0.06)
    order = [np.array(one.correct)[::2].mean() for one in scores]
    found = result.compare(arm, "dense", measure="accuracy:order")
    assert found.value == pytest.approx(order[0] - order[1])


def test_every_measure_of_the_frame_can_be_compared(result: AblationResult) -> None:
    values = result.frame.set_index(["intervention", "selection", "measure"])["value"]
    for measure in result.frame["measure"].unique():
        top, bottom = (values["zero", name, measure] for name in ("top", "bottom"))
        arms = ({"selection": name, "intervention": "zero"} for name in ("top", "bottom"))
        found = result.compare(*arms, measure=measure)
        ratio = measure.startswith("perplexity")
        assert found.value == pytest.approx(top / bottom if ratio else top - bottom, abs=1e-9)
        assert found.low <= found.value <= found.high


def test_contrasts_and_summary_show_the_same_gaps(result: AblationResult) -> None:
    for measure in ("perplexity", "kl", "top1_agreement", "accuracy", "accuracy:number"):
        table = result.contrasts(measure)
        value = "ratio" if measure == "perplexity" else "difference"
        key = ["intervention", "strength", "experts", "router", "selection", "by"]
        named = table.drop(columns="by").rename(
            columns={"against": "selection", "against_by": "by"}
        )
        merged = result.summary(measure).merge(named, on=key, suffixes=("", "_other"))
        assert len(merged) == len(table) == 4 * 2  # settings; bottom and random
        assert merged["top_gap"].tolist() == merged[value].tolist()
        assert merged["top_gap_low"].tolist() == merged["low_other"].tolist()
        shown = result.summary(measure)["selection"].isin(["dense", "top"])
        assert result.summary(measure).loc[shown, "top_gap"].isna().all()


def test_random_clusters_are_arms_of_their_own(result: AblationResult) -> None:
    frame = result.frame[result.frame["measure"] == "perplexity"]
    routers = frame.groupby(["intervention", "experts"])["router"].unique()
    assert routers["prune", 2].tolist() == ["kmeans", "random"]
    assert routers["prune", 1].tolist() == routers["zero", 1].tolist() == [""]
    two = {"selection": "top", "experts": 2}
    ratio = result.compare(two | {"router": "random"}, two | {"router": "kmeans"})
    assert ratio.value != 1.0
    neurons = result.neurons
    assert neurons.groupby("experts")["router"].unique().map(list).to_dict() == {
        1: [""], 2: ["kmeans", "random"],
    }  # fmt: skip
    key = ["layer", "neuron", "experts", "sparsity", "pruner", "router"]
    assert not neurons.duplicated(key).any()
    assert result.plot() is not None


def test_the_layers_of_an_arm_can_be_read(result: AblationResult) -> None:
    arms = result.frame[result.frame["selection"] != "dense"]
    assert arms["layers"].unique().tolist() == ["6 layers"]
    (told,) = arms["layer_set"].unique()
    names = {str(name) for name in result.selections["layer"]}
    assert set(layer_names(told)) == names
    assert told.startswith("model.layers.{0,2}.mlp.")
    assert (result.frame.loc[result.frame["selection"] == "dense", "layer_set"] == "").all()


def test_a_result_of_an_earlier_version_loads(result: AblationResult, tmp_path: Path) -> None:
    folder = without_digests(result.save(tmp_path / "old"))
    kmeans = {}
    for name in ("ablation", "windows", "pairs", "neurons"):
        table = pd.read_parquet(folder / f"{name}.parquet")
        kmeans[name] = table[table["router"] != "random"].reset_index(drop=True)
        old = kmeans[name].drop(columns=["router", "layer_set", "paradigm"], errors="ignore")
        old.to_parquet(folder / f"{name}.parquet", index=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"]["router"] = "kmeans"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    loaded = load_ablation(folder)
    pd.testing.assert_frame_equal(loaded.frame, kmeans["ablation"])
    pd.testing.assert_frame_equal(loaded.windows, kmeans["windows"])
    pd.testing.assert_frame_equal(loaded.neurons, kmeans["neurons"])
    zero = {"selection": "top", "intervention": "zero"}
    assert loaded.compare(zero, "dense", measure="accuracy").value == pytest.approx(
        result.compare(zero, "dense", measure="accuracy").value
    )
    assert loaded.summary("accuracy:order")["top_gap"].isna().all()
    assert loaded.contrasts().equals(
        result.contrasts().query("router != 'random'").reset_index(drop=True)
    )


def test_layers_of_different_widths_are_as_sparse_as_each_can_be(
    calibration: CalibrationSet, text: EvaluationText
) -> None:
    """Inputs of 32 and 48: half is exact in both; 0.9 is 29 and 43 zeros."""
    settings: dict[str, Any] = {"fraction": 0.2, "scope": "model", "seeds": 2}
    found = ablate(
        as_language_model(TINY["llama"]()), calibration, evaluation=text, proj="mlp",
        strengths=(0.9,), experts=(1, 2), **settings,
    )  # fmt: skip
    arms = found.frame[found.frame["intervention"] == "prune"]
    assert set(arms["realised_low"].round(6)) <= {round(43 / 48, 6), round(29 / 32, 6)}
    assert set(arms["realised_high"].round(6)) <= {round(43 / 48, 6), round(29 / 32, 6)}
    chosen = found.selections.fillna({"seed": -1})
    zeros = np.where(chosen["layer"].str.contains("down"), 43 / 48, 29 / 32)
    expected = chosen.assign(zeros=zeros).groupby(["selection", "seed"])["zeros"].mean()
    realised = arms.fillna({"seed": -1}).groupby(["selection", "seed"])["realised_sparsity"]
    pd.testing.assert_series_equal(realised.mean(), expected, check_names=False, atol=1e-6)
    assert realised.max().to_numpy() == pytest.approx(realised.min().to_numpy(), abs=1e-6)


def test_a_selection_keeps_its_name_when_matched() -> None:
    chosen = Selection("matched", "wd", None, {"a": np.array([0])})
    assert chosen.name == "bottom wd matched in perplexity"
