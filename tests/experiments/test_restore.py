"""A model that is interrupted inside an arm, in the midst of a forward pass, is as it was."""

import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn

from entangle.evaluation import load_evaluation
from entangle.experiments.ablate import Ablation, ablate
from entangle.experiments.arms import ArmPlan
from entangle.experiments.experiment import Evaluation
from entangle.models.layers import Layer, find_layers
from entangle.models.loading import as_language_model
from entangle.seeding import torch_rng
from entangle.texts.calibration_set import CalibrationSet
from tests.experiments.toys import bits, differing
from tests.tiny_models import CONFIGS, TINY

EDITS = ("zero", "mean", "clamp-negative", "flip-negative")


def _interrupt(*_: object) -> None:
    signal.raise_signal(signal.SIGINT)


def _fail(*_: object) -> None:
    raise ZeroDivisionError


def _layers(module: nn.Module, name: str) -> Sequence[Layer]:
    proj = "q_proj" if name == "mixtral" else "mlp"  # its MLP is fused experts
    if name == "bert":
        return [layer for layer in find_layers(module, 1) if layer.name.endswith("dense")
                and layer.block is not None]  # fmt: skip
    return find_layers(module, 1, proj)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_arm_restores_every_architecture(
    name: str, calibration: CalibrationSet, count_hooks: Callable[[nn.Module], int]
) -> None:
    model = as_language_model(TINY[name]())
    module, layers = model.module, _layers(model.module, name)
    before, modules = bits(module), list(module.modules())
    plain = module(calibration.ids)[0]
    experts = (1,) if name == "bert" else (1, 2)  # needs logits, block by block
    plan = ArmPlan(
        ["top"], ["wd"], 0.2, None, "layer", 1, 0, ["prune", "prune-wanda", *EDITS], [0.5],
        edit_strengths=[0.5, 1.0], experts=experts,
    )  # fmt: skip
    experiment = Ablation(
        model, calibration, Evaluation(None), layers=layers, plan=plan, md=False, memory=2**24
    )
    arms = experiment.prepare(ExitStack(), progress=False)
    assert len(arms) == 2 * len(experts) + 2 * len(EDITS)

    def use(stop: Callable[..., None]) -> None:
        assert not torch.equal(module(calibration.ids)[0], plain)
        _run_until(module, calibration, stop)

    for arm in arms:
        for stop, error in ((_interrupt, KeyboardInterrupt), (_fail, ZeroDivisionError)):
            with pytest.raises(error), experiment.applied(arm):
                use(stop)
            assert differing(before, bits(module)) == set(), arm.label
            assert list(module.modules()) == modules
            assert count_hooks(module) == 0
    assert torch.equal(module(calibration.ids)[0], plain)


def _run_until(module: nn.Module, calibration: CalibrationSet, stop: Callable[..., None]) -> None:
    """Run the model, and stop it in the middle of its second block."""
    inner = next(
        m
        for name, m in module.named_modules()
        if name.rpartition(".")[2] == "1" and ".experts." not in name
    )
    with inner.register_forward_hook(stop):
        module(calibration.ids)
    pytest.fail("the model ran to its end")


@pytest.mark.parametrize("name", ["gpt2", "phi3", "opt"])
def test_a_sweep_interrupted_in_a_forward_pass_restores(
    name: str, calibration: CalibrationSet, count_hooks: Callable[[nn.Module], int]
) -> None:
    model = as_language_model(TINY[name]())
    before = bits(model.module)
    ids = torch.randint(4, 112, (5, 12), generator=torch_rng(1, "evaluation tokens"))
    calls: list[int] = []

    def count(*_: object) -> None:
        calls.append(1)
        if differing(before, bits(model.module)):  # an arm
            _interrupt()

    settings: dict[str, Any] = {"fraction": 0.1, "strengths": (0.5, 0.9), "seeds": 2}
    handle = model.module.register_forward_hook(count)
    with pytest.raises(KeyboardInterrupt):
        ablate(model, calibration, evaluation=load_evaluation(ids), md=False, **settings)
    handle.remove()
    assert len(calls) > 2
    assert differing(before, bits(model.module)) == set()
    assert count_hooks(model.module) == 0
