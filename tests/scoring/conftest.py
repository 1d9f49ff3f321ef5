from collections.abc import Callable
from functools import cache

import pytest

from entangle.models.loading import LanguageModel
from entangle.results.scores import NeuronScores
from entangle.scoring.score import Method, score
from entangle.texts.calibration_set import CalibrationSet

Scored = Callable[[str, Method], NeuronScores]


@pytest.fixture(scope="session")
def scored(tiny: Callable[[str], LanguageModel], calibration: CalibrationSet) -> Scored:
    """Scores of block 1 of a tiny model by a method, computed once and only read."""
    return cache(lambda name, method: score(tiny(name), calibration, layers=1, method=method))
