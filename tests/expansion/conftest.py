"""A comparison on a tiny model, made once."""

from collections.abc import Callable

import pytest
import torch

from entangle.calibration import CalibrationSet
from entangle.evaluation import EvaluationText
from entangle.expansion.compare import Comparison, arms, compare
from entangle.models.loading import LanguageModel
from entangle.seeding import torch_rng


@pytest.fixture(scope="session")
def text() -> EvaluationText:
    """Return 5 windows of 16 random tokens."""
    ids = torch.randint(4, 90, (5, 16), generator=torch_rng(1, "evaluation"))
    return EvaluationText(ids, "random ids", {})


@pytest.fixture(scope="session")
def found(
    tiny: Callable[[str], LanguageModel], calibration: CalibrationSet, text: EvaluationText
) -> Comparison:
    """Magnitude, SparseGPT and both routers at two sparsities, on a tiny model."""
    chosen = arms(["magnitude", "sparsegpt", "expansion", "expansion-random"], [0.5, 0.8], [1, 3])
    return compare(tiny("llama"), calibration, text, chosen)
