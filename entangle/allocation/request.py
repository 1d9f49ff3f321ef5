"""What an allocation rule is asked, and what it may use to answer.

Columns of the scores, put into the order of the neurons and combined into one number each.

Which layers share the budget, and whether scores and model belong together.

From wished-for sparsities to whole zeros that add up to the budget.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from torch import nn

from entangle.allocation.allocation import Counts, LayerRows, Reals, step_sizes
from entangle.allocation.measurements import Measurements
from entangle.checks import choice, finite, share, shown, whole
from entangle.errors import InvalidInput, unknown_name
from entangle.models.layers import (
    LISTING,
    Layer,
    LayerSpec,
    Projections,
    find_layers,
    list_layers,
    refuse_experts,
)
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.results.scores import NeuronScores

_HALVINGS = 110
"""Bisection steps: doubles are exhausted after about 60 from any start."""
_WHOLE = 1e-9
"""A count this close to an integer is that integer."""


class InfeasibleBudget(InvalidInput):
    """No choice of zeros within the clips adds up to the budget; the message says what can."""


@dataclass(frozen=True, eq=False)
class Wish:
    """Sparsities wished for neurons (or layers), and how they give way to meet a budget."""

    sparsity: Reals
    """Wished-for share of zeros, one an item."""
    gain: Reals
    """How far an item moves for each unit of the common shift, at least 0: 1 for all shifts the
    wishes, the wish itself scales them."""
    low: Reals
    """Least share of zeros of each item, in [0, 1]."""
    high: Reals
    """Greatest share of zeros of each item, in [0, 1]; ``low`` itself where an item is fixed."""


def whole_bounds(wish: Wish, units: Counts) -> tuple[Counts, Counts]:
    """Return the least and greatest whole number of zeros of each item of so many ``units``.

    Clips are rounded inward; a range that holds no integer becomes the integer nearest to its
    lower end (an item that is fixed at a share).
    """
    low = np.ceil(wish.low * units - _WHOLE)
    high = np.floor(wish.high * units + _WHOLE)
    fixed = low > high
    low[fixed] = high[fixed] = np.rint(wish.low * units)[fixed]
    return low.astype(np.int64), high.astype(np.int64)


def fill(
    wish: Wish, weights: Counts, low: Reals, high: Reals, *, starts: Counts, totals: Reals
) -> Reals:
    """Move the wishes of every segment by a common shift until the segment adds up to its total.

    Water-filling: item i gets ``clip(weights_i · (sparsity_i + c · gain_i), low_i, high_i)`` with
    one c a segment, so that what a clipped item cannot take is handed on to the others of its
    segment. c is found by bisection, all segments at once.

    Parameters
    ----------
    wish
        Sparsities and gains.
    weights
        Weights of each item.
    low, high
        Clips of the number of zeros of each item.
    starts
        Index of the first item of each segment.
    totals
        Zeros of each segment, within the sums of ``low`` and ``high``.

    Returns
    -------
    ndarray
        Zeros of each item, not yet whole.
    """
    sizes = np.diff(np.append(starts, len(weights)))
    slope = weights * wish.gain
    base = weights * wish.sparsity
    with np.errstate(divide="ignore", invalid="ignore"):  # an item of no gain stays where it is
        first = np.where(slope > 0, (low - base) / slope, 0.0)
        last = np.where(slope > 0, (high - base) / slope, 0.0)
    left = np.minimum.reduceat(first, starts) - 1.0
    right = np.maximum.reduceat(last, starts) + 1.0
    for _ in range(_HALVINGS):
        middle = (left + right) / 2
        if np.all((middle <= left) | (middle >= right)):
            break
        zeros = np.clip(base + np.repeat(middle, sizes) * slope, low, high)
        short = np.add.reduceat(zeros, starts) < totals
        left, right = np.where(short, middle, left), np.where(short, right, middle)
    return np.clip(base + np.repeat(right, sizes) * slope, low, high)


def round_zeros(
    zeros: Reals, low: Counts, high: Counts, *, steps: Counts, budget: int
) -> tuple[Counts, int]:
    """Round to whole steps, each item up or down, so that the sum is the budget.

    Items of one step size take turns: fractions are added up along the items and a step is handed
    out whenever the running sum passes a half, so that every layer's sum is right to about one
    step. What is still missing goes, spread evenly, to items of the smallest step that have room.

    Parameters
    ----------
    zeros
        Zeros of each item, within the clips.
    low, high
        Clips of each item, in steps.
    steps
        Size of a step of each item, in weights: 1, or ``in_features / m`` for n:m.
    budget
        Sum to be met: exactly with steps of 1, else to within half of the smallest step (unless
        clips leave no room).

    Returns
    -------
    zeros : ndarray
        Whole zeros, multiples of ``steps``.
    remainder : int
        Budget minus their sum.
    """
    wanted = zeros / steps
    near = np.rint(wanted)
    wanted = np.clip(np.where(np.abs(wanted - near) < _WHOLE, near, wanted), low, high)
    counts = np.floor(wanted)
    rest = wanted - counts
    for step in np.unique(steps):
        own = steps == step
        running = np.cumsum(rest[own])
        offset = 0.5 + np.ceil(running[-1] - 0.5) - running[-1]  # in [0, 1)
        counts[own] += np.diff(np.floor(running + offset), prepend=0.0)
    whole = counts.astype(np.int64)
    _settle(whole, low, high, steps, budget - int((whole * steps).sum()))
    whole *= steps
    return whole, budget - int(whole.sum())


def _settle(whole: Counts, low: Counts, high: Counts, steps: Counts, missing: int) -> None:
    """Hand ``missing`` zeros to items of the smallest step, in place, one step each at a time."""
    smallest = int(steps.min())
    left = round(missing / smallest)
    while left != 0:
        sign = 1 if left > 0 else -1
        room = (whole < high) if left > 0 else (whole > low)
        able = np.flatnonzero(room & (steps == smallest))
        if not len(able):
            return
        count = min(abs(left), len(able))
        whole[able[np.arange(count) * len(able) // count]] += sign
        left -= sign * count


def check_reachable(low: int, high: int, budget: int, weights: int, described: str) -> None:
    """Raise unless the budget lies within what the clips allow.

    Raises
    ------
    InfeasibleBudget
        With the range that can be met.
    """
    if low <= budget <= high:
        return
    raise InfeasibleBudget(
        f"a budget of {budget:,} zeros in {weights:,} weights (sparsity {budget / weights:.6g}) "
        f"cannot be met with {described}: that allows {low:,} to {high:,} zeros, a sparsity from "
        f"{low / weights:.6g} to {high / weights:.6g}; change `sparsity` or the clips."
    )


COMBINATIONS = ("zscore", "rank")
"""How several columns become one: mean of z-scores, or mean of ranks."""


@dataclass(frozen=True, eq=False)
class Columns:
    """The scores of exactly the neurons of some layers, in their order."""

    rows: LayerRows
    frame: pd.DataFrame
    """One row a neuron, in the order of ``rows``."""

    def combined(self, by: Sequence[str], *, combine: str, across_layers: bool) -> Reals:
        """Return one score a neuron from one or several columns.

        Parameters
        ----------
        by
            Numeric columns. One alone is returned as it is.
        combine
            ``zscore``: mean of ``(x − mean) / std`` (population; 0 where all values are equal).
            ``rank``: mean of the average ranks, each scaled to (0, 1).
        across_layers
            Standardise or rank over all neurons; otherwise within each layer.

        Raises
        ------
        UnknownName
            For a column that does not exist or is not numeric.
        InvalidInput
            For another combination, or a column without a single finite value.

        Notes
        -----
        A neuron without a value (flagged constant, nan, inf or coarse) gets the mean of the others
        of its layer, or of all layers where its layer has none.
        """
        combine = choice("combine", combine, COMBINATIONS)
        if not by:
            raise InvalidInput("`by` must name at least one column; got none.")
        values = [self.values(name) for name in by]
        if len(values) == 1:
            return values[0]
        transform = self.zscores if combine == "zscore" else self.ranks
        parts = [transform(one, across_layers=across_layers) for one in values]
        mean: Reals = np.mean(parts, axis=0, dtype=np.float64)
        return mean

    def values(self, name: str) -> Reals:
        """Return a column, with the mean of its layer where a neuron has no finite value."""
        known = self.frame.select_dtypes("number").columns.drop(
            ["neuron", "block"], errors="ignore"
        )
        if name not in known:
            raise unknown_name("column", name, known, "Choose a numeric column of the scores.")
        column = self.frame[name].to_numpy(np.float64, copy=True)
        found = np.isfinite(column)
        if found.all():
            return column
        if not found.any():
            raise InvalidInput(
                f"column {name!r} has no finite value in any of the {len(column):,} neurons; "
                "choose another column or score anew."
            )
        column[~found] = 0.0
        count = self.rows.total(found.astype(np.float64))
        means = np.full(len(count), column.sum() / found.sum())
        np.divide(self.rows.total(column), count, out=means, where=count > 0)
        return np.where(found, column, self.rows.spread(means))

    def missing(self, name: str) -> int:
        """Return the number of neurons without a finite value in a column."""
        return int((~np.isfinite(self.frame[name].to_numpy(np.float64))).sum())

    def zscores(self, values: Reals, *, across_layers: bool) -> Reals:
        """Standardise values over all neurons or within each layer; 0 where all are equal."""
        if across_layers:
            center, scale = np.full_like(values, values.mean()), np.full_like(values, values.std())
        else:
            center = self.rows.spread(self.rows.mean(values))
            scale = self.rows.spread(np.sqrt(self.rows.mean((values - center) ** 2)))
        level = scale <= 1e-12 * np.abs(center)
        return np.where(level, 0.0, (values - center) / np.where(level, 1.0, scale))

    def ranks(self, values: Reals, *, across_layers: bool) -> Reals:
        """Return the average rank of each value, scaled to (0, 1), over all or in each layer."""
        group = np.zeros_like(self.rows.layer) if across_layers else self.rows.layer
        ranks = pd.Series(values).groupby(group).rank().to_numpy(np.float64)
        return (ranks - 0.5) / np.bincount(group)[group]


def gather(scores: pd.DataFrame, rows: LayerRows) -> Columns:
    """Put the scores into the order of ``rows``; scores of other layers are left out.

    Raises
    ------
    InvalidInput
        If a column is missing, or a layer's neurons are not all there exactly once.
    """
    for name in ("layer", "neuron"):
        if name not in scores.columns:
            raise InvalidInput(f"the scores must have a column {name!r}; it is missing.")
    index = {name: i for i, name in enumerate(rows.names)}
    layer = scores["layer"].map(index)
    kept = scores[layer.notna()]
    position = layer[layer.notna()].to_numpy(np.int64)
    neuron = kept["neuron"].to_numpy(np.int64)
    order = np.lexsort((neuron, position))
    counts = np.bincount(position, minlength=len(rows.names))
    whole = np.array_equal(counts, rows.counts)
    expected = np.arange(len(order)) - np.repeat(rows.starts, rows.counts) if whole else None
    if expected is None or not np.array_equal(neuron[order], expected):
        _refuse_incomplete(rows, position, neuron)
    return Columns(rows, kept.iloc[order].reset_index(drop=True))


def _refuse_incomplete(rows: LayerRows, position: np.ndarray, neuron: np.ndarray) -> None:
    for i, name in enumerate(rows.names):
        found = neuron[position == i]
        count = int(rows.counts[i])
        if not np.array_equal(np.sort(found), np.arange(count)):
            listed = f"{len(found)} row(s)" if len(found) else "none"
            raise InvalidInput(
                f"the scores must hold each of the {count} neurons of layer {name!r} once; got "
                f"{listed}: score the whole layer of this model."
            )


@dataclass(frozen=True, eq=False)
class Settings:
    """Settings of an allocation, checked; explained at `entangle.allocation.allocate`."""

    rule: str
    sparsity: float
    by: tuple[str, ...]
    combine: str
    protect: float
    protect_sparsity: float
    strength: float
    across: str | None
    lowest: float
    highest: float
    pattern: str

    def __post_init__(self) -> None:
        for name in ("sparsity", "protect", "protect_sparsity", "lowest", "highest"):
            share(name, getattr(self, name))
        finite("strength", self.strength)
        if self.lowest > self.highest:
            raise InvalidInput(
                f"`lowest` must be at most `highest`; got {self.lowest:g} and {self.highest:g}."
            )
        if self.rule == "protect" and not self.lowest <= self.protect_sparsity <= self.highest:
            raise InvalidInput(
                f"`protect_sparsity` must lie within the clips [{self.lowest:g}, "
                f"{self.highest:g}]; got {self.protect_sparsity:g}."
            )


@dataclass(frozen=True, eq=False)
class Request:
    """A budget, scores and settings, given to a rule."""

    settings: Settings
    columns: Columns
    measured: Measurements | None
    target: Reals | None = None
    """Sparsity of each layer that a rule for neurons must keep; None where neurons of all layers
    compete."""

    @property
    def rows(self) -> LayerRows:
        """The neurons."""
        return self.columns.rows

    @property
    def base(self) -> Reals:
        """Sparsity of each neuron that the rule starts from, (neurons,)."""
        if self.target is None:
            return np.full(len(self.rows.weights), float(self.settings.sparsity))
        return self.rows.spread(self.target)

    def score(self) -> Reals:
        """Return the combined score of each neuron."""
        return self.columns.combined(
            self.settings.by,
            combine=self.settings.combine,
            across_layers=self.target is None,
        )

    def measurements(self) -> Measurements:
        """Return what can be measured on the model, or raise `InvalidInput` without one."""
        if self.measured is None:
            raise InvalidInput(
                f"rule {self.settings.rule!r} measures the model: give `model` and `calibration`."
            )
        return self.measured

    def wish(self, sparsity: Reals, gain: Reals | None = None) -> Wish:
        """Return a wish for neurons or layers within the common clips, shifting by default."""
        return Wish(
            sparsity=sparsity,
            gain=np.ones_like(sparsity) if gain is None else gain,
            low=np.full_like(sparsity, self.settings.lowest),
            high=np.full_like(sparsity, self.settings.highest),
        )

    def limit(self, wish: Wish, low: Reals, high: Reals) -> Wish:
        """Narrow a wish for neurons to a range of sparsities that the rule itself asks for.

        The range is widened to whole steps of the pattern, so that it leaves the sparsity in its
        middle within reach; the user's clips are not.
        """
        units = self.rows.weights // step_sizes(self.rows, self.settings.pattern)
        least, most = np.floor(low * units) / units, np.ceil(high * units) / units
        return replace(wish, low=np.maximum(wish.low, least), high=np.minimum(wish.high, most))


def min_max(values: Reals) -> Reals:
    """Scale values to [0, 1]; zeros where all are equal."""
    span = np.ptp(values)
    return np.zeros_like(values) if span == 0 else (values - values.min()) / span


def keep_more(score: Reals, sparsity: float | int, strength: float | int) -> Reals:
    """Return sparsities over a range of ``2 · strength``, the highest score the least sparse.

    ``1 − s = 2 · strength · minmax(score)``, moved so that the mean of s is ``sparsity``: the form
    that OWL and NeuroAL share.
    """
    kept = 2 * strength * min_max(score)
    moved: Reals = sparsity - (kept - kept.mean())
    return moved


@dataclass(frozen=True, eq=False)
class Subject:
    """The layers to allocate to."""

    rows: LayerRows
    model: LanguageModel | None
    layers: tuple[Layer, ...]
    """The layers of the model; empty without one."""
    described: Mapping[str, object] | None
    """What the manifest says about the model; None where nothing is known."""


def find_subject(
    scores: NeuronScores | pd.DataFrame,
    *,
    model: AnyModel | None,
    layers: LayerSpec | None,
    proj: Projections,
    in_features: Mapping[str, int] | None,
) -> Subject:
    """Find the layers to allocate to; arguments as in `entangle.allocation.allocate`.

    Raises
    ------
    InvalidInput, UnknownName
        If the scores are of another model, or lack a layer that was asked for.
    """
    frame = scores.frame if isinstance(scores, NeuronScores) else scores
    if "layer" not in frame.columns or not len(frame):
        raise InvalidInput("the scores must have a column 'layer' and at least one row.")
    described = scores.manifest.get("model") if isinstance(scores, NeuronScores) else None
    if not isinstance(described, Mapping):
        described = None
    scored = [str(name) for name in frame["layer"].unique()]
    if model is None:
        if layers is not None or proj is not None:
            raise InvalidInput("`layers` and `proj` choose layers of a model: give `model`.")
        rows = _rows_of_scores(frame, scored, {} if in_features is None else in_features)
        return Subject(rows, None, (), described)
    dense = as_language_model(model)
    if described is not None:
        _check_digest(dense, str(described.get("digest")))
    chosen = _chosen(dense.module, scored, layers, proj)
    return Subject(_rows_of_layers(chosen), dense, chosen, described or dense.describe())


def _check_digest(model: LanguageModel, digest: str) -> None:
    if model.digest != digest:
        raise InvalidInput(
            f"the model {model.name!r} has digest {model.digest[:12]}…, but the scores were made "
            f"from {digest[:12]}…; score this model, or pass the model that was scored."
        )


def _chosen(
    module: nn.Module,
    scored: Sequence[str],
    layers: LayerSpec | None,
    proj: Projections,
) -> tuple[Layer, ...]:
    """Return the layers asked for, or all that were scored."""
    if layers is None and proj is None:
        found = {layer.name: layer for layer in list_layers(module)}
        for name in scored:
            if name not in found:
                raise unknown_name(
                    "layer", name, found, "The scores are of another model than the one given."
                )
        known = tuple(layer for name, layer in found.items() if name in set(scored))
        refuse_experts(known, "an allocation")
        return known
    chosen = find_layers(module, "all" if layers is None else layers, proj)
    refuse_experts(chosen, "an allocation")
    for layer in chosen:
        if layer.name not in scored:
            raise InvalidInput(
                f"the scores hold no layer {layer.name!r}: score it too, or choose among the "
                f"{len(scored)} layer(s) that were scored. {LISTING}"
            )
    return chosen


def _rows_of_layers(layers: Sequence[Layer]) -> LayerRows:
    return LayerRows(
        names=tuple(layer.name for layer in layers),
        blocks=tuple(layer.block for layer in layers),
        counts=np.array([layer.out_features for layer in layers], dtype=np.int64),
        widths=np.array([layer.in_features for layer in layers], dtype=np.int64),
    )


def _rows_of_scores(
    frame: pd.DataFrame, names: Sequence[str], in_features: Mapping[str, int]
) -> LayerRows:
    for name in names:
        if in_features.get(name) is None:
            raise InvalidInput(
                f"the weights of a neuron of layer {name!r} must be known: give `model`, or their "
                f"number in `in_features`; got none in {shown(dict(in_features))}."
            )
        whole(f"in_features[{name!r}]", in_features[name], least=1)
    first = frame.drop_duplicates("layer")
    found = first["block"] if "block" in frame.columns else pd.Series([None] * len(first))
    counts = frame["layer"].value_counts(sort=False)
    return LayerRows(
        names=tuple(names),
        blocks=tuple(None if pd.isna(block) else int(block) for block in found),
        counts=np.array([int(counts[name]) for name in names], dtype=np.int64),
        widths=np.array([int(in_features[name]) for name in names], dtype=np.int64),
    )
