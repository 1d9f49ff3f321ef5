"""The factor of the inverse gram that SparseGPT eliminates weights with.

The factor of many inverse grams at once, by blocks, so that nearly all work is in products.

A library's Cholesky factorisation of one matrix keeps a GPU waiting for a long chain of small
steps. Here the steps of all matrices run together, and only corners of 128 columns are left to the
library.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.linalg import lapack
from torch import Tensor

from entangle.errors import InvalidInput, NumericalError
from entangle.kernels.dispatch import dispatch, on_cpu
from entangle.precision import full_precision

_CORNER = 128
_PANEL = 512
_SLAB = 2048


def factorise_(gram: Float[Tensor, "experts cols cols"]) -> Bool[Tensor, " experts"]:
    """Overwrite positive definite matrices by ``U``, upper triangular, ``inv(H) = U^T U``.

    Returns
    -------
    Tensor
        True where a matrix is not positive definite and the result means nothing.

    Notes
    -----
    ``H = R R^T`` with ``R`` upper triangular is built from the last panel of columns to the first,
    and ``U = inv(R)``. Only the upper triangles are read. Panels are divided by the inverses of
    corners of at most 512 columns.
    """
    cols = gram.shape[-1]
    bounds = [*range(cols, 0, -_PANEL), 0][::-1]
    infos: list[Int[Tensor, " experts"]] = []
    for start, stop in zip(bounds[-2::-1], bounds[:0:-1], strict=True):
        corner = _inverse_root(gram[:, start:stop, start:stop], infos)
        if start:
            panel = gram[:, :start, start:stop] @ corner.mT
            gram[:, :start, start:stop] = panel
            for left in range(0, start, _SLAB):
                right = min(left + _SLAB, start)
                rest, other = gram[:, :right, left:right], panel[:, left:right]
                rest.baddbmm_(panel[:, :right], other.mT, alpha=-1)
        gram[:, start:stop, start:stop] = corner
    gram.triu_()
    _join_(gram, bounds)
    return torch.stack(infos).any(0)


def _inverse_root(
    gram: Float[Tensor, "experts n n"], infos: list[Int[Tensor, " experts"]]
) -> Float[Tensor, "experts n n"]:
    """Return ``inv(R)`` for ``H = R R^T``; what failed is noted in `infos`."""
    n = gram.shape[-1]
    if n <= _CORNER:
        lower, info = torch.linalg.cholesky_ex(gram.flip(-2, -1))
        infos.append(info)
        unit = torch.eye(n, dtype=gram.dtype, device=gram.device).expand_as(gram)
        solved: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
        return solved.flip(-2, -1)
    half = n // 2
    last = _inverse_root(gram[:, half:, half:], infos)
    above = gram[:, :half, half:] @ last.mT
    rest = torch.baddbmm(gram[:, :half, :half], above, above.mT, alpha=-1)
    first = _inverse_root(rest, infos)
    root = torch.zeros_like(gram, memory_format=torch.contiguous_format)
    root[:, :half, :half], root[:, half:, half:] = first, last
    root[:, :half, half:] = (first @ (above @ last)).neg_()
    return root


def _join_(root: Float[Tensor, "experts cols cols"], bounds: list[int]) -> None:
    """Turn ``R`` into its inverse, given the inverses of the panels' corners on its diagonal."""
    if len(bounds) == 2:
        return
    middle = len(bounds) // 2
    _join_(root, bounds[: middle + 1])
    _join_(root, bounds[middle:])
    first, last = slice(bounds[0], bounds[middle]), slice(bounds[middle], bounds[-1])
    above = root[:, first, last] @ root[:, last, last]
    root[:, first, last].baddbmm_(root[:, first, first], above, beta=0, alpha=-1)


MAX_TRIES = 7
"""Values of the damping tried before giving up: from 0.01, the last one is 10 000."""

FIRST_AFTER_ZERO = 1e-4
"""The damping that follows 0."""

_REVERSED = 2**20  # numbers at a time
_HEADROOM = 2**20


class Factor(NamedTuple):
    """Factors of the inverses of some damped grams, ``inv(H) = U^T U``."""

    upper: Float[Tensor, "experts cols cols"]
    """``U``, upper triangular with a positive diagonal; of a gram near the smallest numbers of its
    dtype, ``U`` divided by a power of two."""
    damping: Float[Tensor, " experts"]
    """The multiple of the mean diagonal that was used for each expert."""
    dead: Bool[Tensor, "experts cols"]
    """Inputs that are zero on all tokens."""


