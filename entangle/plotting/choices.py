"""Which rows of a decomposition's tables a figure shows: one layer, sparsity, some neurons."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from entangle.checks import plain_value, shown
from entangle.errors import InvalidInput, unknown_name
from entangle.plotting.style import Role
from entangle.plotting.summaries import check_columns

DECOMPOSE = "the command `entangle decompose` writes such tables."
TWO_EXPERTS = "needs 2 experts or more; got 1; `entangle decompose --experts 1,4,16` fits several."
"""Closing words of errors about tables that hold one expert only."""
_NEURON_COLUMNS = ("layer", "neuron", "experts", "sparsity", "mean", "std", "wd", "ri", "output_wd")


def choose(
    frame: pd.DataFrame, *, name: str, writer: str = DECOMPOSE, **wanted: str | float | int | None
) -> pd.DataFrame:
    """Return the rows with one value in each of some columns.

    Parameters
    ----------
    frame
        A table with these columns.
    name
        Of the argument, for errors.
    writer
        Closing sentence of the error about missing columns: what makes such tables.
    wanted
        Value by column; None takes the only one that the table holds.

    Raises
    ------
    InvalidInput, UnknownName
        Missing columns, no rows, a value that the table does not hold, or several to choose from.
    """
    check_columns(frame, tuple(wanted), name=name, writer=writer)
    for column, value in wanted.items():
        known = frame[column].unique().tolist()
        if value is None and len(known) > 1:
            raise InvalidInput(
                f"`{column}` must be one of {_listed(known)}, which `{name}` holds; got None."
            )
        chosen = known[0] if value is None else plain_value(value)
        if not isinstance(chosen, Hashable) or chosen not in known:
            raise _missing(column, chosen, known, name)
        frame = frame[frame[column] == chosen]
    return frame


def _missing(column: str, value: object, known: list[object], name: str) -> InvalidInput:
    if isinstance(value, str):
        return unknown_name(column, value, map(str, known), f"`{name}` holds no others.")
    return InvalidInput(
        f"`{column}` must be one of {_listed(known)}, which `{name}` holds; got {shown(value)}."
    )


def _listed(values: Sequence[object]) -> str:
    shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in values[:8]]
    return ", ".join(shown) + (", …" if len(values) > len(shown) else "")


@dataclass(frozen=True)
class SparseNeuron:
    """One neuron at one sparsity, with any numbers of experts."""

    layer: str
    """Full dotted name."""
    neuron: int
    """Its number in the layer."""
    role: Role
    """What it stands for; chooses the colour."""
    mean: float
    """Of its dense outputs, in model units."""
    std: float
    """Of its dense outputs, in model units."""
    wd: float
    """WD of its dense outputs, in σ."""
    sparsity: float
    """Share of zeros."""
    rows: pd.DataFrame
    """Its rows of ``neurons``, by number of experts."""

    @property
    def experts(self) -> list[int]:
        """Numbers of experts, ascending."""
        return sorted(map(int, self.rows.index))

    @property
    def label(self) -> str:
        """Title of a panel."""
        kind = "" if self.role == "output" else f"{self.role} "
        return f"{kind}neuron {self.neuron}"


def sparse_neuron(
    neurons: pd.DataFrame,
    *,
    layer: str | None = None,
    neuron: int | None = None,
    sparsity: float | None = None,
    role: Role = "output",
) -> SparseNeuron:
    """Take one neuron from the table ``neurons`` of a decomposition; None takes the only value.

    Raises
    ------
    InvalidInput, UnknownName
        As `choose`; or one number of experts comes twice.
    """
    check_columns(neurons, _NEURON_COLUMNS, name="neurons", writer=DECOMPOSE)
    rows = choose(neurons, name="neurons", layer=layer, neuron=neuron, sparsity=sparsity)
    if rows["experts"].duplicated().any():
        raise InvalidInput(
            "`neurons` must hold one row a layer, neuron, number of experts and sparsity; got "
            f"several of neuron {rows['neuron'].iloc[0]}; {DECOMPOSE}"
        )
    first = rows.iloc[0]
    return SparseNeuron(
        layer=str(first["layer"]),
        neuron=int(first["neuron"]),
        role=role,
        mean=float(first["mean"]),
        std=float(first["std"]),
        wd=float(first["wd"]),
        sparsity=float(first["sparsity"]),
        rows=rows.set_index("experts"),
    )


def usual_neurons(neurons: pd.DataFrame, known: Sequence[int]) -> list[tuple[int, Role]]:
    """Return the neuron with the largest WD, and another with a WD near the layer's median.

    Parameters
    ----------
    neurons
        Table of one layer: ``neuron`` and ``wd``, for all of its neurons.
    known
        The neurons to choose from; if there is only one, it is the only one returned.

    Raises
    ------
    InvalidInput
        None of them has a finite WD.
    """
    check_columns(neurons, ("neuron", "wd"), name="neurons", writer=DECOMPOSE)
    wd = neurons.drop_duplicates("neuron").set_index("neuron")["wd"].astype(np.float64)
    wd = wd[np.isfinite(wd)]
    finite = wd[wd.index.isin(known)]
    if finite.empty:
        raise InvalidInput(
            f"`neurons` must hold a finite WD of at least one of the {len(known)} neurons whose "
            f"outputs are known; got none; {DECOMPOSE}"
        )
    top = int(finite.index[int(finite.argmax())])
    others = finite.drop(top)
    if others.empty:
        return [(top, "top")]
    return [
        (top, "top"),
        (int(others.index[int((others - wd.median()).abs().argmin())]), "typical"),
    ]
