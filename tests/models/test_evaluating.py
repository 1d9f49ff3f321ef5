"""A user's module comes back as it was: training mode everywhere, and what requires gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import entangle
from entangle.allocation import search
from entangle.errors import InvalidInput
from entangle.evaluation import (
    DenseReference,
    EvaluationText,
    MinimalPairs,
    compare_with_dense,
    minimal_pair_scores,
)
from entangle.experiments.damage import residual_variance, single_neuron_damage
from entangle.experiments.outliers import outlier_overlap
from entangle.experts.routed_rows import fit_rows
from entangle.explorer import explore
from entangle.models.blocks import evaluates, evaluating
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.texts.calibration_set import CalibrationSet
from tests.tiny_models import CONFIGS, TINY, tiny_tokenizer

GATE = "model.layers.0.mlp.gate_proj"
State = tuple[list[bool], list[bool]]


def state(module: nn.Module) -> State:
    flags = [child.training for child in module.modules()]
    return flags, [parameter.requires_grad for parameter in module.parameters()]


@pytest.fixture
def trained() -> nn.Module:
    """A model in the middle of fine-tuning: dropout on, a layer frozen, a block in eval mode."""
    module = TINY["llama"]()
    module.train().requires_grad_(True)
    find_layers(module, GATE)[0].module.requires_grad_(False)
    module.get_submodule("model.layers.1").eval()
    for child in module.modules():
        if hasattr(child, "attention_dropout"):
            setattr(child, "attention_dropout", 0.5)  # noqa: B010
    return module


CALLS: dict[str, Callable[[Any, CalibrationSet, EvaluationText, Path], object]] = {
    "score": lambda m, c, _t, _p: entangle.score(m, c, layers=0, proj=None),
    "perplexity": lambda m, _c, t, _p: entangle.perplexity(m, t),
    "ablate": lambda m, c, t, _p: entangle.ablate(
        m, c, evaluation=t, layers=GATE, proj=None, strengths=[0.5], seeds=1,
        measures=["perplexity", "divergence"], experts=[1, 2], count=2,
    ),
    "expand": lambda m, c, t, _p: entangle.expand(m, c, experts=2, restarts=1, evaluation=t),
    "compare": lambda m, c, t, _p: entangle.compare(m, c, t, methods="wanda", sparsity=[0.5]),
    "decompose": lambda m, c, _t, _p: entangle.decompose(m, c, layers=GATE, experts=[1, 2]),
    "neuron_modes": lambda m, c, _t, _p: entangle.neuron_modes(m, c, GATE, [1]),
    "allocate": lambda m, c, _t, _p: entangle.allocate(
        entangle.score(m, c, layers=GATE), sparsity=0.5, rule="sensitivity", model=m, calibration=c
    ),
    "search": lambda m, c, _t, _p: search(
        entangle.score(m, c, layers=GATE), model=m, calibration=c, sparsity=0.5, evaluations=2
    ),
    "explore": lambda m, c, _t, _p: explore(m, c, layers=GATE, proj=None)._repr_html_(),
    "fit_rows": lambda m, c, _t, _p: fit_rows(m, c, {GATE: [0]}, sparsities=[0.5], experts=[1]),
    "damage": lambda m, _c, t, _p: single_neuron_damage(m, t, {GATE: [0]}),
    "residual": lambda m, c, _t, _p: residual_variance(m, c),
    "outliers": lambda m, c, _t, _p: outlier_overlap(m, entangle.score(m, c, layers=GATE)),
    "pairs": lambda m, _c, _t, _p: minimal_pair_scores(
        m, MinimalPairs(("a b",), ("b a",), ("order",), "ours", {}), tiny_tokenizer()
    ),
    "divergence": lambda m, _c, t, _p: compare_with_dense(m, DenseReference(m, t)),
    "load_expanded": lambda m, c, _t, p: (
        entangle.expand(m, c, experts=2, restarts=1, out=p / "x"),
        entangle.load_expanded(p / "x", base=m),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_module_comes_back_as_it_was(
    name: str, trained: nn.Module, calibration: CalibrationSet, tmp_path: Path
) -> None:
    before = state(trained)
    assert len(set(before[0])) == len(set(before[1])) == 2
    text = EvaluationText(calibration.ids[:3], "ids", {})
    CALLS[name](trained, calibration, text, tmp_path)
    assert state(trained) == before
    CALLS[name](as_language_model(trained), calibration, text, tmp_path / "again")
    assert state(trained) == before


def test_training_mode_changes_no_number(trained: nn.Module, calibration: CalibrationSet) -> None:
    text = EvaluationText(calibration.ids[:3], "ids", {})
    still = TINY["llama"]()
    for measure in (
        lambda m: entangle.perplexity(m, text).window_losses.tolist(),
        lambda m: entangle.score(m, calibration, layers=2).frame.drop(columns="model").to_csv(),
        lambda m: compare_with_dense(m, DenseReference(still, text)).kl,
    ):
        assert measure(trained) == measure(still)
    with torch.no_grad():  # the dropout is a real one
        first, second = (trained(calibration.ids).logits for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("error", [InvalidInput, RuntimeError, KeyboardInterrupt])
def test_it_comes_back_after_errors_and_ctrl_c(
    error: type[BaseException], trained: nn.Module, calibration: CalibrationSet
) -> None:
    before = state(trained)

    def fail(*_seen: object) -> None:
        assert not trained.training
        raise error

    with pytest.raises(error):
        entangle.score(trained, calibration, layers=0, proj=None, watch=fail)
    assert state(trained) == before


def test_a_module_that_is_refused_was_not_touched(
    trained: nn.Module, calibration: CalibrationSet
) -> None:
    before = state(trained)
    with pytest.raises(InvalidInput, match="99"):
        entangle.score(trained, calibration, layers=99)
    assert state(trained) == before


class Merging(nn.Linear):
    """As adapters that are merged into the weight while they are in eval mode."""

    merged = False

    def train(self, mode: bool = True) -> "Merging":
        self.merged = not mode
        return super().train(mode)


def test_what_train_does_is_undone_by_train() -> None:
    shared = Merging(2, 2)
    model = nn.Sequential(Merging(2, 2), nn.Sequential(shared, nn.Dropout()), shared)
    model[1].eval()
    model[0].train()
    before = state(model)
    with evaluating(model):
        assert model[0].merged
        assert state(model) == ([False] * len(before[0]), [False] * len(before[1]))
        with evaluating(model):
            pass
        assert not model.training
    assert state(model) == before
    assert not model[0].merged


def test_a_frozen_model_is_not_touched() -> None:
    class Untouchable(nn.Linear):
        def train(self, _mode: bool = True) -> "Untouchable":
            raise AssertionError

    module = Untouchable(2, 2)
    module.training = False
    module.requires_grad_(False)
    with evaluating(module):
        assert not module.training


def test_any_argument_is_held() -> None:
    seen: list[bool] = []

    @evaluates
    def look(*parts: object, key: object = None) -> int:
        """Say how many there are."""
        seen.extend(
            part.module.training if isinstance(part, LanguageModel) else part.training
            for part in (*parts, key)
            if isinstance(part, nn.Module | LanguageModel)
        )
        return len(parts)

    modules = [nn.Linear(1, 1) for _ in range(3)]
    wrapped = LanguageModel(modules[2], None, "third", "memory", None)
    assert look(modules[0], 3, key=modules[1]) + look(wrapped) == 3
    assert seen == [False] * 3
    assert all(module.training for module in modules)
    assert (look.__name__, look.__doc__) == ("look", "Say how many there are.")


def test_a_compiled_module_comes_back(calibration: CalibrationSet) -> None:
    module = TINY["llama"]()
    module.train()
    compiled: Any = torch.compile(module, backend="eager")
    before = state(compiled)
    with evaluating(compiled):
        assert not any(state(compiled)[0])
    assert state(compiled) == before
    assert module.training


def test_all_tiny_models_come_back() -> None:
    for name in CONFIGS:
        module = TINY[name]().train()
        with evaluating(module):
            assert not any(state(module)[0])
        assert all(state(module)[0])
