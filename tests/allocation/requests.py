"""Requests of made-up neurons."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from entangle.allocation.allocation import LayerRows
from entangle.allocation.request import Columns, Request, Settings


def request_of(
    scores: Sequence[Sequence[float | int]],
    *,
    widths: Sequence[int] | None = None,
    blocks: Sequence[int | None] | None = None,
    target: Sequence[float] | None = None,
    **settings: Any,
) -> Request:
    """Ask about one layer for each list of scores."""
    names = tuple(f"layer {i}" for i in range(len(scores)))
    rows = LayerRows(
        names=names,
        blocks=tuple(range(len(scores)) if blocks is None else blocks),
        counts=np.array([len(one) for one in scores]),
        widths=np.array([10] * len(scores) if widths is None else widths),
    )
    frame = pd.DataFrame(
        {
            "layer": np.repeat(names, rows.counts),
            "neuron": np.concatenate([np.arange(len(one)) for one in scores]),
            "wd": np.concatenate(scores).astype(float),
        }
    )
    chosen: dict[str, Any] = {
        "rule": "linear", "sparsity": 0.5, "by": ("wd",), "combine": "zscore", "protect": 0.0,
        "protect_sparsity": 0.0, "strength": 0.1, "across": None, "lowest": 0.0, "highest": 1.0,
        "pattern": "row",
    } | settings  # fmt: skip
    aim = None if target is None else np.array(target, dtype=np.float64)
    return Request(Settings(**chosen), Columns(rows, frame), None, aim)
