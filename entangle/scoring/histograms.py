"""The output distribution of every neuron of a layer, as it is saved and drawn again."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from entangle.checks import whole
from entangle.stats import bins
from entangle.stats.sketch import SketchResult

N_SAVED = bins.N_BINS // bins.SAVED_FOLD


@dataclass(frozen=True, eq=False)
class LayerHistograms:
    """Counts over bins that are fine near each neuron's median and wider towards the tails."""

    counts: np.ndarray
    """int32, shape (neurons, bins): tokens in each bin; outer bins that are empty for all neurons
    of the layer are left out."""
    first_bin: int
    """Index of the first column among the bins of `edges`."""
    location: np.ndarray
    """float64, shape (neurons,): centre of the bins, in the neuron's own units."""
    scale: np.ndarray
    """float64, shape (neurons,): unit of the bins, in the neuron's own units."""
    low: np.ndarray
    """float64, shape (neurons,): smallest output, in the neuron's own units."""
    high: np.ndarray
    """float64, shape (neurons,): largest output, in the neuron's own units."""

    @classmethod
    def from_sketch(cls, sketch: SketchResult) -> "LayerHistograms":
        """Leave out the bins of a sketch that are empty for all neurons, at both ends."""
        counts = sketch.counts.numpy()
        used = np.flatnonzero(counts.max(0))
        first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
        return cls(
            counts=counts[:, first : last + 1].copy(),
            first_bin=first,
            location=sketch.location.numpy(),
            scale=sketch.scale.numpy(),
            low=sketch.low.numpy(),
            high=sketch.high.numpy(),
        )

    def fault(self, n_neurons: int) -> str | None:
        """Return what is no histogram of so many neurons, None if all is well."""
        bins_there = self.counts.shape[1] if self.counts.ndim == 2 else 0
        if self.counts.shape != (n_neurons, bins_there) or self.counts.dtype != np.int32:
            got = f"{self.counts.dtype} of shape {self.counts.shape}"
            return f"must be int32 for {n_neurons} neurons; got {got}"
        if not isinstance(self.first_bin, int) or not 0 <= self.first_bin <= N_SAVED - bins_there:
            return f"begin at a bin in [0, {N_SAVED - bins_there}]; got {self.first_bin!r}"
        if self.counts.size and self.counts.min() < 0:
            return "hold negative counts"
        for name in ("location", "scale", "low", "high"):
            values = getattr(self, name)
            if values.shape != (n_neurons,) or values.dtype != np.float64:
                return (
                    f"need a float64 {name!r} a neuron; got {values.dtype} of shape {values.shape}"
                )
        return None

    def neuron(self, index: int) -> pd.DataFrame:
        """Return the histogram of one neuron as a frame.

        Parameters
        ----------
        index
            Index of the neuron.

        Returns
        -------
        pandas.DataFrame
            Columns ``left``, ``right`` (bin edges in the neuron's own units, between its smallest
            and largest output) and ``count`` (tokens); empty bins at the ends are left out, and an
            end bin of which less than half lies inside the outputs' range is joined to the next. A
            constant neuron has one bin around its value.
        """
        index = whole("neuron", index, least=0, most=len(self.counts) - 1)
        low, high = self.low[index], self.high[index]
        used = np.flatnonzero(self.counts[index])
        if len(used) == 0:
            return pd.DataFrame({"left": [low], "right": [high], "count": [0]})
        counts = self.counts[index, used[0] : used[-1] + 1]
        first = self.first_bin + used[0]
        edges = bins.signed_edges(bins.SAVED_FOLD)[first : first + len(counts) + 1]
        edges = self.location[index] + self.scale[index] * edges
        if low < high:
            widths = np.diff(edges)
            if first == 0:  # the outermost bins are open
                edges[0] = min(edges[0], low)
            if first + len(counts) == N_SAVED:
                edges[-1] = max(edges[-1], high)
            edges, counts = _trimmed(edges.clip(low, high), counts, widths)
        return pd.DataFrame({"left": edges[:-1], "right": edges[1:], "count": counts})


def _trimmed(
    edges: np.ndarray, counts: np.ndarray, widths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Join an end bin that was clipped below half its width to the bin beside it.

    A single token in what is left of its bin would otherwise be drawn as a spike.
    """
    wide = np.flatnonzero(np.diff(edges) >= widths / 2)
    if len(wide) == 0:
        return edges[[0, -1]], counts.sum(keepdims=True)
    first, last = wide[0], wide[-1]
    kept = np.concatenate([edges[:1], edges[first + 1 : last + 1], edges[-1:]])
    joined = counts[first : last + 1].copy()
    joined[0] += counts[:first].sum()
    joined[-1] += counts[last + 1 :].sum()
    return kept, joined
