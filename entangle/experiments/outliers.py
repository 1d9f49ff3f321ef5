"""Whether neurons with a large WD are those with outlier weights or outlier dimensions.

How many Gaussians a neuron's output distribution is made of.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import hypergeom
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from entangle.checks import finite, share, whole
from entangle.errors import InvalidInput, unknown_name
from entangle.experiments.selection import check_scores_fit, select
from entangle.experts.routed_rows import RowIndices, row_indices
from entangle.models.blocks import evaluates
from entangle.models.layers import Layer, find_layers
from entangle.models.loading import AnyModel, as_language_model
from entangle.results.scores import NeuronScores
from entangle.runs.progress import ProgressBar
from entangle.seeding import check_seed, numpy_rng
from entangle.stats.gram import GramResult

Members = NDArray[np.bool_]

OUTLIERS: Mapping[str, str] = {
    "weights": "neurons with at least one of the largest |weights| of the layer",
    "inputs": "neurons with the largest share of Σ w² on outlier inputs, as many as top neurons",
    "outputs": "neurons that write to the residual dimensions of the largest variance, as many as "
    "top neurons",
}
"""What an outlier neuron of a layer is, by kind.

The largest weights are the share ``weight_share`` of all weights of the layer (at least one; equal
ones count too). An outlier input is a dimension whose root mean square over the calibration tokens
exceeds ``factor`` times the median of the layer's inputs; where there is none, no neuron is an
outlier. Flagged neurons are never outliers and take no part."""


@dataclass(frozen=True, eq=False)
class _Known:
    """What one layer's outliers are found from."""

    layer: Layer
    n_top: int
    scored: Members
    """Neurons without a flag."""
    gram: GramResult | None
    variance: Tensor | None
    weight_share: float
    factor: float | int


@evaluates
def outlier_overlap(
    model: AnyModel,
    scores: NeuronScores,
    *,
    by: str = "wd",
    fraction: float = 0.03,
    grams: Mapping[str, GramResult] | None = None,
    residual: Mapping[str, Float[Tensor, " _"]] | None = None,
    weight_share: float = 0.001,
    factor: float | int = 6.0,
) -> pd.DataFrame:
    """Compare the top neurons of every scored layer with its outlier neurons.

    Parameters
    ----------
    model
        The model that was scored, as in `entangle.score`.
    scores
        From `entangle.score`.
    by, fraction
        Which neurons are the top ones of a layer, as in `entangle.experiments.selection.select`.
    grams
        ``XᵀX`` of layers' inputs by name
        (`entangle.experiments.interventions.layer_statistics`), for
        ``inputs``; layers without one have no such row.
    residual
        Variance of the residual stream's dimensions by name of the layers that write to it
        (`residual_variance`), for ``outputs``; other layers have no such row.
    weight_share, factor
        What is an outlier; see `OUTLIERS`.

    Returns
    -------
    pandas.DataFrame
        One row a (layer, kind of outlier): ``layer``, ``block``, ``projection``, ``outliers`` (a
        key of `OUTLIERS`), ``n_neurons`` (without a flag), ``n_top``, ``n_outliers``,
        ``n_dimensions`` (outlier inputs; missing for other kinds), ``overlap`` (neurons that are
        both), ``jaccard`` (overlap / neurons that are either), ``expected`` (overlap of sets drawn
        at random, n_top · n_outliers / n_neurons), ``enrichment`` (overlap / expected; NaN without
        outliers) and ``p_value`` (hypergeometric: chance of this overlap or a larger one).

    Raises
    ------
    InvalidInput
        If scores are of another model, a setting is out of range, grams or variances do not fit a
        layer, or weights are offloaded.

    Notes
    -----
    Outlier dimensions: Dettmers et al., LLM.int8(), arXiv 2208.07339 (magnitude 6); outlier
    weights: Yu et al., The Super Weight in Large Language Models, arXiv 2411.07191.
    """
    dense = as_language_model(model)
    check_scores_fit(scores, dense)
    weight_share = share("weight_share", weight_share, zero=False)
    factor = finite("factor", factor, above=0)
    top = select(scores.frame, "top", by=by, fraction=fraction)
    rows = []
    for layer in find_layers(dense.module, list(top.rows)):
        part = scores.frame[scores.frame["layer"] == layer.name].sort_values("neuron")
        chosen = np.zeros(layer.out_features, dtype=bool)
        chosen[top.rows[layer.name]] = True
        known = _Known(
            layer, int(chosen.sum()), (part["flag"] == "").to_numpy(),
            (grams or {}).get(layer.name), (residual or {}).get(layer.name), weight_share, factor,
        )  # fmt: skip
        _check(known)
        rows += [_row(known, kind, chosen, found) for kind, found in _outliers(known).items()]
    return pd.DataFrame(rows).astype({"block": "Int64", "n_dimensions": "Int64"})


