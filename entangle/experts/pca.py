"""Principal components of a stream of tokens, exact, from one pass.

A library's eigensolver computes all eigenvectors by a long chain of small steps, which takes a GPU
seconds for some thousand features: there the few leading ones are found in matrix products.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import scipy.linalg
import torch
from jaxtyping import BFloat16, Float, Float32, Float64
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.kernels.dispatch import dispatch, on_cpu
from entangle.precision import accumulator_dtype, exact_in_half, full_precision
from entangle.seeding import torch_rng
from entangle.stats.gram import Gram, require_finite

LARGEST_RESIDUAL = 1e-4
"""Largest residual ``‖A v − λ v‖``, as a share of the smallest eigenvalue sought."""
_CYCLES = 40
_NOTHING = 1e-12
_NEARLY = 0.1
"""‖QᵀQ − I‖ up to which one more Cholesky QR makes Q orthonormal to rounding."""
_ALL_AT_ONCE = 512
_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Pca:
    """The affine map onto the leading principal components."""

    mean: Float32[Tensor, " features"]
    """Mean of the tokens, (features,)."""
    components: Float32[Tensor, "n_components features"]
    """Orthonormal rows, falling variance; the entry largest in size of each row is positive."""
    explained: Float64[Tensor, " n_components"]
    """Share of the total variance along each component, in [0, 1]; 0 where there is no variance."""
    tokens: int
    """Number of tokens seen."""

    def project(self, x: Float[Tensor, "tokens features"]) -> Float32[Tensor, "tokens _"]:
        """Return the coordinates of the tokens along the components.

        On a GPU bfloat16 tokens are multiplied as they are, by the components as sums of bfloat16
        numbers: the products are exact and summed in float32.
        """
        with full_precision():
            if not (exact_in_half(x.dtype, x.device) and x.dtype == torch.bfloat16):
                return (x.float() - self.mean) @ self.components.mT
            products = torch.mm(x, self._pieces.flatten(0, 1).mT, out_dtype=torch.float32)
            return products.view(x.shape[0], 3, -1).sum(1) - self.components @ self.mean

    @cached_property
    def _pieces(self) -> BFloat16[Tensor, "three=3 n_components features"]:
        """The components as the sum of three bfloat16 matrices, largest first."""
        pieces, rest = [], self.components
        for _ in range(3):
            pieces.append(rest.bfloat16())
            rest = rest - pieces[-1].float()
        return torch.stack(pieces)


def fit_pca(blocks: Iterable[Float[Tensor, "_ _"]], n_components: int | None = None) -> Pca:
    """Fit the leading principal components of the tokens in ``blocks``.

    There must be at least one block; by default ``features // 32`` components, at least 1. The
    covariance is summed about the mean of the first block, so that a mean far from zero costs no
    digits (16-bit tokens, whose own rounding is coarser, are summed as they are), and decomposed by
    LAPACK (float64 where the device has it), on a GPU by `entangle.experts.clusters`.
    """
    rest = iter(blocks)
    first = next(rest)
    require_finite(first)
    features = first.shape[1]
    wanted = max(1, features // 32) if n_components is None else n_components
    if wanted > features:
        raise InvalidInput(
            f"`n_components` must be at most the {features} features of a token; got {wanted}."
        )
    shift = first.mean(0, dtype=accumulator_dtype(first.device)).float()
    if first.dtype != torch.float32:
        shift.zero_()
    gram = Gram(features, device=first.device)
    blocks = chain([first], rest)
    del first
    for block in blocks:
        gram.update(block if block.dtype != torch.float32 else block - shift)
    moments = gram.result()
    covariance = _centred_(moments.gram.div_(moments.count), moments.mean)
    variances, components = _leading(covariance, wanted)
    total = covariance.diagonal().sum().clamp_min(torch.finfo(covariance.dtype).tiny)
    return Pca(
        mean=(shift + moments.mean).float(),
        components=components.float().contiguous(),
        explained=(variances / total).cpu().double(),
        tokens=moments.count,
    )


def _centred_(products: Float[Tensor, "n n"], mean: Float[Tensor, " n"]) -> Tensor:
    """Subtract the mean's products in place, some rows at a time."""
    for rows, part in zip(products.split(_ROWS), mean.split(_ROWS), strict=True):
        rows -= torch.outer(part, mean)
    return products


def _by_lapack(covariance: Tensor, n_components: int) -> tuple[Tensor, Tensor]:
    """Find a few of many on the CPU, which is faster than all."""
    size = covariance.shape[0]
    wanted = (size - n_components, size - 1)
    found = scipy.linalg.eigh(covariance.numpy(), subset_by_index=wanted, driver="evr")
    values, vectors = (torch.from_numpy(array) for array in found)
    return values, vectors


@dispatch(_by_lapack, where=on_cpu)
def _rising(covariance: Tensor, n_components: int) -> tuple[Tensor, Tensor]:
    """Return rising eigenvalues with their unit vectors as columns, the largest among them."""
    large = covariance.shape[0] > _ALL_AT_ONCE
    pairs = leading_pairs(covariance, n_components) if large else None
    if pairs is not None:
        return pairs[0].flip(0), pairs[1].flip(1)
    values, vectors = torch.linalg.eigh(covariance)
    return values, vectors


def _leading(covariance: Tensor, n_components: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues and their signed unit vectors as rows."""
    values, vectors = _rising(covariance, n_components)
    values = values.flip(0)[:n_components].clamp_min(0.0)
    rows = vectors.mT.flip(0)[:n_components]
    peak = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return values, rows * peak.sign()


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
        if bool(worst <= LARGEST_RESIDUAL * values[count - 1]):
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
