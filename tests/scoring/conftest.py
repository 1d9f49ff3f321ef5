from collections.abc import Callable
from functools import cache

import pytest

from entangle.calibration import CalibrationSet
from entangle.models.loading import LanguageModel
from entangle.scoring.score import Method, score
from entangle.scoring.scores import NeuronScores

Scored = Callable[[str, Method], NeuronScores]


@pytest.fixture(scope="session")
def scored(tiny: Callable[[str], LanguageModel], calibration: CalibrationSet) -> Scored:
    """Scores of block 1 of a tiny model by a method, computed once and only read."""
    return cache(lambda name, method: score(tiny(name), calibration, layers=1, method=method))
