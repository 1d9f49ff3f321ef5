"""The numbers behind the plots: small stateless functions from frames to arrays, no drawing.

Which rows of a decomposition's tables a figure shows: one layer, sparsity, some neurons.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.arrays import IntegerArray

from entangle.checks import plain_value, share, shown, wholes
from entangle.errors import InvalidInput, unknown_name
from entangle.plotting.style import Role

Floats = NDArray[np.float64]
_WRITER = "the command `entangle score` writes such tables."


def bell_curve(x: Floats, mean: float = 0.0, std: float = 1.0) -> Floats:
    """Return the density of a normal distribution."""
    density: Floats = np.exp(-(((x - mean) / std) ** 2) / 2.0) / np.sqrt(2.0 * np.pi) / std
    return density


def check_columns(
    frame: pd.DataFrame, needed: Sequence[str], *, name: str, writer: str = _WRITER
) -> None:
    """Raise `InvalidInput` unless ``frame`` has the columns and at least one row.

    ``name`` is the argument's, ``writer`` the closing sentence: what makes such tables.
    """
    missing = [column for column in needed if column not in frame.columns]
    if missing:
        raise InvalidInput(
            f"`{name}` must have the columns {', '.join(needed)}; got a table without "
            f"{', '.join(missing)}; {writer}"
        )
    if frame.empty:
        raise InvalidInput(f"`{name}` must have at least one row; got none; {writer}")


def finite_rows(
    frame: pd.DataFrame, columns: Sequence[str], *, name: str, what: str, positive: str = ""
) -> tuple[pd.DataFrame, int]:
    """Return the rows whose ``columns`` are finite (one of them above 0), and how many are not.

    Raises
    ------
    InvalidInput
        There are none; ``what`` says in words what at least one row must be.
    """
    kept = np.isfinite(frame[list(columns)].to_numpy(np.float64, na_value=np.nan)).all(axis=1)
    if positive:
        kept &= frame[positive].to_numpy(np.float64, na_value=np.nan) > 0.0
    if not kept.any():
        raise InvalidInput(
            f"`{name}` must hold at least one {what}; got {len(frame)} without; {DECOMPOSE}"
        )
    return frame[kept], int((~kept).sum())


@dataclass(frozen=True)
class TopSplit:
    """The neurons of one layer, split by WD."""

    layer: str
    """Full dotted name."""
    frame: pd.DataFrame
    """The rows of ``scores`` that can be drawn, in their order."""
    is_top: NDArray[np.bool_]
    """(rows of frame,) whether the neuron is among the top."""
    threshold: float
    """The smallest WD among the top, in σ."""
    share: float
    """The share asked for, in (0, 1]."""
    dropped: str
    """How many rows cannot be drawn and why, or an empty string."""

    def values(self, column: str) -> Floats:
        """Return a column of the frame as floats, shape (rows of frame,)."""
        return _floats(self.frame, column)

    def neurons(self) -> IntegerArray:
        """Return the neurons' numbers, shape (rows of frame,)."""
        return pd.array(self.frame["neuron"].to_numpy(dtype=np.int64), dtype="Int64")

    @property
    def top_name(self) -> str:
        """What the top neurons are called, for example ``"top 3 % by WD"``."""
        return f"top {100 * self.share:.3g} % by WD"


def split_top(scores: pd.DataFrame, *, top: float, values: Sequence[str] = ("wd",)) -> TopSplit:
    """Split one layer's neurons into the ``top`` share by WD and the others.

    Parameters
    ----------
    scores
        One row a neuron, all of one layer.
    top
        Share in (0, 1] of the neurons that have a WD, rounded to whole neurons and at least one;
        of equal WDs the one that comes first.
    values
        Columns that must be finite for a neuron to be drawn; other neurons are counted.

    Raises
    ------
    InvalidInput
        ``top`` is out of range, a column is missing, there are several layers, or fewer than two
        neurons can be drawn.
    """
    top = share("top", top, zero=False)
    check_columns(scores, ("layer", "neuron", *dict.fromkeys(("wd", *values))), name="scores")
    layer = _single_layer(scores)
    wd = _floats(scores, "wd")
    wd[~np.isfinite(wd)] = np.nan
    kept = np.all([np.isfinite(_floats(scores, name)) for name in values], axis=0)
    dropped = _describe_dropped(scores[~kept], values)
    if kept.sum() < 2:
        raise InvalidInput(
            f"`scores` must hold at least 2 neurons with finite {' and '.join(values)} in layer "
            f"{layer!r}; got {kept.sum()}{f' ({dropped})' if dropped else ''}; score more neurons "
            f"with `entangle score`{', without --no-md' if 'md' in values else ''}."
        )
    is_top = top_mask(wd, top)
    return TopSplit(layer, scores[kept], is_top[kept], float(wd[is_top].min()), top, dropped)


