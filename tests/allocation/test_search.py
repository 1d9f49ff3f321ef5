"""The search evaluates candidates on held-out sequences, and keeps the best."""

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from entangle.allocation import Allocation, allocate, search
from entangle.allocation.search import split
from entangle.errors import InvalidInput, NumericalError, UnknownName
from entangle.evaluation import EvaluationText, perplexity
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.pruning import prune
from entangle.results.scores import NeuronScores
from entangle.scoring.score import score
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import TINY

Tiny = Callable[[str], LanguageModel]
Scored = Callable[[str], NeuronScores]


def run(model: LanguageModel, scores: NeuronScores, text: CalibrationSet, **changes: Any) -> Any:
    chosen = {"sparsity": 0.6, "proj": "mlp", "evaluations": 3, "progress": False}
    return search(scores, model=model, calibration=text, **{**chosen, **changes})


def test_the_last_sequences_are_held_out(calibration: CalibrationSet) -> None:
    first, last = split(calibration, 0.25)
    assert torch.equal(torch.cat([first.ids, last.windows]), calibration.ids)
    assert (first.n_seq, last.n_windows) == (9, 3)
    assert split(calibration, 0.01)[1].n_windows == 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_best_candidate_is_returned_with_its_cost(
    name: str, tiny: Tiny, scored: Scored, calibration: CalibrationSet
) -> None:
    model = tiny(name)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    found = run(model, scored(name), calibration, tune="linear", evaluations=6)
    told = found.manifest["search"]
    assert told["evaluations"] == len(told["tried"]) == 6
    assert told["seconds"] > 0
    assert "one expert" in told["stand_in"]
    assert told["held_out"]["n_windows"] == 3
    best = min(told["tried"], key=lambda one: one["perplexity"])
    assert told["chosen"] == best["strength"]
    assert found.manifest["settings"]["strength"] == best["strength"]
    assert found.n_zeros == round(0.6 * found.n_weights)
    found.check(find_layers(model.module, "all", "mlp"), model.digest)
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())


def by_hand(
    model: LanguageModel, allocation: Allocation, first: torch.Tensor, text: EvaluationText
) -> float:
    """Prune a fresh copy of the model with the dense model's inputs, and measure."""
    copied = as_language_model(TINY["llama"]())
    inputs: dict[str, torch.Tensor] = {}
    for layer in find_layers(model.module, "all", "mlp"):
        handle = layer.module.register_forward_hook(
            lambda _m, args, _out, name=layer.name: inputs.update({name: args[0].flatten(0, 1)})
        )
        with torch.no_grad():
            model.module(first)
        handle.remove()
    for layer in find_layers(copied.module, "all", "mlp"):
        x = inputs[layer.name].double()
        share = allocation.zeros[layer.name] / layer.in_features
        solved = prune(layer.weight, (x.T @ x).float(), sparsity=share, pattern=allocation.pattern)
        with torch.no_grad():
            layer.weight.copy_(solved.weight)
        zeros = (layer.weight == 0).sum(1)
        assert torch.equal(zeros, allocation.zeros[layer.name])
    return perplexity(copied, text).value


@pytest.mark.parametrize("pattern", ["row", "n:4"])
def test_candidates_are_pruned_on_the_first_and_scored_on_the_last_sequences(
    pattern: str, tiny: Tiny, scored: Scored, calibration: CalibrationSet
) -> None:
    model, scores = tiny("llama"), scored("llama")
    found = run(model, scores, calibration, tune="rank", evaluations=2, pattern=pattern)
    assert found.pattern == pattern
    first, text = split(calibration, 0.25)
    for one in found.manifest["search"]["tried"]:
        allocation = allocate(
            scores, sparsity=0.6, rule="rank", spread=one["strength"], model=model, proj="mlp",
            pattern=pattern,
        )  # fmt: skip
        expected = by_hand(model, allocation, first.ids, text)
        assert one["perplexity"] == pytest.approx(expected, rel=1e-3)


def test_for_protect_the_share_is_tuned(
    tiny: Tiny, scored: Scored, calibration: CalibrationSet
) -> None:
    found = run(tiny("llama"), scored("llama"), calibration, tune="protect", high=0.3)
    told = found.manifest["search"]
    assert [one["protect"] for one in told["tried"]] == pytest.approx([0.0, 0.15, 0.3])
    assert told["parameter"] == "protect"


def test_candidates_whose_budget_cannot_be_met_lose(
    tiny: Tiny, scored: Scored, calibration: CalibrationSet
) -> None:
    found = run(tiny("llama"), scored("llama"), calibration, tune="protect", high=1.0, sparsity=0.9)
    assert [one["perplexity"] for one in found.manifest["search"]["tried"]][-1] is None
    assert found.manifest["search"]["chosen"] == 0.0
    with pytest.raises(NumericalError, match=r"\b3\b.*'protect'"):
        run(
            tiny("llama"), scored("llama"), calibration, tune="protect", sparsity=0.9,
            highest=0.8,
        )  # fmt: skip


@pytest.mark.usefixtures("any_memory")
def test_grams_are_made_anew_where_the_memory_does_not_hold_them(
    tiny: Tiny, scored: Scored, calibration: CalibrationSet
) -> None:
    settings = {"tune": "linear", "evaluations": 2}
    kept = run(tiny("llama"), scored("llama"), calibration, **settings)
    anew = run(tiny("llama"), scored("llama"), calibration, **settings, memory=1)
    assert kept.manifest["search"]["tried"] == anew.manifest["search"]["tried"]


def test_the_model_is_restored_when_a_candidate_fails(
    tiny: Tiny, scored: Scored, calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    before = {key: value.clone() for key, value in model.module.state_dict().items()}

    def fail(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[search.__module__], "measure_perplexity", fail)
    with pytest.raises(KeyboardInterrupt):
        run(model, scored("llama"), calibration)
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())


def test_a_loss_that_is_not_finite_is_infinite(calibration: CalibrationSet) -> None:
    model = as_language_model(TINY["llama"]())
    scores = score(model, calibration, proj="mlp", method="sketch", md=False)
    head = find_layers(model.module, "lm_head")[0]
    with torch.no_grad():
        head.weight.fill_(math.nan)
    with pytest.raises(NumericalError, match="'linear'"):
        run(model, NeuronScores(scores.frame, scores.layers, scores.histograms, {}), calibration)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": "uniform"}, r"'uniform'.*spread"),
        ({"evaluations": 1}, r"`evaluations`.*\b2\b.*\b1\b"),
        ({"held_out": 0.0}, r"held_out.*\(0, 1\).*\b0\.0\b"),
        ({"held_out": 0.99}, r"held_out.*\b0\.99\b.*\b12\b"),
        ({"high": -1.0}, r"`high`.*0; got -1\.0"),
        ({"sparsity": 1.5}, "`sparsity`"),
    ],
)
def test_mistakes_are_one_clear_line(
    changes: dict[str, Any], message: str, tiny: Tiny, scored: Scored, calibration: CalibrationSet
) -> None:
    with pytest.raises(InvalidInput, match=message):
        run(tiny("llama"), scored("llama"), calibration, **changes)


def test_an_unknown_rule_is_named(tiny: Tiny, scored: Scored, calibration: CalibrationSet) -> None:
    with pytest.raises(UnknownName, match="'liner'"):
        run(tiny("llama"), scored("llama"), calibration, tune="liner")
