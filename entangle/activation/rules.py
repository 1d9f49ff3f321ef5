"""Which inputs of a layer are kept, token by token: thresholds and counts over scores.

A rule sets the other inputs to 0. It is exact about what was kept: it counts, over the tokens that
count, how often every input was, from which all costs follow.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.models.blocks import is_trying
from entangle.recording.hooks import SeenTensor

FORMS = ("threshold", "topk")
"""Ways to choose: scores above a number that calibration gave, or as many of every token."""
_SHIFT = 15  # bits of a float32 that a bin leaves out: 8 of its mantissa are kept


class Scores:
    """Counts of scores in bins that are 1/256 of their value wide, for quantiles of them.

    Their limits are those of the numbers that 16 bits can tell apart, so no range need be known,
    and counts of parts add up to those of the whole.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._sums: Tensor | None = None

    def update(self, scores: Float[Tensor, "..."]) -> None:
        """Count scores, which are finite and not negative."""
        bins = scores.float().contiguous().view(torch.int32).flatten() >> _SHIFT
        counts = torch.bincount(bins, minlength=2**16).cpu()
        self._counts = counts if self._counts is None else self._counts + counts
        self._sums = None

    def quantile(self, share: float) -> float:
        """Return the score that ``share`` of them do not pass, to 1/256 of itself.

        -1 for a share of 0, below every score; infinite for 1.
        """
        if share <= 0 or self._counts is None:
            return -1.0
        if share >= 1:
            return float("inf")
        if self._sums is None:
            self._sums = self._counts.cumsum(0)
        passed = self._sums
        wanted = share * float(passed[-1])
        place = int(torch.searchsorted(passed, wanted))
        inside = float(passed[place] - wanted) / float(self._counts[place])
        low, high = self._edges(place)
        return high - inside * (high - low)

    def above(self, value: float) -> float:
        """Return the share of the scores above a value, as `quantile` interpolates."""
        if self._counts is None or value < 0:
            return 1.0
        if value == float("inf"):
            return 0.0
        place = int(torch.tensor(value).view(torch.int32)) >> _SHIFT
        low, high = self._edges(place)
        inside = 1.0 if place == 0 else (value - low) / (high - low)  # zeros are not above it
        if self._sums is None:
            self._sums = self._counts.cumsum(0)
        own = float(self._counts[place])
        under = float(self._sums[place]) - own + inside * own
        return 1 - under / float(self._sums[-1])

    @staticmethod
    def _edges(place: int) -> tuple[float, float]:
        low, high = (
            torch.tensor((place + step) << _SHIFT, dtype=torch.int32).view(torch.float32).item()
            for step in (0, 1)
        )
        return low, high


