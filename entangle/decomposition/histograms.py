"""Histograms of outputs, dense and sparse, of all tokens and of every cluster, on common bins."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from entangle.ablation.row_measures import Clusters
from entangle.precision import accumulator_dtype
from entangle.stats import bins
from entangle.stats.wasserstein import sort_rows

ALL = -1
"""Cluster of the histogram of all tokens."""


class CommonBins:
    """Bins of some neurons, fine around the median of the dense outputs and wider in the tails.

    The bins are those of `entangle.scoring`: 16 a unit over the first unit on either side of the
    median, half as fine up to the third unit, and so on; the unit is the interquartile range.

    Parameters
    ----------
    dense
        Dense outputs, (neurons, tokens).
    """

    def __init__(self, dense: Float[Tensor, "neurons tokens"]) -> None:
        ordered = sort_rows(dense)
        n = ordered.shape[1]
        self._location = ordered[:, n // 2].clone()
        core = ordered[:, (3 * n) // 4] - ordered[:, n // 4]
        wide = accumulator_dtype(dense.device)
        spread = dense.to(wide).std(1, correction=0).float()
        unit = torch.where(core > 0, core, spread)
        self._unit = torch.where(unit > 0, unit, 1.0)

    def count(
        self, outputs: Float[Tensor, "neurons tokens"], clusters: Clusters
    ) -> Int64[np.ndarray, "neurons clusters bins"]:
        """Count outputs of the same neurons, by neuron and cluster."""
        k, labels = len(clusters.sizes), clusters.labels.to(outputs.device)
        relative = (outputs - self._location[:, None]) / self._unit[:, None]
        found = []
        for row in relative:
            cells = labels * bins.N_BINS + bins.signed_index(row)
            counts = torch.bincount(cells, minlength=k * bins.N_BINS).unflatten(0, (k, -1))
            found.append(bins.fold_counts(counts, bins.SAVED_FOLD))
        return torch.stack(found).cpu().numpy()

    def edges(self, neuron: int) -> Float[np.ndarray, " edges"]:
        """Return the edges of the bins of a neuron (its place among them), in output units."""
        unit, location = float(self._unit[neuron]), float(self._location[neuron])
        return location + unit * bins.signed_edges(bins.SAVED_FOLD)


def histogram_rows(
    common: CommonBins,
    neurons: Sequence[int],
    outputs: Float[Tensor, "neurons tokens"],
    clusters: Clusters,
) -> Iterator[pd.DataFrame]:
    """Yield the histogram of every neuron and cluster that holds tokens, all tokens first.

    Each has columns neuron, cluster, left, right, count, from its first to its last used bin.
    """
    for place, counts in enumerate(common.count(outputs, clusters)):
        edges = common.edges(place)
        whole = np.concatenate([counts.sum(0, keepdims=True), counts])
        for cluster, own in enumerate(whole, start=ALL):
            used = np.flatnonzero(own)
            if len(used):
                span = slice(used[0], used[-1] + 1)
                columns = {"left": edges[:-1][span], "right": edges[1:][span], "count": own[span]}
                yield pd.DataFrame({"neuron": neurons[place], "cluster": cluster, **columns})


def output_histogram(outputs: Float32[np.ndarray, " tokens"]) -> pd.DataFrame:
    """Return the histogram of one neuron's outputs: left, right, count."""
    dense = torch.from_numpy(outputs)[None]
    alone = Clusters.of(torch.zeros(len(outputs), dtype=torch.int64), 1)
    whole = next(histogram_rows(CommonBins(dense), [0], dense, alone))
    return whole[["left", "right", "count"]]
