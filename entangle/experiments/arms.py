"""The arms of an ablation: who is touched, how, and how strongly.

Tidy tables of a sweep.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entangle.allocation.allocation import Allocation, even
from entangle.allocation.experts import nominal_sparsity, rule_label, zeros_digest
from entangle.checks import choice, share, whole
from entangle.errors import InvalidInput, NumericalError
from entangle.experiments.interventions import OUTPUT_EDITS
from entangle.experiments.measures import Arrays, Protocol, measure_rows
from entangle.experiments.selection import Selection
from entangle.experts.routed_rows import Level
from entangle.results.ablation import layer_set

ROUTERS = ("kmeans", "random")
"""Routers of several experts; ``random`` is the control, whose clusters mean nothing."""

PRUNERS = {
    "prune": "sparsegpt",
    "prune-wanda": "wanda",
    "prune-magnitude": "magnitude",
    "prune-random": "random",
}
"""Interventions that prune rows, and the pruner of each."""

INTERVENTIONS = (*PRUNERS, *OUTPUT_EDITS)
"""All interventions: pruners of rows, and edits of outputs."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One changed model."""

    selection: Selection
    """Which neurons."""
    intervention: str
    """From `INTERVENTIONS`."""
    strength: float
    """Sparsity of a pruned row (of all rows together with an allocation), or share in [0, 1] of an
    edit of outputs."""
    experts: int = 1
    """Routed experts that hold the pruned rows; 1 without a router."""
    allocation: Allocation | None = None
    """Zeros of every row, in place of one sparsity for all."""
    router: str = ""
    """From `ROUTERS` where there are several experts, else empty."""

    @property
    def prunes(self) -> bool:
        """Whether rows are pruned; otherwise outputs are edited."""
        return self.intervention in PRUNERS

    @property
    def level(self) -> Level:
        """How sparse its rows are."""
        return self.strength if self.allocation is None else self.allocation

    def describe(self) -> dict[str, object]:
        """Return what makes the arm, JSON-serialisable."""
        described: dict[str, object] = {
            "selection": self.selection.describe(),
            "intervention": self.intervention,
            "strength": self.strength,
            "experts": self.experts,
        }
        if self.allocation is not None:
            described["allocation"] = zeros_digest(self.allocation)
        if self.router:
            described["router"] = self.router
        return described

    @property
    def key(self) -> str:
        """Digest of `describe`, which names the arm's file."""
        content = json.dumps(self.describe(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """A short line for progress bars."""
        seed = "" if self.selection.seed is None else f" (seed {self.selection.seed})"
        routed = "" if self.experts == 1 else f", {self.experts} experts"
        routed += " of random clusters" if self.router == "random" else ""
        return f"{self.intervention} {self.selection.name}{seed} at {self.strength:g}{routed}"


def check_settings(
    interventions: Sequence[str],
    *,
    strengths: Sequence[float],
    edit_strengths: Sequence[float],
    experts: Sequence[int],
    routers: Sequence[str] = ROUTERS[:1],
) -> None:
    """Check the settings of arms, before any work is done.

    Raises
    ------
    UnknownName, InvalidInput
        If an intervention or a router does not exist, a strength lies outside [0, 1], a number of
        experts is below 1, or one of the lists is empty.
    """
    for name in interventions:
        choice("interventions", name, INTERVENTIONS, kind="intervention")
    for name in routers:
        choice("router", name, ROUTERS)
    for name, values in (("strengths", strengths), ("edit_strengths", edit_strengths)):
        for value in values:
            share(name, value)
    for count in experts:
        whole("experts", count, least=1)
    if not (interventions and strengths and edit_strengths and experts and routers):
        raise InvalidInput(
            "there is no arm to run: give at least one intervention, strength, number of experts "
            "and router."
        )


def plan_arms(
    selections: Sequence[Selection],
    interventions: Sequence[str],
    *,
    strengths: Sequence[float],
    edit_strengths: Sequence[float],
    experts: Sequence[int],
    routers: Sequence[str] = ROUTERS[:1],
) -> list[Arm]:
    """Return every combination that makes sense, once.

    Several experts only where rows are pruned, and routers only where there are several experts.
    """
    check_settings(
        interventions, strengths=strengths, edit_strengths=edit_strengths, experts=experts,
        routers=routers,
    )  # fmt: skip
    return [
        Arm(selection, intervention, float(strength), count, router=router)
        for intervention in dict.fromkeys(interventions)
        for strength in dict.fromkeys(strengths if intervention in PRUNERS else edit_strengths)
        for count in (dict.fromkeys(experts) if intervention in PRUNERS else (1,))
        for router in (dict.fromkeys(routers) if count > 1 else ("",))
        for selection in selections
    ]


def plan_allocated(
    allocation: Allocation, interventions: Sequence[str], *, experts: Sequence[int]
) -> list[Arm]:
    """Return two arms an intervention: every row as the allocation says, and the same zeros evenly.

    Parameters
    ----------
    allocation
        Zeros of every row of its layers, all of which are pruned.
    interventions
        Pruners, from `PRUNERS`.
    experts
        Must be 1 alone.

    Raises
    ------
    UnknownName, InvalidInput
        If an intervention does not exist or prunes nothing, or experts are asked for.
    """
    check_settings(interventions, strengths=(0.0,), edit_strengths=(0.0,), experts=experts)
    for name in interventions:
        if name not in PRUNERS:
            raise InvalidInput(
                f"an allocation says how rows are pruned; the intervention {name!r} prunes none: "
                "leave it out."
            )
    if set(experts) != {1}:
        raise InvalidInput(
            f"with an allocation `experts` must be 1; got {list(experts)}: `entangle.expand` "
            "(`entangle expand --allocation`) builds experts from it."
        )
    rows = {name: np.arange(len(zeros)) for name, zeros in allocation.zeros.items()}
    for index in rows.values():
        index.flags.writeable = False
    selections = (
        Selection("all", None, None, rows),
        Selection("allocation", rule_label(allocation), None, rows),
    )
    return [
        Arm(selection, intervention, nominal_sparsity(allocation), 1, level)
        for intervention in dict.fromkeys(interventions)
        for selection, level in zip(selections, (even(allocation), allocation), strict=True)
    ]


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