def top_mask(wd: Floats, top: float) -> NDArray[np.bool_]:
    """Return which are among the ``top`` share of the WDs that are no NaN; of equals the first."""
    is_top = np.zeros(len(wd), dtype=np.bool_)
    most = max(1, round(top * int((~np.isnan(wd)).sum())))
    is_top[np.argsort(-wd, kind="stable")[:most]] = True  # NaN sorts last
    return is_top


def check_top(top: float) -> None:
    """Raise `InvalidInput` unless ``top`` is in (0, 1]."""
    share("top", top, zero=False)


def _single_layer(scores: pd.DataFrame) -> str:
    names = scores["layer"].unique()
    if len(names) > 1:
        raise InvalidInput(
            f"`scores` must hold one layer; got {len(names):,}; pick one with "
            "scores[scores.layer == name]."
        )
    return str(names[0])


def _floats(frame: pd.DataFrame, name: str) -> Floats:
    return frame[name].to_numpy(dtype=np.float64, na_value=np.nan, copy=True)


def _describe_dropped(rows: pd.DataFrame, values: Sequence[str]) -> str:
    if rows.empty:
        return ""
    flags = rows["flag"].fillna("").tolist() if "flag" in rows.columns else [""] * len(rows)
    reasons = pd.Series([flag or f"no {' or '.join(values)}" for flag in flags]).value_counts()
    listing = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
    return f"{len(rows):,} left out: {listing}"


@dataclass(frozen=True)
class OutputDensity:
    """The density of one neuron's outputs as a step function."""

    edges: Floats
    """(bins + 1,) ascending, in σ or in the neuron's own units."""
    density: Floats
    """(bins,) share of all tokens in the bin over its width."""
    n: int
    """Number of tokens, those in endless outer bins included."""

    def share_between(self, low: float, high: float) -> float:
        """Return the share of all tokens between two points (tokens spread evenly in a bin)."""
        clipped = np.clip(self.edges, low, high)
        return float(np.sum(self.density * np.diff(clipped)))

    def at(self, x: Floats) -> Floats:
        """Return the density at the points ``x``, 0 outside all bins."""
        bins = np.searchsorted(self.edges, x, side="right")
        return np.concatenate([[0.0], self.density, [0.0]])[bins]

    def quantile(self, q: float) -> float:
        """Return where the step function, taken as a whole, reaches the share ``q``."""
        cumulative = np.concatenate([[0.0], np.cumsum(self.density * np.diff(self.edges))])
        return float(np.interp(q * cumulative[-1], cumulative, self.edges))


def output_density(
    histogram: pd.DataFrame, *, mean: float, std: float, standardized: bool = True, label: str = ""
) -> OutputDensity:
    """Turn a histogram of a neuron's outputs into a density.

    Parameters
    ----------
    histogram
        ``left``, ``right`` and ``count`` in the neuron's own units: bins that join, ascending.
        The outermost may be endless.
    mean, std
        Of the neuron's outputs, in its own units.
    standardized
        Measure in standard deviations from the mean.
    label
        Name of the neuron, for errors.

    Raises
    ------
    InvalidInput
        Missing columns, bins that do not join, negative or no counts, a constant or infinite
        neuron.
    """
    check_columns(histogram, ("left", "right", "count"), name="histogram")
    of = f" of {label}" if label else ""
    if not (np.isfinite(mean) and 0.0 < std < np.inf):
        raise InvalidInput(
            f"`mean` and `std`{of} must be finite and `std` above 0; got mean {mean}, std {std}; "
            "a constant, NaN or infinite neuron (column `flag`) has no distribution to draw."
        )
    edges, count = _joined_bins(histogram, of=of)
    total = count.sum()
    closed = np.isfinite(edges[:-1]) & np.isfinite(edges[1:])
    edges = edges[np.isfinite(edges)]
    if standardized:
        edges = (edges - mean) / std
    return OutputDensity(edges, count[closed] / total / np.diff(edges), round(total))


