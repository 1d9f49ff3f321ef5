"""What scores of neurons tell: predictors, mixtures, damage and outliers."""

from entangle.analysis.damage import single_neuron_damage
from entangle.analysis.mixtures import gmm_components, mixture_components
from entangle.analysis.partial import partial_spearman
from entangle.analysis.predictors import PREDICTORS, predictor_table

__all__ = [
    "PREDICTORS",
    "gmm_components",
    "mixture_components",
    "partial_spearman",
    "predictor_table",
    "single_neuron_damage",
]