def inverse_factor(
    gram: Float[Tensor, "experts cols cols"], *, damping: float | int, first: int = 0
) -> Factor:
    """Factorise the inverse of each damped gram: ``inv(H) = U^T U`` with ``U`` upper triangular.

    ``H`` is the gram plus ``damping`` times its mean diagonal; a dead input (zero diagonal) gets a
    unit diagonal first. Where ``H`` is not positive definite, the damping of that expert grows by
    factors of 10 (from 0, by way of 0.0001).

    Parameters
    ----------
    gram
        ``X^T X`` per expert; only its lower triangle is read.
    damping
        Multiple of the mean diagonal, at least 0.
    first
        Index of the first expert, for messages.

    Returns
    -------
    Factor

    Raises
    ------
    InvalidInput
        If `damping` is negative or not finite.
    NumericalError
        If a gram stays indefinite after `MAX_TRIES` values of the damping.

    Notes
    -----
    With ``J`` the reversal of rows and columns and ``J H J = L L^T``, ``U = J inv(L) J``: a single
    Cholesky factorisation, of the damped gram itself and not of its inverse. On the CPU it is done
    in float64, on a GPU by `entangle.pruning.factor`.
    """
    if not 0 <= damping < math.inf:
        raise InvalidInput(f"`damping` must be finite and at least 0; got {damping:g}.")
    used = gram.new_full(gram.shape[:1], damping)
    dead = gram.diagonal(dim1=-2, dim2=-1) == 0
    gram = _raised(gram)
    step = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    with full_precision():
        found, left = _factor(gram, dead + (used * step)[:, None])
        for _ in range(MAX_TRIES - 1):
            if not len(left):
                break
            used[left] = (used[left] * 10).clamp(min=FIRST_AFTER_ZERO)
            shift = dead[left] + (used[left] * step[left])[:, None]
            found[left], failed = _factor(gram[left], shift)
            left = left[failed]
    for expert in left.tolist():
        raise NumericalError(
            f"the gram of expert {first + expert} is not positive definite, not even with damping "
            f"{float(used[expert]):g} times its mean diagonal: check that it is X^T X."
        )
    return Factor(found, used, dead)


def _raised(gram: Float[Tensor, "experts cols cols"]) -> Float[Tensor, "experts cols cols"]:
    """Multiply grams whose inverse would overflow by a power of two."""
    top = gram.diagonal(dim1=-2, dim2=-1).amax(-1)
    small = (top > 0) & (top < torch.finfo(gram.dtype).tiny * _HEADROOM)
    if not small.any():
        return gram
    factor = torch.where(small, torch.finfo(gram.dtype).eps ** -2, 1.0)
    return gram * factor.to(gram.dtype)[:, None, None]


def _factor_in_double(
    gram: Float[Tensor, "experts cols cols"], shift: Float[Tensor, "experts cols"]
) -> tuple[Float[Tensor, "experts cols cols"], Int[Tensor, " failed"]]:
    """Do what `_factor` does in float64, one matrix after the other, and round the result.

    The last bits of a library's factor depend on the number of threads. Rounding takes them away.
    All steps work in the memory of one float64 matrix: of 14,336 inputs it takes 1.6 GB.
    """
    upper, failed = torch.empty_like(gram, memory_format=torch.contiguous_format), []
    for expert, (own, added) in enumerate(zip(gram, shift, strict=True)):
        work = own.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        work.diagonal().add_(added)
        if _invert_root_(work):
            upper[expert] = work.mT
        else:
            failed.append(expert)
        del work
    return upper, torch.tensor(failed, dtype=torch.int64)


@dispatch(_factor_in_double, where=on_cpu)
def _factor(
    gram: Float[Tensor, "experts cols cols"], shift: Float[Tensor, "experts cols"]
) -> tuple[Float[Tensor, "experts cols cols"], Int[Tensor, " failed"]]:
    """Factorise the inverse of ``gram + diag(shift)``; the indices where that fails come second."""
    damped = gram.clone(memory_format=torch.contiguous_format)
    damped.diagonal(dim1=-2, dim2=-1).add_(shift)
    return damped, factorise_(damped).nonzero()[:, 0]


def _invert_root_(matrix: Float[Tensor, "n n"]) -> bool:
    """Overwrite a symmetric float64 matrix by ``U^T``; tell whether it is positive definite.

    Only its lower triangle is read. LAPACK counts columns first: what it calls lower is the upper
    triangle here, to which the reversal brings the lower one.
    """
    _reverse_(matrix)
    there = matrix.numpy().T
    for step, settings in (
        (lapack.dpotrf, {"overwrite_a": 1}),
        (lapack.dtrtri, {"overwrite_c": 1}),
    ):
        found, info = step(there, lower=1, **settings)
        if info or not np.isfinite(there.diagonal()).all():  # OpenBLAS lets NaN pass
            return False
        assert np.shares_memory(found, there)  # noqa: S101
    matrix.triu_()
    _reverse_(matrix)
    return True


def _reverse_(matrix: Float[Tensor, "n n"]) -> None:
    """Reverse rows and columns in place."""
    flat = matrix.view(-1).numpy()
    size = len(flat)
    for start in range(0, size // 2, _REVERSED):
        stop = min(start + _REVERSED, size // 2)
        front, back = flat[start:stop], flat[size - stop : size - start]
        kept = front[::-1].copy()
        front[:] = back[::-1]
        back[:] = kept
