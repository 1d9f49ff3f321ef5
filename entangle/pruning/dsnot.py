"""DSnoT: swaps zeros of a finished mask until a row's expected output is that of the dense row."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from entangle.checks import finite, whole
from entangle.errors import InvalidInput

CYCLES, THRESHOLD = 50, 0.1
"""Swaps of a row, at most; error at which a row is done, for sequences of 2,048 tokens."""
LENGTH = 2048


@dataclass(eq=False)
class InputStatistics:
    """Of a layer's inputs, in float64: what DSnoT and Wanda need."""

    total: Float[Tensor, " cols"]
    """Sum of every input over tokens."""
    squares: Float[Tensor, " cols"]
    """Sum of squares over tokens."""
    variance: Float[Tensor, " cols"]
    """Sum over sequences of the variance within a sequence."""
    sequences: int = 0
    length: float = LENGTH
    """Tokens of a sequence, on average."""

    @classmethod
    def empty(cls, cols: int, device: torch.device) -> "InputStatistics":
        """Return the statistics of no tokens."""
        zeros = torch.zeros(cols, dtype=torch.float64, device=device)
        return cls(zeros, zeros.clone(), zeros.clone())

    def update(self, inputs: Float[Tensor, "sequences tokens cols"]) -> None:
        """Count sequences."""
        x = inputs.double()
        self.total += x.sum((0, 1))
        self.squares += x.square().sum((0, 1))
        self.variance += x.var(1, correction=0).sum(0)
        before, self.sequences = self.sequences, self.sequences + len(x)
        tokens = before * self.length + len(x) * x.shape[1]
        self.length = tokens / max(1, self.sequences)


def dsnot(
    dense: Float[Tensor, "rows cols"],
    sparse: Float[Tensor, "rows cols"],
    statistics: InputStatistics,
    *,
    cycles: int = CYCLES,
    threshold: float = THRESHOLD,
    keep_sign: bool = False,
    group: int | None = None,
) -> Float[Tensor, "rows cols"]:
    """Swap zeros of every row: regrow a pruned weight, prune a kept one, until the error is small.

    A row's error is the sum over its inputs of (dense − sparse weight) times the input's sum over a
    sequence. The pruned weight that grows is the next one in the order of its contribution over the
    input's variance, from the end that lowers the error; the kept one that goes has the smallest
    |w| · ‖x‖ among those whose contribution has the error's opposite sign. Each is tried once, and
    a row ends where its error is small, its candidates are used up or ``cycles`` have passed. The
    number of zeros stays as it is; what grows takes its dense value.

    Parameters
    ----------
    dense, sparse
        The layer's weight, and what a pruner made of it. Neither is changed.
    statistics
        Of the layer's inputs.
    cycles, threshold
        As `CYCLES` and `THRESHOLD`, which is scaled to the sequences' length.
    keep_sign
        Stop a row before a swap that would turn its error's sign, as the paper says; the published
        code does not.
    group
        The m of a mask that keeps n of every m columns, which every swap leaves as it is: what goes
        is the kept weight of the smallest |w| · ‖x‖ in the grown one's group, of any sign, and rows
        stop before their error turns its sign, both as in the published code. A candidate whose
        group has no kept weight left is passed over.

    Returns
    -------
    Float[Tensor, "rows cols"]
        The weight with its zeros swapped.

    Raises
    ------
    InvalidInput
        If the shapes do not fit, or no sequence was counted.

    References
    ----------
    Zhang et al., "Dynamic Sparse No Training", arXiv 2310.08915; rule as in ``lib/prune.py`` of
    github.com/zyxxmu/DSnoT, with all layers in its scope and SparseGPT's values kept.
    """
    cycles, threshold = whole("cycles", cycles, least=0), finite("threshold", threshold, least=0)
    if dense.shape != sparse.shape or dense.ndim != 2 or not statistics.sequences:
        raise InvalidInput(
            f"`dense` and `sparse` must have one shape, and sequences must have been counted; got "
            f"{tuple(dense.shape)}, {tuple(sparse.shape)} and {statistics.sequences} sequences."
        )
    mean = statistics.total / statistics.sequences
    variance = statistics.variance / statistics.sequences
    norm = (statistics.squares / statistics.sequences).sqrt()
    w, s = dense.double(), sparse.double()
    group = None if group is None else whole("group", group, least=1)
    rows = _Rows(w * mean, s * mean, s == 0, variance, s.abs() * norm, group)
    rows.error = ((w - s) * mean).sum(1)
    limit = threshold * statistics.length / LENGTH
    for _ in range(cycles):
        if not rows.swap(limit, keep_sign=keep_sign or group is not None):
            break
    grown = rows.grown
    result = torch.where(grown, dense, sparse)
    return result.masked_fill(rows.dropped, 0)


