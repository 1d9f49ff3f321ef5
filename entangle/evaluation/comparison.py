"""Several models on one text: a table whose first row is the baseline of the others."""

from collections.abc import Iterable, Mapping

import pandas as pd

from entangle.errors import InvalidInput
from entangle.evaluation.perplexity import Perplexity, measure_perplexity, perplexity
from entangle.models.loading import AnyModel, as_language_model
from entangle.runs.affixes import special_tokens_of
from entangle.stats.intervals import Interval, perplexity_ratio_interval
from entangle.texts.evaluation import as_evaluation
from entangle.texts.given import Source


def evaluate_models(
    models: Iterable[tuple[str, AnyModel]],
    text: Source,
    *,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> dict[str, Perplexity]:
    """Measure the perplexity of several models on one text.

    How much special tokens matter is measured of the first one (see `perplexity`).

    Parameters
    ----------
    models
        Label and model (as in `perplexity`), the dense one first. They are asked for one at a time,
        so that a generator may load, or change the weights, in between.
    text, batch_size, progress
        As in `perplexity`.

    Returns
    -------
    dict
        Result of each label, in the order given.

    Raises
    ------
    InvalidInput
        If two models have the same label; and as `perplexity`.
    """
    results: dict[str, Perplexity] = {}
    for label, model in models:
        if label in results:
            raise InvalidInput(f"every model must have a label of its own; got {label!r} twice.")
        text = as_evaluation(text, as_language_model(model))
        measure = measure_perplexity if results else perplexity
        results[label] = measure(model, text, batch_size=batch_size, progress=progress)
    return results


def perplexity_table(
    results: Mapping[str, Perplexity], *, n_boot: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Return one row a model; ratios are to the first, which is the dense baseline.

    Parameters
    ----------
    results
        From `evaluate_models`, all on one text.
    n_boot, seed
        Of the interval of the ratio, as in `perplexity_ratio`.

    Returns
    -------
    pandas.DataFrame
        Columns ``model``, ``perplexity``, ``ratio`` with its 95 % interval ``ratio_low`` and
        ``ratio_high``, ``word_perplexity``, ``bits_per_byte``, ``windows``, ``tokens``,
        ``special_tokens`` (those around every window, in words), ``flag``.

    Raises
    ------
    InvalidInput
        If there is no result, or two are not on the same text.
    """
    if not results:
        raise InvalidInput("`results` must hold at least one result; got none.")
    baseline = next(iter(results.values()))
    rows = []
    for label, result in results.items():
        ratio = perplexity_ratio(result, baseline, n_boot=n_boot, seed=seed)
        rows.append(
            {
                "model": label,
                "perplexity": result.value,
                "ratio": ratio.value,
                "ratio_low": ratio.low,
                "ratio_high": ratio.high,
                "word_perplexity": result.word_perplexity,
                "bits_per_byte": result.bits_per_byte,
                "windows": len(result.window_losses),
                "tokens": result.n_tokens,
                "special_tokens": special_tokens_of(result.protocol),
                "flag": result.flag,
            }
        )
    return pd.DataFrame(rows).astype({"word_perplexity": float, "bits_per_byte": float})


def perplexity_ratio(
    result: Perplexity,
    baseline: Perplexity,
    *,
    n_boot: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return the ratio of two perplexities with a paired percentile bootstrap interval.

    Windows are resampled with replacement, the same ones for both models: what a window's text
    makes easy or hard cancels.

    Parameters
    ----------
    result, baseline
        On the same text; the ratio is result / baseline.
    n_boot
        Number of resamples.
    seed
        Of the resampling.
    level
        Probability mass of the interval, in (0, 1).

    Returns
    -------
    Interval
        Ends are NaN if there is one window only. All is NaN if a loss is NaN or both are infinite.

    Raises
    ------
    InvalidInput
        If the texts differ or a value is out of range.

    Notes
    -----
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
    """
    if result.protocol["digest"] != baseline.protocol["digest"]:
        raise InvalidInput(
            "perplexities must be of the same windows to be compared; got digests "
            f"{result.protocol['digest']} and {baseline.protocol['digest']}."
        )
    return perplexity_ratio_interval(
        result.window_losses, baseline.window_losses, result.window_tokens, result.n_tokens,
        n_boot=n_boot, seed=seed, level=level,
    )  # fmt: skip
