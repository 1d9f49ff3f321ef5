"""What scores of neurons tell: predictors, mixtures, damage and outliers."""

from entangle.analysis.partial import partial_spearman
from entangle.analysis.predictors import PREDICTORS, predictor_table

__all__ = ["PREDICTORS", "partial_spearman", "predictor_table"]