class _Rows:
    """All rows' candidates in their orders, and how far each list has been used."""

    def __init__(
        self, grows: Tensor, goes: Tensor, pruned: Tensor, variance: Tensor, saliency: Tensor,
        group: int | None = None,
    ) -> None:  # fmt: skip
        self._grow, self._go, self._group = grows, goes, group
        self._kept = saliency.masked_fill(pruned, torch.inf)
        self.error = torch.zeros(len(grows), dtype=grows.dtype, device=grows.device)
        self.grown, self.dropped = torch.zeros_like(pruned), torch.zeros_like(pruned)
        usable = pruned & (grows != 0)
        ratio = torch.where(variance > 0, grows / variance, torch.sign(grows) * torch.inf)
        self._order = torch.where(usable, ratio, torch.nan).sort(dim=1, stable=True).indices
        self._first = torch.zeros(len(grows), dtype=torch.int64, device=grows.device)
        self._last = usable.sum(1) - 1  # NaN is sorted to the end
        self._lists, self._counts, self._next = [], [], []
        for negative in (True, False):
            mine = ~pruned & ((goes < 0) if negative else (goes > 0))
            self._lists.append(
                torch.where(mine, saliency, torch.inf).sort(dim=1, stable=True).indices
            )
            self._counts.append(mine.sum(1))
            self._next.append(torch.zeros_like(self._first))
        self._running = torch.ones(len(grows), dtype=torch.bool, device=grows.device)

    def swap(self, limit: float, *, keep_sign: bool) -> bool:
        """Swap one zero of every row that is not done; tell whether any was swapped."""
        self._running &= self.error.abs() > limit
        up = self.error > 0
        place = torch.where(up, self._last, self._first)
        self._running &= self._first <= self._last
        grow = self._order.gather(1, place.clamp(0, self._order.shape[1] - 1)[:, None])
        drop, there = self._of_row(up) if self._group is None else self._of_group(grow)
        if self._group is None:
            self._running &= there
        gained, lost = self._grow.gather(1, grow)[:, 0], self._go.gather(1, drop)[:, 0]
        after = self.error + lost - gained
        if keep_sign:
            self._running &= (after.sign() == self.error.sign()) | ~there
        run = self._running
        chosen = (run & there).nonzero()[:, 0]
        self.grown[chosen, grow[chosen, 0]] = True
        self.dropped[chosen, drop[chosen, 0]] = True
        self._kept[chosen, drop[chosen, 0]] = torch.inf
        self.error = torch.where(run & there, after, self.error)
        self._last -= (run & up).long()
        self._first += (run & ~up).long()
        self._next[0] += (run & up).long()
        self._next[1] += (run & ~up).long()
        return bool(run.any())

    def _of_row(self, up: Tensor) -> tuple[Tensor, Tensor]:
        """Return the kept weight that goes next from every row, and whether there is one."""
        count = torch.where(up, self._counts[0], self._counts[1])
        at = torch.where(up, self._next[0], self._next[1])
        last = at.clamp(0, self._order.shape[1] - 1)[:, None]
        negative, positive = (one.gather(1, last) for one in self._lists)
        return torch.where(up[:, None], negative, positive), at < count

    def _of_group(self, grow: Tensor) -> tuple[Tensor, Tensor]:
        """Return the kept weight that matters least in the group of what grows, and whether."""
        assert self._group is not None  # noqa: S101
        own = grow - grow % self._group + torch.arange(self._group, device=grow.device)
        own = own.clamp_max(self._order.shape[1] - 1)  # the last group may be shorter
        least, place = self._kept.gather(1, own).min(1, keepdim=True)
        return own.gather(1, place), (least < torch.inf)[:, 0]
