"""Activation sparsity without training: masks over inputs and neurons, one a token.

``fit(model, text, "teal")`` looks at a text; ``.at(0.5)`` or ``.at_density(0.5)`` makes rules;
``measure(rules, text)`` gives the perplexity under them and what a token costs.
"""

from dataclasses import dataclass

import pandas as pd

from entangle.activation.greedy import search_levels
from entangle.activation.measures import (
    Cett,
    chunk_sparsity,
    lazy_neurons,
    perplexity_sparsity,
    routing_consistency,
)
from entangle.activation.methods import (
    ACTIVATION_METHODS,
    ActivationMethod,
    Levels,
    input_method,
)
from entangle.activation.rules import FORMS, Window
from entangle.activation.sparsity import ActivationSparsity
from entangle.activation.subject import SCOPES, Masks, Subject
from entangle.checks import choice, whole
from entangle.errors import InvalidInput
from entangle.evaluation.perplexity import Perplexity, check_prefix, measure_perplexity
from entangle.models.blocks import evaluating
from entangle.models.loading import AnyModel, as_language_model
from entangle.models.streaming import comes_by_blocks
from entangle.texts.calibration import as_calibration
from entangle.texts.evaluation import as_evaluation
from entangle.texts.given import Source

__all__ = [
    "ACTIVATION_METHODS",
    "FORMS",
    "SCOPES",
    "ActivationMethod",
    "ActivationSparsity",
    "Levels",
    "Masks",
    "SparseEvaluation",
    "chunk_sparsity",
    "fit",
    "input_method",
    "lazy_neurons",
    "measure",
    "perplexity_sparsity",
    "routing_consistency",
    "search_levels",
]

ACTIVATION_METHODS.own(Cett.name, Cett, source=Cett.source)


def fit(
    model: AnyModel,
    calibration: Source,
    method: str | type[ActivationMethod] = "teal",
    *,
    scope: str = "all",
    form: str | None = None,
    dense_prefix: int = 0,
) -> ActivationMethod:
    """Fit a method of activation sparsity to a model and a text.

    Parameters
    ----------
    model
        A name or path for `entangle.load_model`, a module that takes token ids, or a
        `LanguageModel`. Left unchanged.
    calibration
        Text that thresholds and bases come from, as in `entangle.expand`.
    method
        One of `ACTIVATION_METHODS`, or a class such as `input_method` makes.
    scope
        ``mlp`` (the linears of feed-forward parts, which Sparse Expansion touches) or ``all``
        linears of the blocks.
    form
        ``threshold`` (a number from the calibration text: what is kept varies with the token and
        drifts on another text) or ``topk`` (as many inputs of every token); by default as
        published.
    dense_prefix
        First tokens of every sequence that stay dense; of ``griffin`` and ``coreinfer`` those that
        choose.

    Raises
    ------
    UnknownName, InvalidInput
        If a name does not exist, or the method does not apply to the model.
    """
    kind = (
        ACTIVATION_METHODS[choice("method", method, ACTIVATION_METHODS)]
        if isinstance(method, str)
        else method
    )
    scope = choice("scope", scope, SCOPES)
    window = Window(dense=whole("dense_prefix", dense_prefix, least=0))
    known = as_language_model(model)
    if comes_by_blocks(known.module):
        raise InvalidInput(
            "activation sparsity needs the model's weights in memory; this one's come block by "
            "block: load it with --no-stream (stream=False)."
        )
    with evaluating(known.module):
        subject = Subject(known, as_calibration(calibration, known), scope, window)
        if not subject.layers:
            raise InvalidInput("the model must have linears in its blocks; it has none in scope.")
        return kind(subject, form)


@dataclass(frozen=True, eq=False)
class SparseEvaluation:
    """A model with sparse activations on a text."""

    perplexity: Perplexity
    """Of the tokens that are scored."""
    density: float
    """Multiply-adds a token of the layers in scope over the dense ones, measured, all charged."""
    without_turns: float
    """The same with nothing charged for turns into another basis."""
    flops: float
    """Multiply-adds a token of all linear layers, the head included, over the dense ones."""
    layers: pd.DataFrame
    """From `ActivationSparsity.costs`."""


def measure(
    made: ActivationSparsity,
    text: Source,
    *,
    prefix: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> SparseEvaluation:
    """Measure perplexity under the rules, and what a token costs.

    Parameters
    ----------
    made
        From `ActivationMethod.at` or ``at_density``.
    text
        Text to evaluate on, as in `entangle.perplexity`.
    prefix
        First tokens of every window that are neither scored nor counted; they are dense where the
        rules' `dense_prefix` says so.
    batch_size, progress
        As in `entangle.perplexity`.

    Raises
    ------
    InvalidInput
        If no token is left to score, and what running the model raises.
    """
    model = made.subject.model
    evaluation = as_evaluation(text, model)
    made.window.uncounted = check_prefix(prefix, evaluation)
    with made.applied():
        found = measure_perplexity(
            model, evaluation, batch_size=batch_size, prefix=prefix, progress=progress
        )
        numbers = made.density()
    return SparseEvaluation(found, **numbers, layers=made.costs())
