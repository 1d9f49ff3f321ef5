"""Scores of tiny models, made once."""

from collections.abc import Callable
from functools import cache

import pytest

from entangle.models.loading import LanguageModel
from entangle.results.scores import NeuronScores
from entangle.scoring.score import score
from entangle.texts.calibration_set import CalibrationSet


@pytest.fixture(scope="session")
def scored(
    tiny: Callable[[str], LanguageModel], calibration: CalibrationSet
) -> Callable[[str], NeuronScores]:
    """Return the scores of all layers of a tiny model, by its name."""
    return cache(lambda name: score(tiny(name), calibration, proj=None, method="sketch", md=False))