def largest(scores: Float[Tensor, "... features"], count: int) -> Bool[Tensor, "... features"]:
    """Return which scores are the ``count`` largest of their row; what is no number is."""
    width = scores.shape[-1]
    if scores.device.type == "cpu" and 0 < count < width:  # twice as fast as topk there
        flat = scores.detach().float().numpy()
        least = torch.from_numpy(np.partition(flat, width - count, -1)[..., width - count, None])
        keep = ~(scores < least)
        if int(keep.sum()) == count * keep[..., 0].numel():  # else there are ties
            return keep
    best = scores.topk(count, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


class Thinned(NamedTuple):
    """What a rule makes of an input."""

    inputs: Float[Tensor, "... features"]
    """With the inputs that go set to 0."""
    keep: Bool[Tensor, "... features"]
    """Which were kept."""


@dataclass(eq=False)
class Turn:
    """An orthogonal change of basis in which inputs are kept."""

    basis: Float[Tensor, "features features"]
    """Columns are the directions."""
    gain: Float[Tensor, " features"] | None = None
    """Of the norm in front, which is divided out before and multiplied in after."""

    def __post_init__(self) -> None:
        self._last: tuple[SeenTensor, Tensor] | None = None

    @cached_property
    def _inward(self) -> Float[Tensor, "features features"]:
        if self.gain is None:
            return self.basis
        return torch.where(self.gain == 0, 0.0, 1 / self.gain)[:, None] * self.basis

    @cached_property
    def _outward(self) -> Float[Tensor, "features features"]:
        turned = self.basis if self.gain is None else self.basis * self.gain[:, None]
        return turned.T.contiguous()

    def into(self, x: Float[Tensor, "... features"]) -> Float[Tensor, "... features"]:
        """Return the inputs in the basis, float32: once for all layers that read them."""
        if self._last is None or not self._last[0].same_as(x):
            self._last = SeenTensor.of(x), x.float() @ self._inward
        return self._last[1]

    def back(self, z: Float[Tensor, "... features"]) -> Float[Tensor, "... features"]:
        """Return what `into` was given."""
        return z @ self._outward

    def forget(self) -> None:
        """Let go of the last input."""
        self._last = None


@runtime_checkable
class Routing(Protocol):
    """Sends tokens to experts, whose columns have zeros of their own."""

    @property
    def k(self) -> int:
        """Number of experts."""

    def __call__(self, x: Float[Tensor, "*batch features"]) -> Int64[Tensor, " tokens"]:
        """Return the expert of every token."""

    def follow(self, given: Tensor, masked: Tensor) -> None:
        """Send the tokens of an input that was masked where those that were given go."""


@dataclass(eq=False)
class Window:
    """Which tokens of a pass are sparse, and which are counted."""

    shape: tuple[int, ...] = ()
    """(sequences, tokens) of the pass that runs."""
    dense: int = 0
    """First tokens of a sequence that stay dense."""
    uncounted: int = 0
    """First tokens of a sequence that are not counted."""

    def of(self, x: Tensor, first: int) -> Tensor:
        """Return, for every row of ``x`` (..., features), whether it is token ``first`` or later.

        Raises
        ------
        InvalidInput
            If the rows are not the pass's tokens, such as those of an expert.
        """
        rows, (n_seq, length) = x.shape[:-1], self.shape
        if rows.numel() != n_seq * length or (len(rows) == 2 and tuple(rows) != (n_seq, length)):
            raise InvalidInput(
                f"dense first tokens need layers that see every token in its place; one sees rows "
                f"{tuple(rows)} of {n_seq} sequences of {length}: leave `dense_prefix` 0."
            )
        late = torch.arange(length, device=x.device) >= first
        return late.expand(n_seq, length).reshape(*rows, 1)


@dataclass(eq=False)
class Rule:
    """Keep the inputs with the largest |x| · scale: above a threshold, or as many a token."""

    level: float
    """Share that goes."""
    window: Window
    """Of the pass that runs."""
    form: str = "topk"
    """One of `FORMS`."""
    scale: Float[Tensor, " features"] | None = None
    """A factor for every input; None for 1."""
    turn: Turn | None = None
    """Basis in which inputs are kept."""
    scores: Scores = field(default_factory=Scores)
    """Of the calibration text, for thresholds."""
    kept: Int64[Tensor, " features"] | None = None
    """How often every input was kept, of the tokens counted."""
    tokens: int = 0
    """Tokens counted."""
    routing: Routing | None = None
    """Where the layer's tokens go, which the input as it was decides."""
    joint: Float[Tensor, "experts features"] | None = None
    """How often every input was kept of each expert's tokens, with `routing`."""

    def __post_init__(self) -> None:
        self._last: tuple[SeenTensor, Thinned] | None = None
        self._threshold: float | None = None

    @property
    def dense(self) -> bool:
        """Whether nothing goes, so that inputs are left as they are."""
        return self.level <= 0 and self.routing is None

    @property
    def expected(self) -> float:
        """Share of the inputs that is kept on the calibration text."""
        if self.form == "threshold" and self._threshold is not None:
            return self.scores.above(self._threshold)
        return 1 - min(max(self.level, 0.0), 1.0)

    def settle(self, level: float | None = None) -> None:
        """Take the threshold from the scores seen, for another level where one is given."""
        self.level = self.level if level is None else level
        self._threshold = self.scores.quantile(self.level)
        self.kept, self.tokens = None, 0

    def score(self, x: Float[Tensor, "... features"]) -> Float[Tensor, "... features"]:
        """Return how much every input matters, in the basis of `turn`."""
        return self.weigh(self._turned(x))

    def weigh(self, z: Float[Tensor, "... features"]) -> Float[Tensor, "... features"]:
        """Return the scores of inputs that are in the basis."""
        size = z.float().abs()
        return size if self.scale is None else size * self.scale

    def _turned(self, x: Tensor) -> Tensor:
        return x if self.turn is None else self.turn.into(x)

    def chosen(self, scores: Float[Tensor, "... features"]) -> Bool[Tensor, "... features"]:
        """Return which of the scores are kept."""
        if self.form == "threshold":
            assert self._threshold is not None, "settle() takes it from the calibration"  # noqa: S101
            return ~(scores <= self._threshold)  # what is no number stays, and is seen
        return largest(scores, int(scores.shape[-1] * (1 - self.level) + 1e-9))

    def __call__(self, x: Float[Tensor, "... features"]) -> Thinned:
        """Return the inputs with those that go set to 0, and count those kept."""
        if self._last is not None and self._last[0].same_as(x):
            return self._last[1]
        z = self._turned(x)
        keep = self.chosen(self.weigh(z))
        if self.window.dense:
            keep |= ~self.window.of(x, self.window.dense)
        inputs = torch.where(keep, z, 0.0)
        if self.turn is not None:
            inputs = self.turn.back(inputs).to(x.dtype)
        self.count(keep)
        if self.routing is not None:
            self._follow(x, inputs, keep)
        found = Thinned(inputs, keep)
        self._last = SeenTensor.of(x), found
        return found

    def count(self, keep: Bool[Tensor, "... features"]) -> None:
        """Count what was kept of the tokens that are counted."""
        if is_trying():
            return
        tokens = keep.shape[:-1].numel()
        if self.window.uncounted:
            late = self.window.of(keep, self.window.uncounted)
            keep, tokens = keep & late, int(late.sum())
        kept = keep.flatten(0, -2).sum(0)
        self.kept = kept if self.kept is None else self.kept + kept
        self.tokens += tokens

    def _follow(self, x: Tensor, inputs: Tensor, keep: Tensor) -> None:
        """Count what was kept by the expert that the unmasked input goes to."""
        assert self.routing is not None  # noqa: S101
        experts = self.routing(x)
        self.routing.follow(x, inputs)
        if self.window.uncounted:
            keep = keep & self.window.of(keep, self.window.uncounted)
        flat = keep.flatten(0, -2).double()
        if is_trying():
            return
        if self.joint is None:
            self.joint = flat.new_zeros(self.routing.k, flat.shape[-1])
        self.joint.index_add_(0, experts, flat)

    def forget(self) -> None:
        """Let go of the last input."""
        self._last = None
        if self.turn is not None:
            self.turn.forget()

    def share_kept(self) -> Float[Tensor, " features"] | None:
        """Return how often every input was kept, as shares, float64; None if no token ran."""
        return None if self.kept is None else self.kept.double() / max(1, self.tokens)
