"""Tidy tables of a sweep."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entangle.ablation.arms import Arm
from entangle.ablation.measures import Arrays, Protocol, measure_rows
from entangle.ablation.selection import Selection
from entangle.errors import NumericalError

FRAME = [
    "model", "layers", "selection", "by", "seed", "intervention", "strength", "experts", "measure",
    "value", "low", "high", "n_rows", "realised_sparsity", "realised_low", "realised_high",
]  # fmt: skip
DENSE = {"selection": "dense", "by": "", "seed": None, "intervention": "dense", "strength": 0.0,
         "experts": 1}  # fmt: skip
_TOLERANCE = 1e-9


def arm_key(arm: Arm) -> dict[str, object]:
    """Return the columns that name an arm."""
    chosen = arm.selection
    return {
        "selection": chosen.rule,
        "by": chosen.by or "",
        "seed": chosen.seed,
        "intervention": arm.intervention,
        "strength": arm.strength,
        "experts": arm.experts,
    }


def result_tables(
    model: str,
    arms: Sequence[Arm],
    found: Sequence[Arrays],
    dense: Arrays,
    protocol: Protocol,
    selections: Sequence[Selection],
    *,
    realised: Mapping[int, NDArray[np.float64]],
    seed: int,
) -> dict[str, Any]:
    """Return the tables ``frame``, ``windows``, ``pairs`` and ``selections`` of a sweep.

    Parameters
    ----------
    model
        Name of the model.
    arms, found
        The arms and the raw numbers of each.
    dense
        Raw numbers of the dense model.
    protocol, selections
        What was measured, and all selections.
    realised
        Share of zeros of every selected row, by ``id`` of the arm.
    seed
        Of the bootstraps.

    Raises
    ------
    NumericalError
        If arms of one intervention, strength and number of experts differ in realised sparsity.
    """
    check_equal_sparsity(arms, realised)
    rows, windows, pairs = [], [], []
    for arm, arrays in [(None, dense), *zip(arms, found, strict=True)]:
        key = DENSE if arm is None else arm_key(arm)
        zeros = np.zeros(0) if arm is None else realised[id(arm)]
        extra = {
            "n_rows": 0 if arm is None else arm.selection.n_rows,
            "realised_sparsity": zeros.mean() if len(zeros) else np.nan,
            "realised_low": zeros.min() if len(zeros) else np.nan,
            "realised_high": zeros.max() if len(zeros) else np.nan,
        }
        count = 0 if arm is None else len(arm.selection.rows)
        layers = "none" if arm is None else f"{count} layer{'s' if count > 1 else ''}"
        measured = measure_rows(arrays, dense, protocol, seed=seed)
        rows += [{"model": model, "layers": layers, **key, **row, **extra} for row in measured]
        per_window = {k: v for k, v in arrays.items() if k in ("loss", "kl", "agreement")}
        if per_window:
            windows.append(_numbered("window", key, per_window))
        per_pair = {k: v for k, v in arrays.items() if k in ("good", "bad")}
        if per_pair:
            pairs.append(_numbered("pair", key, per_pair))
    picked = [
        one.frame.assign(selection=one.rule, by=one.by or "", seed=one.seed) for one in selections
    ]
    return {
        "frame": _typed(pd.DataFrame(rows)[FRAME]),
        "windows": _joined(windows, "window"),
        "pairs": _joined(pairs, "pair"),
        "selections": _typed(pd.concat(picked, ignore_index=True)),
    }


def check_equal_sparsity(arms: Sequence[Arm], realised: Mapping[int, NDArray[np.float64]]) -> None:
    """Raise `NumericalError` unless arms to be compared have equally sparse rows.

    Rows of layers with different numbers of inputs may differ by the rounding to whole weights.
    Rows of an allocation are meant to be unequal; its own sum, which is exact, is what counts.
    """
    seen: dict[tuple[object, ...], tuple[Arm, float]] = {}
    for arm in arms:
        zeros = realised[id(arm)]
        if not len(zeros) or arm.allocation is not None:
            continue
        setting = arm.intervention, arm.strength, arm.experts, _shape(arm)
        mean = float(zeros.mean())
        first = seen.setdefault(setting, (arm, mean))
        if abs(first[1] - mean) > _TOLERANCE:
            raise NumericalError(
                f"{first[0].label} and {arm.label} must be equally sparse, but their rows hold "
                f"{first[1]:.6f} and {mean:.6f} of zeros."
            )


def _shape(arm: Arm) -> tuple[tuple[str, int], ...]:
    return tuple((name, len(rows)) for name, rows in sorted(arm.selection.rows.items()))


def realised_sparsity(neurons: pd.DataFrame, arm: Arm) -> NDArray[np.float64]:
    """Return the realised sparsity of an arm's rows from the table of routed neurons."""
    own = neurons[(neurons["experts"] == arm.experts) & (neurons["sparsity"] == arm.strength)]
    index = own.set_index(["layer", "neuron"])["realised_sparsity"]
    wanted = pd.MultiIndex.from_frame(arm.selection.frame[["layer", "neuron"]])
    return np.asarray(index.reindex(wanted), dtype=np.float64)


def _numbered(name: str, key: Mapping[str, object], arrays: Arrays) -> pd.DataFrame:
    table = pd.DataFrame(dict(arrays)).rename_axis(name).reset_index()
    return table.assign(**key)  # type: ignore[arg-type]


def _joined(tables: Sequence[pd.DataFrame], name: str) -> pd.DataFrame:
    if not tables:
        return pd.DataFrame({name: pd.Series(dtype="int64")})
    return _typed(pd.concat([_typed(table) for table in tables], ignore_index=True))


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Store seeds as integers that may be missing."""
    return table.astype({"seed": "Int64"})
