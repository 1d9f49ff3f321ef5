"""NeuroAL: the schedule of sparsities that leaves the layers' inputs most alike."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from torch import Tensor

from entangle.allocation.budget import Wish
from entangle.allocation.doubled import aligner
from entangle.allocation.measurements import Measurements
from entangle.allocation.request import Request, keep_more
from entangle.allocation.rows import Reals, Rows

_RANGES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.2, 0.25)
_WIDE_UP_TO = 0.8  # at this sparsity and above the widest range is not tried for blocks
_LOWEST, _HIGHEST = 0.01, 0.99


def neuroal_blocks(request: Request) -> Wish:
    """Let sparsity grow linearly with depth, by the range that aligns the inputs best.

    Of the ranges ± λ, λ from 0.01 to 0.25, that with the smallest sum over the layers of
    ``‖n / Σn − n' / Σn'‖₂ / in_features``, with n and n' the norms of a layer's inputs before and
    after its block is pruned by Wanda (`entangle.allocation.doubled.aligner`), on the first 8
    sequences of the calibration set.

    References
    ----------
    Cunegatti, Custode, Iacca, "Zeroth-Order Adaptive Neuron Alignment Based Pruning without
    Re-Training", arXiv 2411.07066; rule as in ``sparsity_distribution.py`` and ``lib/neuroal.py``
    of github.com/eliacunegatti/NeuroAL.
    """
    rows, measured = request.rows, request.measurements()
    sparsity = request.settings.sparsity
    chosen = measured.once(("neuroal", sparsity), lambda: _best_schedule(measured, rows, sparsity))
    return request.wish(chosen)


def neuroal(request: Request) -> Wish:
    """Give fewer zeros to neurons whose output, as the next layer's input, pruning shrinks most.

    Within each layer's sparsity, which `neuroal_blocks` gives by default. A neuron's score is
    ``n − n'`` of the input that it feeds: the input of the layers that run next, where that has as
    many features as the layer has neurons. The share kept is the score scaled to a range of ± λ and
    recentred; λ from 0 to 0.25 is chosen as for the blocks. Layers of the last block, and those
    that feed no such input (fused or grouped projections), stay uniform.

    References
    ----------
    As `neuroal_blocks`. The published code uses this step with Wanda and magnitude pruning only.
    """
    rows, measured = request.rows, request.measurements()
    base = request.base
    target = dict(zip(rows.names, base[rows.starts].tolist(), strict=True))
    best = base
    with aligner(measured) as align:
        found = align(rows.split_reals(base))
        scores, error = _fed(measured, found.difference), found.error
        for strength in _RANGES:
            tried = {name: part.numpy() for name, part in rows.split_reals(base).items()}
            for name, score in scores.items():
                tried[name] = keep_more(score, target[name], strength).clip(_LOWEST, _HIGHEST)
            joined = np.concatenate([tried[name] for name in rows.names])
            reached = align(rows.split_reals(joined)).error
            if reached < error:
                best, error = joined, reached
    return request.wish(best)


def _best_schedule(measured: Measurements, rows: Rows, sparsity: float | int) -> Reals:
    """Return the sparsity of each layer under the best linear schedule."""
    depth = np.arange(int(rows.groups.max()) + 1, dtype=np.float64)
    ranges = [one for one in _RANGES if sparsity < _WIDE_UP_TO or one <= 0.2]
    schedules = [keep_more(-depth, sparsity, one).clip(_LOWEST, _HIGHEST) for one in ranges]
    with aligner(measured) as align:
        spread = (rows.split_reals(rows.spread(one[rows.groups])) for one in schedules)
        errors = [align(one).error for one in spread]
    return schedules[int(np.argmin(errors))][rows.groups]


def _fed(measured: Measurements, difference: Mapping[str, Float[Tensor, " _"]]) -> dict[str, Reals]:
    """Return the score of each neuron of every layer that feeds the next input."""
    last = max((layer.block for layer in measured.layers if layer.block is not None), default=-1)
    scores = {}
    for group, following in zip(measured.groups, measured.groups[1:], strict=False):
        score = difference.get(following[0].name)
        for layer in group:
            fits = score is not None and len(score) == layer.out_features
            if fits and score is not None and layer.block not in (None, last):
                scores[layer.name] = score.double().cpu().numpy()
    return scores
