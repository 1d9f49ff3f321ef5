"""How many directions a cluster's inputs take, and how well its expert serves them."""

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from entangle.ablation.row_measures import Clusters, dense_outputs, output_errors
from entangle.precision import accumulator_dtype
from entangle.recording.stream import TokenStore
from entangle.stats.gram import Gram
from entangle.stats.tiles import row_parts

SHARE = 0.9
"""Share of the variance that the components hold."""

_BLOCK_TOKENS = 8192
_BYTES_A_TOKEN = 32  # of every neuron: outputs, errors, a sorted copy in float64


def components_needed(
    inputs: TokenStore, clusters: Clusters, device: torch.device, *, share: float = SHARE
) -> list[int]:
    """Count the leading principal components that hold ``share`` of the variance.

    Returns
    -------
    list of int
        One number a cluster; 0 where its tokens do not differ.
    """
    labels, counts = clusters.labels.cpu(), []
    for cluster, size in enumerate(clusters.sizes):
        spectrum = _spectrum(inputs, labels == cluster, size, device)
        cumulative = np.cumsum(spectrum)
        if size < 2 or cumulative[-1] <= 0:
            counts.append(0)
        else:
            counts.append(1 + int(np.searchsorted(cumulative, share * cumulative[-1])))
    return counts


def _spectrum(
    inputs: TokenStore, member: Tensor, size: int, device: torch.device
) -> Float64[np.ndarray, " values"]:
    """Return the eigenvalues of the scatter matrix of some tokens, the largest first.

    Of fewer tokens than features the matrix of their products has the same ones.
    """
    blocks = (
        rows[own.to(rows.device)].to(device, torch.float32)
        for start, rows in inputs.blocks(_BLOCK_TOKENS)
        if (own := member[start : start + rows.shape[0]]).any()
    )
    wide = accumulator_dtype(device)
    features = inputs.span(0, 1).shape[1]
    if size < features:
        tokens = torch.cat([torch.empty(0, features, device=device), *blocks]).to(wide)
        tokens = tokens - tokens.mean(0)
        scatter = tokens @ tokens.mT
    else:
        first = inputs.span(0, 1)[0].to(device, torch.float32)
        gram = Gram(features, device=device)
        for block in blocks:
            gram.update(block - first)
        found = gram.result()
        scatter = found.gram - found.count * torch.outer(found.mean, found.mean)
    values: np.ndarray = torch.linalg.eigvalsh(scatter).flip(0).clamp_min(0).cpu().double().numpy()
    return values


def relative_errors(
    weight: Float[Tensor, "neurons in_features"],
    bias: Float[Tensor, " neurons"],
    sparse: Float[Tensor, "experts neurons in_features"],
    inputs: TokenStore,
    clusters: Clusters,
    *,
    memory: int,
) -> Float64[np.ndarray, " experts"]:
    """Return ‖sparse − dense‖² / ‖dense − mean‖² of every expert on its own tokens.

    Parameters
    ----------
    weight, bias
        Of a layer's dense neurons.
    sparse
        Weights of its experts.
    inputs, clusters
        Calibration tokens and the expert of each.
    memory
        Bytes for outputs.

    Returns
    -------
    ndarray of shape (experts,)
        Summed over all neurons; NaN where the dense outputs do not vary.
    """
    at_once = memory // (_BYTES_A_TOKEN * inputs.n_tokens)
    lost_by_neuron, spread_by_neuron = [], []
    for part in row_parts(weight.shape[0], at_once):
        dense = weight[part].float()
        change = sparse[:, part].float() - dense
        errors = output_errors(change, inputs, clusters)
        lost_by_neuron.append(_by_cluster(errors, clusters, centred=False))
        outputs = dense_outputs(dense, bias[part], inputs)
        spread_by_neuron.append(_by_cluster(outputs, clusters, centred=True))
    lost = np.concatenate(lost_by_neuron, axis=1).sum(1)
    spread = np.concatenate(spread_by_neuron, axis=1).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 0, lost / spread, np.nan)


def _by_cluster(values: Tensor, clusters: Clusters, *, centred: bool) -> np.ndarray:
    """Sum the squares of (neurons, tokens) over a cluster's tokens, (clusters, neurons)."""
    wide = accumulator_dtype(values.device)
    sums = []
    for own in values[:, clusters.order].split(list(clusters.sizes), dim=1):
        own = own.to(wide)
        if centred and own.shape[1]:
            own = own - own.mean(1, keepdim=True)
        sums.append(own.square().sum(1).cpu().double().numpy())
    return np.stack(sums)
