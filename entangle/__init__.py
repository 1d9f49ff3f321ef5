"""Neuron-entanglement analysis for language models.

Names are imported on first use, so that ``import entangle`` is instant and loads neither torch,
transformers nor matplotlib.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entangle.ablation import AblationResult, ablate, load_ablation
    from entangle.allocation import allocate, load_allocation
    from entangle.calibration import CalibrationSet, load_calibration
    from entangle.decomposition import Decomposition, decompose, load_decomposition
    from entangle.evaluation import load_evaluation, load_minimal_pairs, perplexity
    from entangle.expansion import expand, load_expanded
    from entangle.expansion.compare import compare, load_comparison
    from entangle.explorer import explore
    from entangle.models.loading import LanguageModel, load_model
    from entangle.modes import neuron_modes
    from entangle.scoring.score import score
    from entangle.scoring.scores import NeuronScores, load_scores

try:
    __version__ = version("entangle")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

_HOMES = {
    "AblationResult": "entangle.ablation",
    "CalibrationSet": "entangle.calibration",
    "Decomposition": "entangle.decomposition",
    "LanguageModel": "entangle.models.loading",
    "NeuronScores": "entangle.scoring.scores",
    "ablate": "entangle.ablation",
    "allocate": "entangle.allocation",
    "compare": "entangle.expansion.compare",
    "decompose": "entangle.decomposition",
    "expand": "entangle.expansion",
    "explore": "entangle.explorer",
    "load_ablation": "entangle.ablation",
    "load_allocation": "entangle.allocation",
    "load_calibration": "entangle.calibration",
    "load_comparison": "entangle.expansion.compare",
    "load_decomposition": "entangle.decomposition",
    "load_evaluation": "entangle.evaluation",
    "load_expanded": "entangle.expansion",
    "load_minimal_pairs": "entangle.evaluation",
    "load_model": "entangle.models.loading",
    "load_scores": "entangle.scoring.scores",
    "neuron_modes": "entangle.modes",
    "perplexity": "entangle.evaluation",
    "score": "entangle.scoring.score",
}

__all__ = [
    "AblationResult",
    "CalibrationSet",
    "Decomposition",
    "LanguageModel",
    "NeuronScores",
    "__version__",
    "ablate",
    "allocate",
    "compare",
    "decompose",
    "expand",
    "explore",
    "load_ablation",
    "load_allocation",
    "load_calibration",
    "load_comparison",
    "load_decomposition",
    "load_evaluation",
    "load_expanded",
    "load_minimal_pairs",
    "load_model",
    "load_scores",
    "neuron_modes",
    "perplexity",
    "score",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'entangle' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
