"""Histograms as a page draws them: small ones of all neurons, whole ones of some."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from entangle.results.scores import LayerHistograms
from entangle.stats.edges import SAVED_FOLD, signed_edges

Floats = NDArray[np.float64]

BARS, SPAN = 32, 4.0
"""Bars of a small histogram, from −4 σ to 4 σ; the outer ones hold what lies beyond, too."""
LEVELS = 63
"""Heights of a small bar; the tallest has all of them, one that is not empty at least one."""
_ROWS = 4096


def bars(
    histograms: LayerHistograms, mean: Floats, std: Floats
) -> tuple[NDArray[np.uint8], Floats]:
    """Return small histograms of all neurons of a layer, and the share of outputs above zero.

    Inside a saved bin the outputs are taken to lie evenly.

    Parameters
    ----------
    histograms
        Of the layer.
    mean, std
        Of the outputs, (neurons,), in their own units.

    Returns
    -------
    levels
        uint8, (neurons, 32): heights, 0 to 63; all zero where nothing was counted. A neuron whose
        outputs do not vary has all of them in one bar of the middle.
    positive
        float64, (neurons,): NaN where nothing was counted.
    """
    parts = [
        _bars(histograms, mean, std, slice(start, start + _ROWS))
        for start in range(0, len(mean), _ROWS)
    ]
    return np.concatenate([one[0] for one in parts]), np.concatenate([one[1] for one in parts])


def _bars(
    histograms: LayerHistograms, mean: Floats, std: Floats, rows: slice
) -> tuple[NDArray[np.uint8], Floats]:
    mean, std = mean[rows], std[rows]
    borders = np.linspace(-SPAN, SPAN, BARS + 1)[1:-1]
    steady = ~(std > 0)
    below = _below(histograms, rows, mean[:, None] + np.where(steady, 1.0, std)[:, None] * borders)
    total = histograms.counts[rows].sum(1, dtype=np.int64)
    edges = np.concatenate([np.zeros((len(mean), 1)), below, total[:, None]], axis=1)
    held = np.diff(edges, axis=1).clip(0)
    held[steady] = 0
    held[steady, BARS // 2] = total[steady]
    most = held.max(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        levels = np.where(most > 0, np.ceil(LEVELS * held / most - 1e-9), 0)
        zero = _below(histograms, rows, np.zeros((len(mean), 1)))[:, 0]
        positive = np.where(total > 0, 1 - zero / total, np.nan)
    levels[held < 0.5] = 0  # less than a token, through the evenness inside a bin
    return levels.astype(np.uint8), positive


def _below(histograms: LayerHistograms, rows: slice, values: Floats) -> Floats:
    """Return how many outputs lie below some values, (neurons, values)."""
    counts = histograms.counts[rows]
    edges = signed_edges(SAVED_FOLD)[histograms.first_bin :][: counts.shape[1] + 1]
    cumulative = np.concatenate([np.zeros((len(counts), 1)), np.cumsum(counts, axis=1)], axis=1)
    location, scale, low, high = (
        getattr(histograms, name)[rows, None] for name in ("location", "scale", "low", "high")
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        place = np.nan_to_num((values - location) / scale)
    bin_ = np.clip(np.searchsorted(edges, place, side="right") - 1, 0, counts.shape[1] - 1)
    inside = np.clip((place - edges[bin_]) / (edges[bin_ + 1] - edges[bin_]), 0, 1)
    first, last = (np.take_along_axis(cumulative, bin_ + one, axis=1) for one in (0, 1))
    found = first + inside * (last - first)
    found = np.where(values > high, cumulative[:, -1:], found)
    return np.where(values <= low, 0.0, found)


@dataclass(frozen=True, eq=False)
class ExactBars:
    """The histogram of `LayerHistograms.neuron`, its edges in σ from the mean.

    The edges between bars are ``location + scale · E``, with the edges ``E`` of
    `entangle.stats.edges.signed_edges` from ``first`` on; the outer ones are ``low`` and ``high``.
    """

    counts: NDArray[np.int64]
    told: tuple[int, float, float, float, float]
    """first, location, scale, low, high."""


def exact_bars(histograms: LayerHistograms, index: int, mean: float, std: float) -> ExactBars:
    """Return the whole histogram of one neuron; without a deviation its edges stay as they are."""
    found = histograms.neuron(index)
    mean, unit = (mean, std) if std > 0 else (0.0, 1.0)
    location, scale = float(histograms.location[index]), float(histograms.scale[index])
    edges = location + scale * signed_edges(SAVED_FOLD)
    inner = found["left"].to_numpy(np.float64)[1:]
    first = int(np.abs(edges - inner[0]).argmin()) if len(inner) else 0
    low, high = float(found["left"].iloc[0]), float(found["right"].iloc[-1])
    told = [(value - mean) / unit for value in (location, low, high)]
    return ExactBars(
        found["count"].to_numpy(np.int64), (first, told[0], scale / unit, told[1], told[2])
    )
