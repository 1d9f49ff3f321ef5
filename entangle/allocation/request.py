"""What an allocation rule is asked, and what it may use to answer."""

from dataclasses import dataclass, replace

import numpy as np

from entangle.allocation.budget import Wish
from entangle.allocation.columns import Columns
from entangle.allocation.measurements import Measurements
from entangle.allocation.rows import Reals, Rows
from entangle.allocation.steps import step_sizes
from entangle.checks import finite, share
from entangle.errors import InvalidInput


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
    def rows(self) -> Rows:
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
