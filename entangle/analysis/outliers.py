"""Whether neurons with a large WD are those with outlier weights or outlier dimensions."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import hypergeom
from torch import Tensor

from entangle.ablation.selection import check_scores_fit, select
from entangle.checks import finite, share
from entangle.errors import InvalidInput
from entangle.models.evaluating import evaluates
from entangle.models.layers import Layer, find_layers
from entangle.models.loading import AnyModel, as_language_model
from entangle.scoring.scores import NeuronScores
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
        Which neurons are the top ones of a layer, as in `entangle.ablation.select`.
    grams
        ``XᵀX`` of layers' inputs by name (`entangle.ablation.statistics.layer_statistics`), for
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
