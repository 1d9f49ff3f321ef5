from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from entangle.models.loading import LanguageModel
    from entangle.results.decomposition import Decomposition
    from entangle.results.scores import NeuronScores
    from entangle.texts.calibration_set import CalibrationSet

LAYERS = ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj", "lm_head"]


@pytest.fixture(scope="session")
def llama(tiny: "Callable[[str], LanguageModel]") -> "LanguageModel":
    return tiny("llama")


@pytest.fixture(scope="session")
def scores(llama: "LanguageModel", calibration: "CalibrationSet") -> "NeuronScores":
    """Scores of 48, 32 and 112 neurons."""
    from entangle.scoring.score import score

    return score(llama, calibration, layers=LAYERS)


@pytest.fixture(scope="session")
def flawed(scores: "NeuronScores") -> "NeuronScores":
    """The same scores where neuron 0 of the first layer is constant and neuron 1 is NaN."""
    from dataclasses import replace

    frame = scores.frame.copy()
    measured = ["wd", "wd_se", "ks", "mean", "std", "skewness", "excess_kurtosis", "md"]
    frame.loc[[0, 1], measured] = np.nan
    frame.loc[0, ["mean", "std"]] = [0.25, 0.0]
    frame["flag"] = np.where(frame.index == 0, "constant", np.where(frame.index == 1, "nan", ""))
    return replace(scores, frame=frame)


@pytest.fixture(scope="session")
def decomposition(llama: "LanguageModel", calibration: "CalibrationSet") -> "Decomposition":
    """Experts of the first layer; neurons 3 and 5 are looked at closely."""
    from entangle.modes.decompose import decompose

    return decompose(
        llama, calibration, layers=LAYERS[0], neurons=[3, 5], experts=(1, 2), contexts=3, seed=0
    )
