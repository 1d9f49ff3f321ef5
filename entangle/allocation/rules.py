"""Rules that need no model: sparsities from columns of the scores."""

from dataclasses import replace

import numpy as np

from entangle.allocation.budget import Wish
from entangle.allocation.request import Request, keep_more


def uniform(request: Request) -> Wish:
    """Give every layer the same sparsity."""
    return request.wish(np.full(len(request.rows.names), request.settings.sparsity))


def by_layer(request: Request) -> Wish:
    """Give layers with a larger mean score a smaller sparsity.

    The layers' mean scores are scaled to a range of ``2 · strength``, as OWL does with its own
    score.
    """
    means = request.rows.mean(request.score())
    return request.wish(keep_more(means, request.settings.sparsity, request.settings.strength))


def protect(request: Request) -> Wish:
    """Keep the neurons of the largest scores at one low sparsity; all others pay evenly.

    A share ``protect`` of the neurons, rounded to the nearest integer but at least one, of every
    layer, or of all together where they compete across layers; of equal scores the earlier neuron.
    """
    wish = request.wish(request.base)
    if request.settings.protect == 0:
        return wish
    chosen = _top(request)
    kept = request.settings.protect_sparsity
    return replace(
        wish,
        sparsity=np.where(chosen, kept, wish.sparsity),
        low=np.where(chosen, kept, wish.low),
        high=np.where(chosen, kept, wish.high),
    )


def _top(request: Request) -> np.ndarray:
    """Mark the share ``protect`` of the neurons with the largest scores."""
    rows, score = request.rows, request.score()
    if request.target is None:
        layer, counts = np.zeros_like(rows.layer), np.array([len(score)])
    else:
        layer, counts = rows.layer, rows.counts
    wanted = np.maximum(1, np.rint(request.settings.protect * counts)).astype(np.int64)
    order = np.lexsort((-score, layer))
    place = np.arange(len(score)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = np.zeros(len(score), dtype=bool)
    chosen[order] = place < np.repeat(wanted, counts)
    return chosen


def linear(request: Request) -> Wish:
    """Take ``strength`` off the sparsity for each standard deviation of the score."""
    z = request.columns.zscores(request.score(), across_layers=request.target is None)
    return request.wish(request.base - request.settings.strength * z)


def rank(request: Request) -> Wish:
    """Spread sparsities evenly over ± ``strength`` by the rank of the score."""
    ranks = request.columns.ranks(request.score(), across_layers=request.target is None)
    return request.wish(request.base + request.settings.strength * (1 - 2 * ranks))
