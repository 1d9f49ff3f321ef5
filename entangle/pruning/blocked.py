"""The factor of many inverse grams at once, by blocks, so that nearly all work is in products.

A library's Cholesky factorisation of one matrix keeps a GPU waiting for a long chain of small
steps. Here the steps of all matrices run together, and only corners of 128 columns are left to the
library.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_CORNER = 128
_PANEL = 512
_SLAB = 2048


def factorise_(
    gram: Float[Tensor, "experts cols cols"],
) -> Bool[Tensor, " experts"]:
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
