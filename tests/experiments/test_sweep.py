from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from entangle.errors import InvalidInput, NumericalError
from entangle.evaluation import EvaluationText, load_evaluation, perplexity
from entangle.experiments.ablate import Ablation, ablate
from entangle.experiments.experiment import Evaluation
from entangle.experiments.selection import select
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.pruning import prune
from entangle.results.ablation import AblationResult, load_ablation
from entangle.scoring.score import score
from entangle.seeding import torch_rng
from entangle.texts.calibration_set import CalibrationSet
from tests.saved import without_digests
from tests.tiny_models import TINY

Tiny = Callable[[str], LanguageModel]
QUICK: dict[str, Any] = {"fraction": 0.1, "strengths": (0.5,), "seeds": 2}


@pytest.fixture(scope="module")
def text() -> EvaluationText:
    ids = torch.randint(4, 112, (5, 12), generator=torch_rng(1, "evaluation tokens"))
    return load_evaluation(ids)


def _state(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def _same(model: LanguageModel, before: dict[str, torch.Tensor]) -> bool:
    after = model.module.state_dict()
    return list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in after)


@pytest.fixture(scope="module")
def everything(tiny: Tiny, calibration: CalibrationSet, text: EvaluationText) -> AblationResult:
    """All selections and interventions on one model, made once."""
    return ablate(
        tiny("llama"),
        calibration,
        evaluation=text,
        selections=("top", "bottom", "random", "random-norm", "random-variance", "all"),
        interventions=("prune", "prune-wanda", "zero", "mean", "flip-negative"),
        measures=("perplexity", "divergence"),
        experts=(1, 2),
        match=True,
        **QUICK,
    )


def test_every_arm_is_there_once(everything: AblationResult) -> None:
    planned = everything.frame[everything.frame["selection"] != "matched"]
    counts = planned.groupby(["intervention", "strength", "experts"])["measure"].count()
    per_arm = 4  # perplexity, its ratio, kl, top1_agreement
    selections = 3 + 3 * 2  # top, bottom, all; random ones twice
    assert set(counts.drop(("dense", 0.0, 1))) == {selections * per_arm}
    assert len(counts) == 1 + 2 * 2 + 3  # dense; pruners with 1 and 2 experts; edits
    assert everything.frame["measure"].value_counts().nunique() == 1
    assert everything.frame.loc[0, "selection"] == "dense"


def test_realised_sparsity_is_exact_and_written_to_every_row(everything: AblationResult) -> None:
    frame = everything.frame
    pruned = frame[frame["intervention"].str.startswith("prune")]
    assert (pruned["realised_sparsity"] == 0.5).all()
    assert (pruned[["realised_low", "realised_high"]] == 0.5).all(axis=None)
    assert frame.loc[frame["intervention"] == "zero", "realised_sparsity"].isna().all()


def test_the_dense_model_is_at_distance_0(everything: AblationResult) -> None:
    dense = everything.frame[everything.frame["selection"] == "dense"].set_index("measure")
    assert dense.loc["perplexity_ratio", "value"] == 1.0
    assert dense.loc["kl", "value"] == pytest.approx(0.0, abs=1e-9)
    assert dense.loc["top1_agreement", "value"] == 1.0


def test_an_arm_equals_rows_pruned_by_hand(
    calibration: CalibrationSet, text: EvaluationText, everything: AblationResult
) -> None:
    model = as_language_model(TINY["llama"]())
    layers = find_layers(model.module, "all", "mlp")
    inputs: dict[str, list[torch.Tensor]] = {}
    for layer in layers:
        layer.module.register_forward_pre_hook(
            lambda _, args, name=layer.name: inputs.setdefault(name, []).append(args[0])
        )
    model.module(calibration.ids)
    for layer in layers:
        x = inputs[layer.name][0].flatten(0, -2).double()
        chosen = everything.selections
        chosen = chosen[(chosen["selection"] == "top") & (chosen["layer"] == layer.name)]
        rows = chosen["neuron"].tolist()
        assert len(rows) == round(0.1 * layer.out_features)
        solved = prune(layer.weight, (x.T @ x).float(), sparsity=0.5)
        layer.weight[rows] = solved.weight[rows]
    summary = everything.summary("perplexity").set_index(["intervention", "experts", "selection"])
    assert perplexity(model, text).value == pytest.approx(
        summary.loc[("prune", 1, "top"), "value"], rel=1e-4
    )


