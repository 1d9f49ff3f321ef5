"""Tables of scores that are made up."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from entangle.experiments.selection import Selection
from entangle.seeding import numpy_rng

NUMBERS = ("wd", "mean", "std", "skewness", "weight_norm", "md")


def frame_of(columns: Mapping[str, Any], sizes: tuple[int, ...] = (6,)) -> pd.DataFrame:
    """Layers ``l0``, ``l1`` … of these sizes; columns that are not given are drawn."""
    n, rng = sum(sizes), numpy_rng(0, "frame")
    drawn = {name: rng.lognormal(size=n) for name in NUMBERS}
    return pd.DataFrame(
        {
            "layer": [f"l{i}" for i, size in enumerate(sizes) for _ in range(size)],
            "block": pd.array(np.repeat(range(len(sizes)), sizes), dtype="Int64"),
            "neuron": np.concatenate([np.arange(size) for size in sizes]),
            "flag": "",
            **drawn,
            **columns,
        }
    )


def as_lists(selection: Selection) -> dict[str, list[int]]:
    return {name: rows.tolist() for name, rows in selection.rows.items()}
