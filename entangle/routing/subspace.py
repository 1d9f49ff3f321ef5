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
_NEARLY = 0.1
"""‖QᵀQ − I‖ up to which one more Cholesky QR makes Q orthonormal to rounding."""


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
    Block Lanczos with full orthogonalisation and thick restarts. Blocks are made orthonormal by
    Cholesky QR done twice (Yamamoto et al., ETNA 44, 2015), which is matrix products and little
    else; one so ill-conditioned that this would cost digits goes to Householder's QR. The start is
    random, the same every time. An error of ``TOLERANCE`` in the residuals changes the variance
    that the vectors explain by its square.
    """
    size = matrix.shape[0]
    width = max(8, count // 4)
    most = 3 * count + 4 * width
    if most > size // 2:
        return None
    rng = torch_rng(0, "routing", "subspace", size, count)
    start = torch.randn(size, width, generator=rng, dtype=torch.float64).to(matrix)
    basis = image = matrix.new_zeros(size, 0)
    block = _orthonormal(basis, matrix @ start)
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
        block = _orthonormal(basis, product)
    return basis, image, block


def _orthonormal(basis: Tensor, block: Tensor) -> Tensor:
    """Return orthonormal columns that span what ``block`` has outside an orthonormal basis."""
    found, off = block, block.new_zeros(())
    identity = torch.eye(block.shape[1], dtype=block.dtype, device=block.device)
    for _ in range(2):
        found = found - basis @ (basis.mT @ found)
        products = found.mT @ found
        off = torch.linalg.matrix_norm(products - identity)
        factor, _info = torch.linalg.cholesky_ex(products)
        found = torch.linalg.solve_triangular(factor.mT, found, upper=True, left=False)
    if bool(off <= _NEARLY):  # False for what a failed factorisation leaves, NaN among it
        return found
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
    return block
