"""OWL: blocks with more outlying weights are less sparse."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from entangle.allocation.budget import Wish
from entangle.allocation.measurements import Measurements
from entangle.allocation.request import Request, keep_more
from entangle.allocation.rows import Counts, Reals

OUTLIER = 5.0
"""A weight is outlying if its saliency is more than this many times its block's mean (M)."""


def owl(request: Request) -> Wish:
    """Set each block's sparsity by its share of outlying weights.

    A weight's saliency is ``|W_ij| · ‖X_j‖₂``; a block's score is the share of its weights (those
    to be pruned) with a saliency above `OUTLIER` times the block's mean. The share kept is the
    score scaled to a range of ``2 · strength`` (λ, 0.08 by default), moved to a mean over blocks of
    ``1 − sparsity``. All layers of a block get the same; a layer outside the blocks counts as one.
    The budget is then met exactly by a common shift, where the published code leaves it open when
    blocks are of unequal size. One pass over the calibration set.

    References
    ----------
    Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024, arXiv 2310.05175; rule as in
    ``lib/prune_all.py`` of github.com/luuyin/OWL.
    """
    groups, measured = request.rows.groups, request.measurements()
    score = measured.once("owl", lambda: outlier_shares(measured, groups))
    settings = request.settings
    return request.wish(keep_more(score, settings.sparsity, settings.strength)[groups])


def outlier_shares(measured: Measurements, groups: Counts) -> Reals:
    """Return the share of outlying weights of each group of layers.

    Parameters
    ----------
    measured
        Layers, and the norms of their inputs.
    groups
        Index of each layer's group.
    """
    shares = []
    for group in range(int(groups.max()) + 1):
        members = [measured.layers[i] for i in np.flatnonzero(groups == group)]
        shares.append(
            outlier_share([layer.weight for layer in members],
                          [measured.input_norms[layer.name] for layer in members])
        )  # fmt: skip
    return np.array(shares)


def outlier_share(
    weights: Sequence[Float[Tensor, "_ _"]], norms: Sequence[Float[Tensor, " _"]]
) -> float:
    """Return the share of weights whose saliency exceeds `OUTLIER` times the mean of all.

    Parameters
    ----------
    weights
        Weights of some layers, each (out_features, in_features).
    norms
        Norms of the inputs of each layer, (in_features,).
    """
    count = sum(weight.numel() for weight in weights)
    total = sum(
        float((weight.float().abs().sum(0, dtype=norm.dtype) * norm).sum())
        for weight, norm in zip(weights, norms, strict=True)
    )
    limit = OUTLIER * total / count
    above = sum(
        int(torch.count_nonzero(weight.float().abs() * norm.float() > limit))
        for weight, norm in zip(weights, norms, strict=True)
    )
    return above / count