def _joined_bins(histogram: pd.DataFrame, *, of: str) -> tuple[Floats, Floats]:
    left, right, count = (_floats(histogram, name) for name in ("left", "right", "count"))
    with np.errstate(invalid="ignore"):  # endless bins that do not belong inside
        gaps = np.abs(left[1:] - right[:-1])
        slack = 1e-3 * np.min(right - left)  # rounding, not a gap
    if not ((left < right).all() and (gaps <= slack).all()):
        raise InvalidInput(
            f"`histogram`{of} must hold bins that join, left < right, ascending; got "
            f"{len(left)} bins from {left[0]:.4g} to {right[-1]:.4g} that do not; {_WRITER}"
        )
    inside = count[np.isfinite(left) & np.isfinite(right)].sum()
    if not (np.isfinite(count).all() and (count >= 0).all() and inside > 0):
        raise InvalidInput(
            f"`histogram`{of} must hold counts of 0 or more, not all 0 in bins with two ends; got "
            f"a smallest count of {count.min():.4g} and a sum of {inside:.4g}; {_WRITER}"
        )
    return np.append(left, right[-1]), count


DECOMPOSE = "the command `entangle decompose` writes such tables."
TWO_EXPERTS = "needs 2 experts or more; got 1; `entangle decompose --experts 1,4,16` fits several."
"""Closing words of errors about tables that hold one expert only."""
_NEURON_COLUMNS = ("layer", "neuron", "experts", "sparsity", "mean", "std", "wd", "ri", "output_wd")


def choose(frame: pd.DataFrame, *, name: str, **wanted: str | float | int | None) -> pd.DataFrame:
    """Return the rows with one value in each of some columns.

    Parameters
    ----------
    frame
        A table with these columns.
    name
        Of the argument, for errors.
    wanted
        Value by column; None takes the only one that the table holds.

    Raises
    ------
    InvalidInput, UnknownName
        Missing columns, no rows, a value that the table does not hold, or several to choose from.
    """
    check_columns(frame, tuple(wanted), name=name, writer=DECOMPOSE)
    for column, value in wanted.items():
        known = frame[column].unique().tolist()
        if value is None and len(known) > 1:
            raise InvalidInput(
                f"`{column}` must be one of {_listed(known)}, which `{name}` holds; got None."
            )
        chosen = known[0] if value is None else plain_value(value)
        if not isinstance(chosen, Hashable) or chosen not in known:
            raise not_held(column, chosen, known, name)
        frame = frame[frame[column] == chosen]
    return frame


def not_held(column: str, value: object, known: Sequence[object], name: str) -> InvalidInput:
    """Return the error of a value that the table ``name`` does not hold in a column."""
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


ALL_TOKENS = -1
"""What stands for all clusters together in the column ``cluster``."""
MOST_NAMED = 6
"""Most experts with colours of their own: those whose mean outputs lie farthest out."""


def close_neurons(
    outputs: pd.DataFrame, neurons: pd.DataFrame, chosen: int | Iterable[int] | None
) -> list[SparseNeuron]:
    """Return the neurons to draw, from rows of one layer and sparsity."""
    layer, sparsity = str(outputs["layer"].iloc[0]), float(outputs["sparsity"].iloc[0])
    rows = choose(neurons, name="neurons", layer=layer, sparsity=sparsity)
    known = [int(number) for number in outputs["neuron"].unique()]
    if chosen is None:
        wanted: list[tuple[int, Role]] = usual_neurons(rows, known)
    else:
        usual = dict(usual_neurons(rows, known))
        wanted = [
            (number, usual.get(number, "output")) for number in wholes("chosen", chosen, least=0)
        ]
    return [
        sparse_neuron(neurons, layer=layer, neuron=number, sparsity=sparsity, role=role)
        for number, role in wanted
    ]