def test_selections_are_those_of_the_scores(
    tiny: Tiny, calibration: CalibrationSet, everything: AblationResult
) -> None:
    scores = score(tiny("llama"), calibration, proj="mlp", method="sketch")
    expected = select(scores.frame, "top", fraction=0.1).frame
    chosen = everything.selections[everything.selections["selection"] == "top"]
    assert chosen[["layer", "neuron"]].reset_index(drop=True).equals(expected)


def test_contrasts_compare_top_with_all_others(everything: AblationResult) -> None:
    table = everything.contrasts()
    one = table[(table["intervention"] == "prune") & (table["experts"] == 1)]
    one = one[one["against"] != "matched"]
    assert one["against"].tolist() == ["bottom", "random", "random-norm", "random-variance", "all"]
    assert one["seeds"].tolist() == [1, 2, 2, 2, 1]
    values = everything.summary("perplexity").set_index(["intervention", "experts", "selection"])
    top, bottom = (float(values["value"][("prune", 1, name)]) for name in ("top", "bottom"))
    assert one["ratio"].iloc[0] == pytest.approx(top / bottom)
    assert ((one["low"] <= one["ratio"]) & (one["ratio"] <= one["high"])).all()


def test_experts_come_with_measures_of_every_neuron(everything: AblationResult) -> None:
    neurons = everything.neurons
    assert set(neurons["pruner"]) == {"sparsegpt", "wanda"}
    assert set(neurons["experts"]) == {1, 2}
    assert (neurons.loc[neurons["experts"] == 1, "ri"] == 1.0).all()
    assert (neurons["realised_sparsity"] == 0.5).all()


def test_matched_steps_are_recorded(everything: AblationResult) -> None:
    steps = everything.matched
    assert set(steps["intervention"]) == {"prune", "prune-wanda", "zero", "mean", "flip-negative"}
    assert (steps.groupby("intervention")["fraction"].first() == 1.0).all()


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_architecture_is_left_as_it_was(
    name: str, calibration: CalibrationSet, text: EvaluationText
) -> None:
    model = as_language_model(TINY[name]())
    before = _state(model)
    arguments: dict[str, Any] = {"interventions": ("prune", "mean"), "experts": (1, 2), **QUICK}
    arguments["proj"] = "q_proj" if name == "mixtral" else "mlp"  # its MLP is fused experts
    if name == "bert":
        with pytest.raises(InvalidInput, match=r"BertModel.*encoder"):
            ablate(model, calibration, evaluation=text, **arguments)
    else:
        result = ablate(model, calibration, evaluation=text, **arguments)
        assert np.isfinite(result.frame["value"]).all()
    assert _same(model, before)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("experts", [1, 2])
def test_a_broken_sweep_restores_the_model(
    calibration: CalibrationSet,
    text: EvaluationText,
    monkeypatch: pytest.MonkeyPatch,
    count_hooks: Callable[[torch.nn.Module], int],
    error: BaseException,
    experts: int,
) -> None:
    model = as_language_model(TINY["llama"]())
    before, modules = _state(model), list(model.module.modules())
    measure, calls = Evaluation.measure, []

    def break_later(*given: Any, **options: Any) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return measure(*given, **options)

    monkeypatch.setattr(Evaluation, "measure", break_later)
    with pytest.raises(type(error)):
        ablate(
            model, calibration, evaluation=text, experts=(experts,),
            interventions=("prune", "zero"), **QUICK,
        )  # fmt: skip
    assert _same(model, before)
    assert list(model.module.modules()) == modules
    assert count_hooks(model.module) == 0


