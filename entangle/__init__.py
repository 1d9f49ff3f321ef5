"""Neuron-entanglement analysis for language models.

Names are imported on first use, so that ``import entangle`` is instant and loads neither torch,
transformers nor matplotlib.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from entangle import _renamed
from entangle.packed import registering

if TYPE_CHECKING:
    from entangle.allocation import load_allocation
    from entangle.allocation.allocate import allocate
    from entangle.evaluation import load_evaluation, load_minimal_pairs, perplexity
    from entangle.experiments.ablate import ablate
    from entangle.experiments.anchor import anchor
    from entangle.experiments.compare import compare
    from entangle.experts.checkpoint import load_expanded
    from entangle.experts.expand import expand
    from entangle.experts.prune import prune
    from entangle.explorer import explore
    from entangle.models.loading import LanguageModel, load_model
    from entangle.modes import neuron_modes
    from entangle.modes.decompose import decompose
    from entangle.modes.probe import probe
    from entangle.results import load_result
    from entangle.results.ablation import AblationResult, load_ablation
    from entangle.results.comparison import load_comparison
    from entangle.results.decomposition import Decomposition, load_decomposition
    from entangle.results.diff import diff
    from entangle.results.difference import Difference, load_difference
    from entangle.results.scores import NeuronScores, load_scores
    from entangle.scoring.score import score
    from entangle.studies.study import study
    from entangle.studies.trace import trace
    from entangle.texts.calibration import load_calibration
    from entangle.texts.calibration_set import CalibrationSet

try:
    __version__ = version("neuron-entanglement")  # the name of the distribution, not of the package
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

_renamed.install()
registering.install()

_HOMES = {
    "AblationResult": "entangle.results.ablation",
    "CalibrationSet": "entangle.texts.calibration_set",
    "Decomposition": "entangle.results.decomposition",
    "Difference": "entangle.results.difference",
    "LanguageModel": "entangle.models.loading",
    "NeuronScores": "entangle.results.scores",
    "ablate": "entangle.experiments.ablate",
    "allocate": "entangle.allocation",
    "anchor": "entangle.experiments.anchor",
    "compare": "entangle.experiments.compare",
    "decompose": "entangle.modes.decompose",
    "diff": "entangle.results.diff",
    "expand": "entangle.experts.expand",
    "explore": "entangle.explorer",
    "load_ablation": "entangle.results.ablation",
    "load_allocation": "entangle.allocation",
    "load_calibration": "entangle.texts.calibration",
    "load_comparison": "entangle.results.comparison",
    "load_decomposition": "entangle.results.decomposition",
    "load_difference": "entangle.results.difference",
    "load_evaluation": "entangle.evaluation",
    "load_expanded": "entangle.experts.checkpoint",
    "load_minimal_pairs": "entangle.evaluation",
    "load_model": "entangle.models.loading",
    "load_result": "entangle.results",
    "load_scores": "entangle.results.scores",
    "neuron_modes": "entangle.modes",
    "perplexity": "entangle.evaluation",
    "probe": "entangle.modes.probe",
    "prune": "entangle.experts.prune",
    "score": "entangle.scoring.score",
    "study": "entangle.studies.study",
    "trace": "entangle.studies.trace",
}

__all__ = [
    "AblationResult",
    "CalibrationSet",
    "Decomposition",
    "Difference",
    "LanguageModel",
    "NeuronScores",
    "__version__",
    "ablate",
    "allocate",
    "anchor",
    "compare",
    "decompose",
    "diff",
    "expand",
    "explore",
    "load_ablation",
    "load_allocation",
    "load_calibration",
    "load_comparison",
    "load_decomposition",
    "load_difference",
    "load_evaluation",
    "load_expanded",
    "load_minimal_pairs",
    "load_model",
    "load_result",
    "load_scores",
    "neuron_modes",
    "perplexity",
    "probe",
    "prune",
    "score",
    "study",
    "trace",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'entangle' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
