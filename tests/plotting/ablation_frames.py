"""A table as `entangle ablate` writes it, small and set by hand."""

from collections.abc import Sequence

import pandas as pd

DENSE = 20.0
STRENGTHS = (0.9, 0.95, 0.99)
RATIOS = {
    ("top", "wd"): (1.9, 6.8, 1580.0),
    ("top", "variance"): (2.0, 8.8, 900.0),
    ("bottom", "wd"): (1.01, 1.02, 1.24),
    ("random", ""): (1.05, 1.14, 1.2),
}
"""Perplexity at each strength as a multiple of the dense one; of the seed in the middle."""
SEEDS = (-0.02, 0.03, -0.01, 0.0, 0.04)
"""What each seed of a random selection adds to the ratio."""


def ablation_rows(
    key: dict[str, object], ratio: float, *, spread: float = 0.1
) -> list[dict[str, object]]:
    """Rows of both measures of one arm, from ``1 - spread`` to ``1 + spread`` times its value."""
    arm = {"model": "tiny", "layers": "9 layers", "by": "", "seed": None, "experts": 1, **key}
    ends = {"value": 1.0, "low": 1.0 - spread, "high": 1.0 + spread}
    return [
        {**arm, "measure": measure, **{name: base * ratio * end for name, end in ends.items()}}
        for measure, base in (("perplexity", DENSE), ("perplexity_ratio", 1.0))
    ]


def ablation_frame(
    *,
    interventions: Sequence[str] = ("prune",),
    strengths: Sequence[float] = STRENGTHS,
    experts: Sequence[int] = (1,),
) -> pd.DataFrame:
    """Dense, then 3 selections and 5 random draws; k experts divide what is above 1 by k."""
    dense = {"selection": "dense", "intervention": "dense", "strength": 0.0, "n_rows": 0}
    rows = ablation_rows({**dense, "layers": "all"}, 1.0, spread=0.0)
    for intervention in interventions:
        for strength, place in zip(strengths, (0, 1, 2), strict=False):
            for k in experts:
                setting = {"intervention": intervention, "strength": strength, "experts": k}
                for (rule, by), ratios in RATIOS.items():
                    for seed, extra in enumerate(SEEDS if rule == "random" else (0.0,)):
                        key = {"selection": rule, "by": by, **setting, "n_rows": 39}
                        key["seed"] = seed if rule == "random" else None
                        rows += ablation_rows(key, 1.0 + (ratios[place] + extra - 1.0) / k)
    return pd.DataFrame(rows).astype({"seed": "Int64"})
