"""Drawing a control that resembles a selection in one quantity."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entangle.ablation.candidates import Rows, column
from entangle.errors import InvalidInput, unknown_name
from entangle.seeding import numpy_rng

NEAREST = 5
"""How many of the nearest candidates a row is drawn from, so that seeds differ."""


def draw_nearest(
    targets: NDArray[np.float64], candidates: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw one candidate for every target, none twice, among the `NEAREST` left over.

    Parameters
    ----------
    targets
        Finite values to resemble, of shape (n_targets,).
    candidates
        Finite values to draw from, of shape (n_candidates,), at least ``n_targets`` of them.
    rng
        Decides in which order the targets are served, and which of the nearest each one gets.

    Returns
    -------
    NDArray
        For every target the position of its candidate, of shape (n_targets,).
    """
    left = np.argsort(candidates, kind="stable")
    drawn = np.empty(len(targets), np.int64)
    for target in rng.permutation(len(targets)):
        place = int(np.searchsorted(candidates[left], targets[target]))
        start = max(0, place - NEAREST)
        distances = np.abs(candidates[left[start : place + NEAREST]] - targets[target])
        nearest = np.argsort(distances, kind="stable")[:NEAREST] + start
        chosen = int(rng.choice(nearest))
        drawn[target] = left[chosen]
        left = np.delete(left, chosen)
    return drawn


def match_rows(
    table: pd.DataFrame, rows: Mapping[str, NDArray[np.int64]], by: str, *, seed: int
) -> tuple[Rows, dict[str, float]]:
    """Draw for every row another one of its layer with a similar value.

    Parameters
    ----------
    table
        From `entangle.ablation.candidates.neuron_table`.
    rows
        The rows to match.
    by
        Column of the values, compared on a log scale.
    seed
        Of the draw; every layer has its own stream.

    Returns
    -------
    tuple
        The rows drawn, and how close they came (see `Selection.match`).

    Raises
    ------
    UnknownName
        If the table does not hold a layer.
    InvalidInput
        If a layer has too few rows that can be drawn, or a row to match has no value.
    """
    known = list(dict.fromkeys(table["layer"]))
    table = table.assign(value=column(table, by))
    table = table[(table["flag"] == "") & (table["value"] > 0)]
    drawn: Rows = {}
    ratios = []
    for name, wanted in rows.items():
        if name not in known:
            raise unknown_name("layer", name, known, "The scores hold no other layers.")
        part = table[table["layer"] == name]
        inside = part["neuron"].isin(wanted).to_numpy()
        if inside.sum() < len(wanted) or (~inside).sum() < len(wanted):
            raise InvalidInput(
                f"{len(wanted)} rows of layer {name!r} must be matched, but {inside.sum()} of them "
                f"and {(~inside).sum()} others have a {by} and no flag; select fewer."
            )
        logs = np.log(part["value"].to_numpy(np.float64))
        rng = numpy_rng(seed, "selection", "matched", by, name)
        places = np.flatnonzero(~inside)[draw_nearest(logs[inside], logs[~inside], rng)]
        drawn[name] = part["neuron"].to_numpy(np.int64)[places]
        ratios.append(logs[places] - logs[inside])
    ratio = np.concatenate(ratios)
    return drawn, {
        "median_abs_log_ratio": float(np.median(np.abs(ratio))),
        "max_abs_log_ratio": float(np.abs(ratio).max()),
        "median_log_ratio": float(np.median(ratio)),
    }
