"""A few leading eigenvectors of a large symmetric matrix, in matrix products.

A library's eigensolver computes all of them by a long chain of small steps, which takes a GPU
seconds for some thousand features.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from entangle.seeding import torch_rng

TOLERANCE = 1e-4
"""Largest residual ``‖A v − λ v‖``, as a share of the smallest eigenvalue sought."""

_CYCLES = 40
_NOTHING = 1e-12


def leading_pairs(
    matrix: Float[Tensor, "n n"], count: int
) -> tuple[Float[Tensor, " count"], Float[Tensor, "n count"]] | None:
    """Return the largest eigenvalues, falling, and their unit vectors as columns.

    Parameters
    ----------
    matrix
        Symmetric, without negative eigenvalues beyond rounding; best float64.
    count
        How many.

    Returns
    -------
    tuple or None
        None if the basis would be as large as the matrix, its rank is too small, or the residuals
        do not get small.

    Notes
    -----
    Block Lanczos with full orthogonalisation and thick restarts. The start is random, the same
    every time. An error of ``TOLERANCE`` in the residuals changes the variance that the vectors
    explain by its square.
    """
    size = matrix.shape[0]
    width = max(8, count // 4)
    most = 3 * count + 4 * width
    if most > size // 2:
        return None
    rng = torch_rng(0, "routing", "subspace", size, count)
    start = torch.randn(size, width, generator=rng, dtype=torch.float64).to(matrix)
    block = torch.linalg.qr(matrix @ start).Q
    basis = image = matrix.new_zeros(size, 0)
    for _ in range(_CYCLES):
        basis, image, block = _grown(matrix, basis, image, block, most)
        values, vectors = torch.linalg.eigh(basis.mT @ image)
        vectors = vectors[:, -(count + width) :].flip(1)
        values = values.flip(0)[: vectors.shape[1]]
        if not bool(values[count - 1] > _NOTHING * values[0]):
            return None
        basis, image = basis @ vectors, image @ vectors
        residual = image[:, :count] - basis[:, :count] * values[:count]
        worst = torch.linalg.vector_norm(residual, dim=0).max()
        if bool(worst <= TOLERANCE * values[count - 1]):
            return values[:count], basis[:, :count]
    return None


def _grown(
    matrix: Tensor, basis: Tensor, image: Tensor, block: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Add Lanczos blocks to a basis and its image; the block that would come next is third."""
    while basis.shape[1] + block.shape[1] <= most:
        product = matrix @ block
        basis, image = torch.cat([basis, block], 1), torch.cat([image, product], 1)
        for _ in range(2):
            product = product - basis @ (basis.mT @ product)
            product = torch.linalg.qr(product).Q
        block = product
    return basis, image, block
