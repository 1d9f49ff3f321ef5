"""TRIM: sparsities of rows, moved towards those whose outputs survive."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from entangle.allocation.budget import Wish
from entangle.allocation.request import Request
from entangle.precision import accumulator_dtype, full_precision

CEILING = 0.95
"""No row is made sparser than this, unless its layer is."""
_RATES = (0.01, 0.02, 0.04, 0.08, 0.12, 0.16)
_BACKWARD_RATES = (-0.01, -0.02, -0.04)
_STEPS = 10


def trim(request: Request) -> Wish:
    """Give more zeros to neurons whose outputs keep their direction best.

    For each layer by itself (see `trim_rows`), starting from the layer's sparsity. Similarities of
    outputs are quadratic forms in the layer's Gram matrix ``XᵀX``, so that one pass over the
    calibration set serves all steps. Inputs are those of the dense model; the published code takes
    them from the blocks pruned so far.

    References
    ----------
    Beck, Rudman, Eickhoff, "TRIM: Achieving Extreme Sparsity with Targeted Row-wise Iterative
    Metric-driven Pruning", arXiv 2505.16743; rule as in ``lib/trim.py`` of github.com/flobk/TRIM
    with its default metrics.
    """
    rows, measured = request.rows, request.measurements()
    base = request.base
    target = dict(zip(rows.names, base[rows.starts].tolist(), strict=True))
    found: dict[str, Tensor] = {}
    for layers, gram in measured.grams():
        for layer in layers:
            found[layer.name] = trim_rows(layer.weight, gram.gram, target[layer.name])
    wish = request.wish(rows.join(found))
    return request.limit(wish, np.zeros_like(base), np.maximum(CEILING, base))


def trim_rows(
    weight: Float[Tensor, "rows cols"], gram: Float[Tensor, "cols cols"], target: float
) -> Float[Tensor, " rows"]:
    """Return a sparsity for every row of one layer, with mean ``target``.

    From uniform sparsity, 10 steps are made: row d moves by
    ``2 · rate · (minmax(q_d) − mean of minmax(q))``, with q_d the cosine similarity of its dense
    and pruned outputs; then rows are clipped to [0, 0.95] and recentred. The step with the largest
    similarity of the layer's whole output is kept. Rates grow from 0.01 to 0.16 while that helps;
    where none helps, negative ones are tried. Rows are pruned by Wanda.

    Parameters
    ----------
    weight
        Dense weight.
    gram
        ``XᵀX`` of the layer's inputs.
    target
        Mean sparsity of the rows.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with full_precision():
        problem = _Problem.of(weight.to(dtype), gram.to(dtype))
        wide = accumulator_dtype(weight.device)
        start = torch.full((len(weight),), target, dtype=wide, device=weight.device)
        baseline = problem.similarity(start)[1]
        for rates in (_RATES, _BACKWARD_RATES):
            best, quality = start, baseline
            reached = -np.inf
            for rate in rates:
                tried, similarity = _walk(problem, start, rate)
                if similarity > quality:
                    best, quality = tried, similarity
                if similarity <= reached:
                    break
                reached = similarity
            if quality > baseline:
                break
    return best


def _walk(
    problem: "_Problem", start: Float[Tensor, " rows"], rate: float
) -> tuple[Float[Tensor, " rows"], float]:
    """Make the steps of one rate; return the best sparsities met and their quality."""
    target = start.mean()
    sparsity = start
    rows, quality = problem.similarity(start)
    best = start
    for _ in range(_STEPS):
        low, high = rows.aminmax()
        moved = 2 * rate * (rows - low) / (high - low + 1e-6)
        sparsity = (sparsity + moved - moved.mean()).clamp(0, CEILING)
        sparsity = sparsity - sparsity.mean() + target
        rows, similarity = problem.similarity(sparsity)
        if similarity > quality:
            best, quality = sparsity, similarity
    return best, quality


@dataclass(frozen=True, eq=False)
class _Problem:
    """A layer, its Gram matrix, and the order in which Wanda prunes its weights."""

    weight: Float[Tensor, "rows cols"]
    gram: Float[Tensor, "cols cols"]
    place: Int[Tensor, "rows cols"]
    """Place of each weight in its row, the least salient first."""
    product: Float[Tensor, "rows cols"]
    """``W G``."""
    energy: Float[Tensor, " rows"]
    """Squared norm of each row's output."""

    @classmethod
    def of(cls, weight: Float[Tensor, "rows cols"], gram: Float[Tensor, "cols cols"]) -> "_Problem":
        saliency = weight.abs() * gram.diagonal().sqrt()
        order = saliency.sort(dim=-1, stable=True).indices
        place = torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device)
        places = torch.empty_like(order, dtype=torch.int32)
        places.scatter_(1, order, place.expand_as(places))
        product = weight @ gram
        wide = accumulator_dtype(weight.device)
        return cls(weight, gram, places, product, (product * weight).sum(1, dtype=wide))

    def similarity(self, sparsity: Float[Tensor, " rows"]) -> tuple[Float[Tensor, " rows"], float]:
        """Return the cosine similarity of each row's outputs, and that of all together."""
        count = (sparsity * self.weight.shape[1]).long()
        kept = self.weight.masked_fill(self.place < count[:, None], 0)
        wide = self.energy.dtype
        cross = (self.product * kept).sum(1, dtype=wide)
        energy = ((kept @ self.gram) * kept).sum(1, dtype=wide)
        rows = _cosine(cross, self.energy, energy)
        return rows, float(_cosine(cross.sum(), self.energy.sum(), energy.sum()))


def _cosine(cross: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return ``cross / √(first · second)`` in [-1, 1]; 0 where an output vanishes."""
    norm = (first.clamp(min=0) * second.clamp(min=0)).sqrt()
    return torch.where(norm > 0, cross / norm, 0.0).clamp(-1, 1)
