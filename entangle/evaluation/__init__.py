"""Evaluation: protocols written down, and the dense model always beside the changed one."""

from entangle.evaluation.comparison import evaluate_models, perplexity_ratio, perplexity_table
from entangle.evaluation.losses import window_losses
from entangle.evaluation.perplexity import Perplexity, perplexity
from entangle.evaluation.text import EvaluationText, load_evaluation

__all__ = [
    "EvaluationText",
    "Perplexity",
    "evaluate_models",
    "load_evaluation",
    "perplexity",
    "perplexity_ratio",
    "perplexity_table",
    "window_losses",
]