def _outliers(known: _Known) -> dict[str, Members]:
    """Return the outlier neurons of a layer by kind, as far as enough is known of it."""
    found = {"weights": _with_large_weights(known)}
    if known.gram is not None:
        found["inputs"] = _on_outlier_inputs(known, known.gram)
    if known.variance is not None:
        found["outputs"] = _largest(known.variance.cpu().double().numpy(), known)
    return {kind: members & known.scored for kind, members in found.items()}


def _with_large_weights(known: _Known) -> Members:
    weight = known.layer.weight.float().abs()
    count = max(1, round(known.weight_share * weight.numel()))
    least = weight.flatten().topk(count).values[-1]
    return ((weight >= least) & (weight > 0)).any(dim=1).cpu().numpy()


def _on_outlier_inputs(known: _Known, gram: GramResult) -> Members:
    dimensions = _outlier_inputs(known, gram)
    if not dimensions.any():
        return np.zeros(known.layer.out_features, dtype=bool)
    squares = known.layer.weight.double().square()
    share = squares[:, dimensions.to(squares.device)].sum(1) / squares.sum(1)
    return _largest(share.nan_to_num().cpu().numpy(), known)


def _outlier_inputs(known: _Known, gram: GramResult) -> Tensor:
    """Tell which inputs have a root mean square above ``factor`` medians."""
    rms = (gram.gram.diagonal().double() / max(gram.count, 1)).sqrt()
    return rms > known.factor * rms.median()


def _largest(values: NDArray[np.float64], known: _Known) -> Members:
    """Return the neurons with the largest values, as many as top ones; earlier ones where equal."""
    order = np.argsort(-np.where(known.scored, values, -np.inf), kind="stable")
    members = np.zeros(len(values), dtype=bool)
    members[order[: known.n_top]] = True
    return members


def _row(known: _Known, kind: str, top: Members, outliers: Members) -> dict[str, object]:
    n, n_top, n_outliers = (int(members.sum()) for members in (known.scored, top, outliers))
    overlap, expected = int((top & outliers).sum()), n_top * n_outliers / n
    dimensions = None
    if kind == "inputs" and known.gram is not None:
        dimensions = int(_outlier_inputs(known, known.gram).sum())
    return {
        "layer": known.layer.name,
        "block": known.layer.block,
        "projection": known.layer.projection,
        "outliers": kind,
        "n_neurons": n,
        "n_top": n_top,
        "n_outliers": n_outliers,
        "n_dimensions": dimensions,
        "overlap": overlap,
        "jaccard": overlap / int((top | outliers).sum()),
        "expected": expected,
        "enrichment": overlap / expected if expected else np.nan,
        "p_value": float(hypergeom.sf(overlap - 1, n, n_outliers, n_top)),
    }


def _check(known: _Known) -> None:
    layer = known.layer
    if layer.offloaded:
        raise InvalidInput(
            f"the weights of layer {layer.name!r} are offloaded, so its outliers cannot be found; "
            "choose a device map that keeps it on a device."
        )
    for name, tensor, shape in (
        ("grams", None if known.gram is None else known.gram.gram, (layer.in_features,) * 2),
        ("residual", known.variance, (layer.out_features,)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise InvalidInput(
                f"`{name}` of layer {layer.name!r} must have shape {shape}; "
                f"got {tuple(tensor.shape)}: pass those of this model."
            )


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
