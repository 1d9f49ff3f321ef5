"""The same budget, spread evenly: what an allocation is compared with."""

import numpy as np
import torch

from entangle.allocation.allocation import Allocation


def even(allocation: Allocation) -> Allocation:
    """Spread an allocation's zeros evenly over its rows: every row as near to the mean as can be.

    The sum is the same to the weight. Where the mean is no whole number of zeros a row, the rows
    take turns in rounding up and down.

    Returns
    -------
    Allocation
        Without numbers of experts; its manifest says rule ``uniform``.
    """
    counts = [allocation.rows(name) for name in allocation.zeros]
    widths = np.repeat(list(allocation.in_features.values()), counts).astype(np.float64)
    upto = np.rint(np.cumsum(widths) * (allocation.n_zeros / widths.sum())).astype(np.int64)
    zeros = torch.from_numpy(np.diff(upto, prepend=0)).split(counts)
    return Allocation(
        zeros=dict(zip(allocation.zeros, zeros, strict=True)),
        in_features=allocation.in_features,
        experts=None,
        manifest=dict(allocation.manifest) | {"settings": {"rule": "uniform"}},
        blocks=allocation.blocks,
    )
