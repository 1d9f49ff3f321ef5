"""Measures of one's own: a number for every window, from what the model predicts there."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from entangle.checks import choices
from entangle.doors import Door
from entangle.errors import EntangleError, InvalidInput
from entangle.evaluation.logits import next_tokens
from entangle.evaluation.perplexity import windows_in_a_pass
from entangle.models.blocks import evaluating
from entangle.models.loading import LanguageModel
from entangle.texts.evaluation import EvaluationText

OwnMeasure = Callable[[Float[Tensor, "tokens vocab"], Int64[Tensor, " tokens"]], Any]
"""From logits, float32, of every position but the last, and the tokens that come next: a number."""


TAKEN = (
    "method", "sparsity", "experts", "allocation", "ratio", "ratio_low", "ratio_high", "flops",
    "nonzeros", "bytes", "token_bytes", "density", "relative_error", "seconds", "uniform_ratio",
    "uniform_low", "uniform_high", "perplexity_ratio", "kl", "top1_agreement", "blimp", "accuracy",
    "accuracy_difference",
)  # fmt: skip
"""Names that mean something else where measures are told."""


@dataclass(frozen=True)
class Ours:
    """A measure of this package, which `entangle.experiments.experiment` knows how to take."""

    name: str


def as_measure(name: str, thing: Any) -> "OwnMeasure | Ours":
    """Return a function that is checked whenever it is called.

    Raises
    ------
    InvalidInput
        If it is no function; when it is run, if it raises, or returns what is no finite number.
    """
    if isinstance(thing, Ours):
        return thing
    if name in TAKEN:
        raise InvalidInput(f"a measure must not be called {name!r}, a column of tables of results.")
    if not callable(thing):
        raise InvalidInput(f"a measure must be a function; {name!r} is {type(thing).__name__}.")

    def measure(logits: Tensor, tokens: Tensor) -> float:
        try:
            found = thing(logits, tokens)
            value = float(found)
        except EntangleError:
            raise
        except Exception as error:
            raise InvalidInput(
                f"the measure {name!r} failed: {type(error).__name__}: {error}"
            ) from error
        if not math.isfinite(value):
            raise InvalidInput(f"the measure {name!r} must be a finite number; it is {value}.")
        return value

    return measure


MEASURES: Door["OwnMeasure | Ours"] = Door("measures", as_measure)
"""Everything that an ablation measures, by name."""
for _name, _source in (
    ("perplexity", "exp of the mean loss of the predicted tokens, and its ratio to dense"),
    ("divergence", "KL from the dense model's predictions, and top-1 agreement"),
    ("pairs", "accuracy on minimal pairs; blimp at the shell (arXiv 1912.00582)"),
):
    MEASURES.own(_name, Ours(_name), source=_source)


def is_own(name: str) -> bool:
    """Tell whether a measure is not one of this package's."""
    return name in MEASURES and not MEASURES.is_ours(name)


def own_measures(measures: str | Iterable[str]) -> list[str]:
    """Return the names of measures of one's own; `UnknownName` for one that does not exist."""
    if not measures:
        return []
    return [one for one in choices("measures", measures, MEASURES, kind="measure") if is_own(one)]


def measure_own(
    model: LanguageModel, text: EvaluationText, names: Sequence[str], *, prefix: int = 0
) -> dict[str, NDArray[np.float64]]:
    """Return the value of every window, (windows,), of measures by name.

    Parameters
    ----------
    model
        As it is.
    text
        Where it predicts.
    names
        Of `MEASURES`, not ours.
    prefix
        First tokens of a window, whose predictions are left out.
    """
    if not names:
        return {}
    functions: dict[str, Any] = {name: MEASURES[name] for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    batches = [ids for _, ids in text.rows.batches(windows_in_a_pass(None, model, text))]
    with evaluating(model.module):
        for ids, logits in next_tokens(model, batches):
            first = max(0, prefix - 1)
            for window, tokens in zip(logits[:, first:-1], ids[:, first + 1 :], strict=True):
                for name, function in functions.items():
                    found[name].append(function(window.float(), tokens.to(window.device)))
    return {name: np.array(values) for name, values in found.items()}
