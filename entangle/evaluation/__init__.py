"""Evaluation: protocols written down, and the dense model always beside the changed one."""

from entangle.evaluation.comparison import evaluate_models, perplexity_ratio, perplexity_table
from entangle.evaluation.dense import DenseReference
from entangle.evaluation.divergence import Divergence, compare_with_dense
from entangle.evaluation.losses import window_losses
from entangle.evaluation.minimal_pairs import minimal_pair_scores
from entangle.evaluation.pair_scores import PairScores, accuracy_difference
from entangle.evaluation.pair_sources import load_minimal_pairs
from entangle.evaluation.pairs import MinimalPairs
from entangle.evaluation.perplexity import Perplexity, perplexity
from entangle.evaluation.text import EvaluationText, as_evaluation, load_evaluation

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
