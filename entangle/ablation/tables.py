"""Tidy tables of a sweep."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entangle.ablation.arms import Arm
from entangle.ablation.layer_sets import layer_set
from entangle.ablation.measures import Arrays, Protocol, measure_rows
from entangle.ablation.selection import Selection
from entangle.errors import NumericalError

FRAME = [
    "model", "layers", "layer_set", "selection", "by", "seed", "intervention", "strength",
    "experts", "router", "measure", "value", "low", "high", "n_rows", "realised_sparsity",
    "realised_low", "realised_high",
]  # fmt: skip
DENSE = {"selection": "dense", "by": "", "seed": None, "intervention": "dense", "strength": 0.0,
         "experts": 1, "router": ""}  # fmt: skip
_TOLERANCE = 1e-6  # of a share of zeros, a float32: less than one weight of any row


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
        "router": arm.router,
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
    planned: Mapping[int, NDArray[np.float64]],
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
        What was measured, and the selections to list.
    realised, planned
        Share of zeros of every selected row, and what it is to be, by ``id`` of the arm.
    seed
        Of the bootstraps.

    Raises
    ------
    NumericalError
        If a row holds another number of zeros than planned.
    """
    check_sparsity(arms, realised, planned)
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
        where = {
            "layers": layers,
            "layer_set": layer_set(() if arm is None else arm.selection.rows),
        }
        rows += [{"model": model, **where, **key, **row, **extra} for row in measured]
        per_window = {k: v for k, v in arrays.items() if k in ("loss", "kl", "agreement")}
        if per_window:
            windows.append(_numbered("window", key, per_window))
        per_pair = {k: v for k, v in arrays.items() if k in ("good", "bad")}
        if per_pair and protocol.pairs is not None:
            table = _numbered("pair", key, per_pair)
            pairs.append(table.assign(paradigm=list(protocol.pairs.paradigms)))
    picked = [
        one.frame.assign(selection=one.rule, by=one.by or "", seed=one.seed) for one in selections
    ]
    return {
        "frame": _typed(pd.DataFrame(rows)[FRAME]),
        "windows": _joined(windows, "window"),
        "pairs": _joined(pairs, "pair"),
        "selections": _typed(pd.concat(picked, ignore_index=True)),
    }


def check_sparsity(
    arms: Sequence[Arm],
    realised: Mapping[int, NDArray[np.float64]],
    planned: Mapping[int, NDArray[np.float64]],
) -> None:
    """Raise `NumericalError` unless every row of every arm holds the zeros planned for its width.

    A strength is a share of a row's weights, rounded to whole ones. So arms of one strength are
    equally sparse wherever their rows are equally wide, and differ by that rounding elsewhere.
    """
    for arm in arms:
        zeros, wanted = realised[id(arm)], planned[id(arm)]
        if zeros.shape != wanted.shape:
            raise NumericalError(
                f"{arm.label} must have {len(wanted)} pruned rows; got {len(zeros)}."
            )
        wrong = np.flatnonzero(~(np.abs(zeros - wanted) <= _TOLERANCE))
        if len(wrong):
            layer, row = arm.selection.frame.iloc[wrong[0]]
            raise NumericalError(
                f"row {row} of layer {layer!r} must hold a share of {wanted[wrong[0]]:.6f} zeros "
                f"in the arm {arm.label}; got {zeros[wrong[0]]:.6f} ({len(wrong)} such rows)."
            )


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
