"""What scores of neurons tell: predictors, mixtures, damage and outliers."""

from entangle.analysis.damage import single_neuron_damage
from entangle.analysis.mixtures import gmm_components, mixture_components
from entangle.analysis.outliers import OUTLIERS, outlier_overlap
from entangle.analysis.partial import partial_spearman
from entangle.analysis.pearson import pearson_interval
from entangle.analysis.predictors import PREDICTORS, predictor_table
from entangle.analysis.residual import residual_variance, residual_writers

__all__ = [
    "OUTLIERS",
    "PREDICTORS",
    "gmm_components",
    "mixture_components",
    "outlier_overlap",
    "partial_spearman",
    "pearson_interval",
    "predictor_table",
    "residual_variance",
    "residual_writers",
    "single_neuron_damage",
]