def test_resume_skips_finished_arms_and_ends_the_same(
    tiny: Tiny,
    calibration: CalibrationSet,
    text: EvaluationText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = ablate(tiny("llama"), calibration, evaluation=text, out=tmp_path / "whole", **QUICK)
    measure, calls = Evaluation.measure, []

    def stop_at(limit: int) -> Callable[..., object]:
        def counted(*given: Any, **options: Any) -> object:
            calls.append(1)
            if len(calls) == limit:
                raise KeyboardInterrupt
            return measure(*given, **options)

        return counted

    monkeypatch.setattr(Evaluation, "measure", stop_at(4))
    with pytest.raises(KeyboardInterrupt):
        ablate(tiny("llama"), calibration, evaluation=text, out=tmp_path / "cut", **QUICK)
    assert not (tmp_path / "cut").exists()
    calls.clear()
    monkeypatch.setattr(Evaluation, "measure", stop_at(-1))
    with pytest.raises(InvalidInput, match="--resume"):
        ablate(tiny("llama"), calibration, evaluation=text, out=tmp_path / "cut", **QUICK)
    with pytest.raises(InvalidInput, match="another settings"):
        ablate(
            tiny("llama"), calibration, evaluation=text, out=tmp_path / "cut", resume=True,
            **{**QUICK, "strengths": (0.6,)},
        )  # fmt: skip
    cut = ablate(
        tiny("llama"), calibration, evaluation=text, out=tmp_path / "cut", resume=True, **QUICK
    )
    assert len(calls) == 1 + 4 - 2  # dense again; two of four arms were finished
    assert cut.frame.equals(whole.frame)
    for name in ("ablation", "windows", "selections"):
        one, other = (tmp_path / run / f"{name}.parquet" for run in ("whole", "cut"))
        assert one.read_bytes() == other.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def test_saved_and_loaded(everything: AblationResult, tmp_path: Path) -> None:
    loaded = load_ablation(everything.save(tmp_path / "result"))
    for name in ("frame", "windows", "selections", "neurons", "matched"):
        pd.testing.assert_frame_equal(getattr(loaded, name), getattr(everything, name))
    assert loaded.contrasts().equals(everything.contrasts())
    assert loaded.scores.frame.equals(everything.scores.frame)
    assert "<table" in loaded._repr_html_()
    (tmp_path / "result" / "windows.parquet").write_bytes(b"PAR1")
    with pytest.raises(InvalidInput, match=r"windows\.parquet'"):
        load_ablation(tmp_path / "result")
    with pytest.raises(InvalidInput, match=r"windows\.parquet' cannot be read"):
        load_ablation(without_digests(tmp_path / "result"))


def test_scores_made_before_are_used(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText
) -> None:
    scores = score(tiny("llama"), calibration, proj="mlp", method="exact")
    result = ablate(tiny("llama"), calibration, evaluation=text, scores=scores, **QUICK)
    assert result.scores.frame.equals(scores.frame)
    other = as_language_model(TINY["llama"]())
    with torch.no_grad():
        next(other.module.parameters()).add_(1.0)
    with pytest.raises(InvalidInput, match="digest"):
        ablate(other, calibration, evaluation=text, scores=scores, **QUICK)


def test_unequal_sparsity_is_refused(
    tiny: Tiny,
    calibration: CalibrationSet,
    text: EvaluationText,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    realised = Ablation.realised

    def skewed(one: Ablation, arm: object) -> object:
        zeros = realised(one, arm)  # type: ignore[arg-type]
        return zeros * 0.9 if arm.selection.rule == "bottom" else zeros  # type: ignore[attr-defined]

    monkeypatch.setattr(Ablation, "realised", skewed)
    with pytest.raises(NumericalError, match=r"\b0\.5\d*.*prune bottom wd"):
        ablate(tiny("llama"), calibration, evaluation=text, **QUICK)


def test_without_perplexity_there_are_no_contrasts(
    everything: AblationResult,
) -> None:
    bare = replace(everything, windows=pd.DataFrame({"window": pd.Series(dtype="int64")}))
    with pytest.raises(InvalidInput, match="no perplexity"):
        bare.contrasts()


def test_resume_refuses_other_scores(
    tiny: Tiny,
    calibration: CalibrationSet,
    text: EvaluationText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("llama")
    one, other = (score(model, calibration, proj="mlp", method="sketch", seed=s) for s in (0, 1))
    edits: dict[str, Any] = {**QUICK, "interventions": ("mean",), "resume": True}
    measure, calls = Evaluation.measure, []

    def stop(*given: Any, **options: Any) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*given, **options)

    monkeypatch.setattr(Evaluation, "measure", stop)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        ablate(model, calibration, evaluation=text, scores=one, out=out, **edits)
    with pytest.raises(InvalidInput, match="another settings"):
        ablate(model, calibration, evaluation=text, scores=other, out=out, **edits)
    assert ablate(model, calibration, evaluation=text, scores=one, out=out, **edits)
