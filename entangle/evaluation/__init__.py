"""Evaluation: protocols written down, and the dense model always beside the changed one."""

from entangle.evaluation.divergence import DenseReference, Divergence, compare_with_dense
from entangle.evaluation.minimal_pairs import (
    MinimalPairs,
    PairScores,
    accuracy_difference,
    minimal_pair_scores,
)
from entangle.evaluation.pair_sources import load_minimal_pairs
from entangle.evaluation.perplexity import (
    Perplexity,
    evaluate_models,
    perplexity,
    perplexity_ratio,
    perplexity_table,
)
from entangle.texts.evaluation import EvaluationText, as_evaluation, load_evaluation, window_losses

__all__ = [
    "DenseReference",
    "Divergence",
    "EvaluationText",
    "MinimalPairs",
    "PairScores",
    "Perplexity",
    "accuracy_difference",
    "as_evaluation",
    "compare_with_dense",
    "evaluate_models",
    "load_evaluation",
    "load_minimal_pairs",
    "minimal_pair_scores",
    "perplexity",
    "perplexity_ratio",
    "perplexity_table",
    "window_losses",
]
