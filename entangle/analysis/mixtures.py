"""How many Gaussians a neuron's output distribution is made of."""

import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from entangle.ablation.routed_rows import RowIndices, row_indices
from entangle.checks import whole
from entangle.errors import InvalidInput, unknown_name
from entangle.progress import ProgressBar
from entangle.scoring.scores import NeuronScores
from entangle.seeding import check_seed, numpy_rng

Floats = NDArray[np.float64]

_LEAST_POINTS = 10  # a component
_STARTS = 3
_STEPS = 200  # of expectation maximisation


def mixture_components(outputs: Floats, *, max_components: int = 4, seed: int = 0) -> int:
    """Return the number of components of the Gaussian mixture with the lowest BIC.

    Parameters
    ----------
    outputs
        Finite values, shape (points,), of which there are at least 10 a component. They are
        standardised first, so that location and unit do not matter.
    max_components
        Mixtures of 1 up to so many components are fitted, each the best of three k-means++ starts
        of at most 200 steps; a fit that has not converged counts with the likelihood it has
        reached.
    seed
        Of the starts.

    Raises
    ------
    InvalidInput
        If there are too few values, they are all equal, or one is not finite.

    Notes
    -----
    BIC is (3k − 1) log n − 2 log L for k components and n points (Schwarz, Estimating the dimension
    of a model, 1978), so that more points resolve more components: compare counts of equal n only.
    A heavy-tailed distribution with one mode may need several components.
    """
    max_components, seed = whole("max_components", max_components, least=1), check_seed(seed)
    if outputs.ndim != 1 or len(outputs) < _LEAST_POINTS * max_components:
        raise InvalidInput(
            f"a mixture of up to {max_components} components needs at least "
            f"{_LEAST_POINTS * max_components} values in one row; got shape {outputs.shape}."
        )
    if not np.isfinite(outputs).all() or np.ptp(outputs) == 0.0:
        raise InvalidInput(
            "a mixture needs finite values of which two differ; got "
            f"{np.count_nonzero(np.isfinite(outputs))} finite ones of {len(outputs)} between "
            f"{outputs.min():.4g} and {outputs.max():.4g}: leave this neuron out."
        )
    start = int(numpy_rng(seed, "mixture start").integers(2**31))
    return 1 + int(np.argmin(_bic(outputs, max_components, start)))


def gmm_components(
    scores: NeuronScores,
    *,
    rows: Mapping[str, RowIndices] | None = None,
    max_components: int = 4,
    points: int = 2000,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Count the mixture components of neurons' output distributions.

    For every neuron a sample is drawn from its histogram (a bin by its count, then uniformly inside
    the bin) and given to `mixture_components`.

    Parameters
    ----------
    scores
        From `entangle.score`.
    rows
        Indices of neurons by layer name; all neurons by default, about 0.1 s each.
    max_components
        As in `mixture_components`.
    points
        Values drawn of each neuron.
    seed
        Of the draws and the starts; a neuron's result does not depend on the others.
    progress
        Show a progress bar on standard error; by default if that is a terminal.

    Returns
    -------
    pandas.DataFrame
        Columns ``layer``, ``neuron``, ``gmm_components`` (float; NaN where the scores flag the
        neuron), in the order of ``rows`` or of the scores. Merge it with the scores' frame for
        `predictor_table`.

    Raises
    ------
    UnknownName
        If the scores hold no such layer.
    InvalidInput
        If a neuron does not exist or a number is out of range.

    References
    ----------
    arXiv 2405.15756 (number of components of a mixture against relative improvement).
    """
    max_components = whole("max_components", max_components, least=1)
    seed, points = check_seed(seed), whole("points", points, least=1)
    if points < _LEAST_POINTS * max_components:
        raise InvalidInput(
            f"`points` must be at least {_LEAST_POINTS} a component, "
            f"{_LEAST_POINTS * max_components}; got {points}."
        )
    chosen = _chosen(scores, rows)
    flags = scores.frame.set_index(["layer", "neuron"])["flag"].to_dict()
    counts = []
    with ProgressBar("mixtures", enabled=progress) as bar:
        bar.start(len(chosen), "neurons")
        for layer, neuron in chosen:
            if flags[layer, neuron]:
                counts.append(np.nan)
            else:
                sample = _sample(scores, layer, neuron, points, seed)
                counts.append(mixture_components(sample, max_components=max_components, seed=seed))
            bar.advance()
    return pd.DataFrame(
        {
            "layer": pd.Series([layer for layer, _ in chosen], dtype="str"),
            "neuron": pd.Series([neuron for _, neuron in chosen], dtype="int64"),
            "gmm_components": pd.Series(counts, dtype="float64"),
        }
    )


def _bic(outputs: Floats, max_components: int, start: int) -> list[float]:
    """Return the BIC of mixtures of 1, 2, ... components of the standardised values."""
    z = ((outputs - outputs.mean()) / outputs.std())[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fits = [
            GaussianMixture(
                k, n_init=_STARTS, init_params="k-means++", max_iter=_STEPS, random_state=start
            ).fit(z)
            for k in range(1, max_components + 1)
        ]
    return [float(fit.bic(z)) for fit in fits]


def _sample(scores: NeuronScores, layer: str, neuron: int, points: int, seed: int) -> Floats:
    histogram = scores.histogram(layer, neuron)
    rng = numpy_rng(seed, "mixture sample", layer, neuron)
    count = histogram["count"].to_numpy(np.float64)
    bins = rng.choice(len(count), size=points, p=count / count.sum())
    left, right = (histogram[side].to_numpy(np.float64)[bins] for side in ("left", "right"))
    sample: Floats = left + (right - left) * rng.random(points)
    return sample


def _chosen(scores: NeuronScores, rows: Mapping[str, RowIndices] | None) -> list[tuple[str, int]]:
    if rows is None:
        return list(zip(scores.frame["layer"], scores.frame["neuron"].tolist(), strict=True))
    chosen = []
    for layer, given in rows.items():
        if layer not in scores.histograms:
            raise unknown_name(
                "layer", layer, scores.histograms, "The scores hold no other layers."
            )
        known, wanted = len(scores.histograms[layer].counts), row_indices(layer, given).tolist()
        for neuron in wanted:
            if not 0 <= neuron < known:
                raise InvalidInput(
                    f"rows of layer {layer!r} must lie in 0..{known - 1}; got {neuron}."
                )
        chosen += [(layer, neuron) for neuron in wanted]
    return chosen