def dense_output(
    outputs: pd.DataFrame,
    neurons: pd.DataFrame,
    *,
    layer: str | None = None,
    neuron: int | None = None,
) -> tuple[pd.DataFrame, SparseNeuron]:
    """Return the histogram of one neuron's dense outputs, and its mean, standard deviation and WD.

    Parameters
    ----------
    outputs, neurons, layer
        As in `plot_sparse_output`, of any sparsity.
    neuron
        None takes the one with the largest WD.

    Raises
    ------
    InvalidInput, UnknownName
        Missing columns, or something that the tables do not hold.
    """
    rows = choose(outputs, name="outputs", layer=layer)
    check_columns(rows, ("sparsity", "experts"), name="outputs", writer=DECOMPOSE)
    rows = choose(rows, name="outputs", sparsity=float(rows["sparsity"].iloc[0]))
    item = close_neurons(rows, neurons, None if neuron is None else [neuron])[0]
    return choose(
        rows, name="outputs", neuron=item.neuron, experts=int(rows["experts"].min()), kind="dense",
        cluster=ALL_TOKENS,
    ), item  # fmt: skip


@dataclass(frozen=True)
class Stack:
    """Densities of one kind of outputs, by expert."""

    kind: str
    """``"dense"`` or ``"sparse"``."""
    item: SparseNeuron
    """Whose outputs they are."""
    whole: OutputDensity
    """Of all tokens, in σ of the dense outputs."""
    experts: list[int]
    """In the order of their mean dense output."""
    density: Floats
    """(experts, bins): they add up to the density of all tokens."""
    tokens: list[int]
    """(experts,) in each."""
    means: Floats
    """(experts,) mean dense output in σ from the mean of all tokens."""

    @property
    def title(self) -> str:
        """Title of a panel."""
        return f"{self.kind}: {self.item.label}, {len(self.experts)} experts"

    @property
    def named(self) -> list[int]:
        """Places of the experts with colours of their own, ascending."""
        return sorted(np.argsort(-np.abs(self.means), kind="stable")[:MOST_NAMED].tolist())

    @property
    def skyline(self) -> tuple[Floats, Floats]:
        """Middles of the bins, and the heights of all experts together."""
        edges = self.whole.edges
        return 0.5 * (edges[:-1] + edges[1:]), self.density.sum(axis=0)


def routed_neuron(rows: pd.DataFrame, neurons: pd.DataFrame) -> SparseNeuron:
    """Return the neuron that rows of ``outputs`` are of, if it has two experts or more."""
    first = rows.iloc[0]
    if int(first["experts"]) < 2:
        raise InvalidInput(f"a figure by expert {TWO_EXPERTS}")
    return sparse_neuron(
        neurons,
        layer=str(first["layer"]),
        neuron=int(first["neuron"]),
        sparsity=float(first["sparsity"]),
    )


def stack_of(rows: pd.DataFrame, item: SparseNeuron, kind: str) -> Stack:
    """Take the histograms of one kind; ``rows`` are of one neuron and number of experts."""
    whole = choose(rows, name="outputs", kind=kind, cluster=ALL_TOKENS)
    shape = output_density(whole, mean=item.mean, std=item.std, label=item.label)
    counts = _counts(rows, kind)
    strange = counts.columns.difference(pd.Index(whole["left"]))
    if len(strange):
        raise InvalidInput(
            f"`outputs` must have the same bins for every cluster of {item.label}; got one that "
            f"begins at {strange[0]:.4g}; {DECOMPOSE}"
        )
    dense = counts if kind == "dense" else _counts(rows, "dense")
    means = dense.mul(dense.columns.to_numpy(np.float64), axis=1).sum(axis=1) / dense.sum(axis=1)
    order = means.sort_values(kind="stable").index
    counts = counts.reindex(index=order, columns=whole["left"], fill_value=0.0).fillna(0.0)
    return Stack(
        kind=kind,
        item=item,
        whole=shape,
        experts=[int(number) for number in order],
        density=counts.to_numpy(np.float64) / shape.n / np.diff(shape.edges),
        tokens=[int(n) for n in counts.sum(axis=1)],
        means=(means[order].to_numpy(np.float64) - item.mean) / item.std,
    )


def _counts(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Return counts, a row an expert that has tokens and a column a bin, by its left edge."""
    kept = rows[rows["kind"].eq(kind) & rows["cluster"].ne(ALL_TOKENS) & rows["count"].gt(0)]
    return kept.pivot(index="cluster", columns="left", values="count").fillna(0.0)
