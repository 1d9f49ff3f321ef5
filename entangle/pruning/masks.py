"""Which weights go: sparsity patterns, exact counts, and the choice of the least salient.

Throughout, a saliency is a score per weight, and the weights with the smallest saliency are pruned.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from entangle.errors import InvalidInput

BLOCK = 128
"""Columns per block, in the ``block`` pattern and in the SparseGPT solver."""


@dataclass(frozen=True)
class Pattern:
    """How the zeros of a layer are distributed (see `parse_pattern`)."""

    kind: Literal["row", "layer", "block", "n:m"]
    kept: int | None = 0
    """Weights kept of every group (n), for ``n:m``; None where each row has a number of its own."""
    group: int = 1
    """Neighbouring columns per group (m), for ``n:m``."""


def parse_pattern(pattern: str) -> Pattern:
    """Translate a pattern's name.

    Parameters
    ----------
    pattern
        ``"row"``, ``"layer"``, ``"block"``, or ``"n:m"`` with two integers, which keeps ``n`` of
        every ``m`` neighbouring columns of a row: ``"1:4"`` prunes three quarters. With the letter
        n and a number for m, such as ``"n:4"``, every row has an ``n`` of its own. Where m does not
        divide the columns, the last r of them keep ``ceil(n * r / m)``.

    Raises
    ------
    InvalidInput
        For any other string, and for ``n`` above ``m``.
    """
    for kind in ("row", "layer", "block"):
        if pattern == kind:
            return Pattern(kind)
    match = re.fullmatch(r"(n|\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    kept, group = (None, 0) if match is None else (match[1], int(match[2]))
    if kept is None or group == 0 or (kept != "n" and int(kept) > group):
        raise InvalidInput(
            f"`pattern` must be row, layer, block, or n:m (keep n <= m of every m); "
            f"got {pattern!r}."
        )
    return Pattern("n:m", None if kept == "n" else int(kept), group)


def count_zeros(sparsity: Float[Tensor, "..."], weights: int) -> Int[Tensor, "..."]:
    """Return ``sparsity * weights`` rounded to the nearest integer, halves to the even one."""
    return (sparsity.double() * weights).round().long()


def dead_first(
    saliency: Float[Tensor, "experts rows cols"],
    weight: Float[Tensor, "experts rows cols"],
    dead: Bool[Tensor, "experts cols"],
) -> Float[Tensor, "experts rows cols"]:
    """Put the weights of dead inputs before all others, in order of magnitude.

    A weight whose input is always zero costs nothing to prune. It gets the saliency ``-1 / |w|``.
    """
    if not dead.any():
        return saliency
    return torch.where(dead[:, None, :], -weight.abs().reciprocal(), saliency)


def _kth_smallest(
    values: Float[Tensor, "*lead n"], k: Int[Tensor, "*lead"]
) -> Float[Tensor, "*lead"]:
    """Return the ``k``-th smallest value along the last axis, -inf where ``k`` is 0."""
    lowest, highest = (int(k.min()), int(k.max())) if k.numel() else (0, 0)
    if highest == 0:
        return values.new_full(k.shape, -math.inf)
    if lowest < highest:
        lead = torch.arange(highest - lowest, device=k.device) < (highest - k)[..., None]
        padding = torch.where(lead, -math.inf, math.inf).to(values.dtype)
        values = torch.cat([values, padding], -1)
    return values.kthvalue(highest, -1).values


def prune_smallest(
    saliency: Float[Tensor, "*lead n"], budget: Int[Tensor, "*lead"], width: int | None = None
) -> Bool[Tensor, "*lead width"]:
    """Mark the ``budget`` smallest saliencies of every line; equal ones from left to right.

    Parameters
    ----------
    saliency
        Scores, one line per budget.
    budget
        How many to prune on each line, in [0, n].
    width
        Return the marks of the first ``width`` entries only (None: of all).

    Returns
    -------
    Tensor
        True where pruned; without ``width``, each line holds exactly its budget.
    """
    threshold = _kth_smallest(saliency, budget)[..., None]
    spare = budget[..., None] - (saliency < threshold).sum(-1, keepdim=True)
    head = saliency[..., :width]
    tied = head == threshold
    return (head < threshold) | (tied & (tied.cumsum(-1, dtype=torch.int32) <= spare))


def zeros_by_group(cols: int, group: int) -> Int[Tensor, " counts"]:
    """Return the zeros of a row that loses 0, 1, …, ``group`` of every group, for ``n:m``.

    The last ``r`` columns, where they are fewer, lose ``r / group`` of that, rounded down.
    """
    zeros = torch.arange(group + 1)
    return cols // group * zeros + zeros * (cols % group) // group


def prune_groups(
    saliency: Float[Tensor, "*lead cols"], zeros: Int[Tensor, "*lead"], group: int
) -> Bool[Tensor, "*lead cols"]:
    """Mark the smallest of every ``group`` of neighbours (pattern ``n:m``).

    Parameters
    ----------
    saliency
        Scores. The last group may be shorter, and loses its share, rounded down.
    zeros
        How many to prune in each group of a line, ``m - n``, in [0, group].
    group
        Neighbouring columns per group (m).
    """
    short = saliency.shape[-1] % group
    if short:
        whole, rest = saliency.split([saliency.shape[-1] - short, short], -1)
        last = prune_smallest(rest, zeros * short // group)
        return torch.cat([prune_groups(whole, zeros, group), last], -1) if whole.numel() else last
    groups = saliency.unflatten(-1, (saliency.shape[-1] // group, group))
    return prune_smallest(groups, zeros[..., None].expand(groups.shape[:-1])).flatten(-2)


def prune_block(
    saliency: Float[Tensor, "experts rows width"], sparsity: float | int
) -> Bool[Tensor, "experts rows width"]:
    """Apply the published rule: one threshold per expert over one block of columns.

    With ``k = int(numel * sparsity)`` the threshold is the (k + 1)-th smallest saliency, and all
    that do not exceed it are pruned: one more than asked, further ones on ties, and every weight of
    zero saliency. Unlike the published code, sparsity 0 prunes nothing and sparsity 1 everything.

    Source: ``SparseGPT.fasterprune`` in github.com/IST-DASLab/sparsegpt.
    """
    flat = saliency.flatten(1)
    k = int(flat.shape[1] * sparsity)
    if sparsity == 0 or k == flat.shape[1]:
        return torch.full_like(saliency, sparsity != 0, dtype=torch.bool)
    threshold = flat.kthvalue(k + 1, -1).values.clamp(min=0)
    return saliency <= threshold[:, None, None]
