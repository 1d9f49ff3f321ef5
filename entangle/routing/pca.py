"""Principal components of a stream of tokens, exact, from one pass."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import scipy.linalg
import torch
from jaxtyping import BFloat16, Float, Float32, Float64
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.precision import accumulator_dtype, full_precision
from entangle.routing.subspace import leading_pairs
from entangle.stats.gram import Gram, require_finite

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
            if not (x.is_cuda and x.dtype == torch.bfloat16):
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
    LAPACK (float64 where the device has it), on a GPU by `entangle.routing.subspace`.
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


def _leading(covariance: Tensor, n_components: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues and their signed unit vectors as rows."""
    size = covariance.shape[0]
    if covariance.device.type == "cpu":  # LAPACK finds a few of many faster than all
        wanted = (size - n_components, size - 1)
        found = scipy.linalg.eigh(covariance.numpy(), subset_by_index=wanted, driver="evr")
        values, vectors = (torch.from_numpy(array) for array in found)
    else:
        pairs = leading_pairs(covariance, n_components) if size > _ALL_AT_ONCE else None
        values, vectors = pairs or torch.linalg.eigh(covariance)
        values, vectors = (values.flip(0), vectors.flip(1)) if pairs else (values, vectors)
    values = values.flip(0)[:n_components].clamp_min(0.0)
    rows = vectors.mT.flip(0)[:n_components]
    peak = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return values, rows * peak.sign()
