"""All that the exact method measures of rows of outputs, in one pass over them on an NVIDIA GPU.

The plain version is `entangle.stats.wasserstein.shape_statistics` with an
`entangle.stats.sketch.OutputSketch` of the same outputs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int32
from torch import Tensor

from entangle.kernels import exact
from entangle.stats.bins import fold_counts, resampled
from entangle.stats.edges import SAVED_FOLD
from entangle.stats.sketch import SketchResult, place_bins
from entangle.stats.wasserstein import ShapeStatistics, normal_density, sorted_columns, with_flags


@dataclass(frozen=True, eq=False)
class MeasuredRows:
    """What a GPU was asked to measure of some rows, not waited for.

    `entangle.stats.bins.fetched` brings it to the CPU, where `results` reads it.
    """

    numbers: Float64[Tensor, "numbers neurons"]
    counts: Int32[Tensor, "neurons bins"]
    n_tokens: int

    def results(
        self, outputs: Float[Tensor, "neurons tokens"]
    ) -> tuple[ShapeStatistics, SketchResult]:
        """Return the statistics of the rows.

        Parameters
        ----------
        outputs
            The rows, still on the GPU: what the kernel does not sort is measured here.

        Returns
        -------
        shape : ShapeStatistics
            As of `entangle.stats.wasserstein.shape_statistics`, on the CPU.
        sketch : SketchResult
            Its ``wd_bound`` is NaN, its ``shape`` is the one above.
        """
        found, what, se, halves, places, without = self.numbers.tensor_split([6, 7, 8, 10, 14])
        kind = what[0].to(torch.uint8)
        crowded = (kind == exact.CROWDED).nonzero()[:, 0]
        if len(crowded):
            found[:, crowded] = sorted_columns(outputs[crowded.to(outputs.device)]).cpu()
        shape = with_flags(
            list(found), kind == exact.NAN, kind == exact.INFINITE, kind == exact.EQUAL,
            outputs.dtype,
        )  # fmt: skip
        bad = shape.nan | shape.inf | shape.constant
        return shape, SketchResult(
            shape=shape,
            wd_bound=torch.full_like(se[0], math.nan),
            wd_se=se[0].masked_fill(bad, math.nan),
            wd_halves=halves.masked_fill(bad, math.nan),
            wd_without=without.masked_fill(bad, math.nan),
            counts=self.counts,
            location=places[0],
            scale=places[1],
            low=places[2],
            high=places[3],
            n_tokens=self.n_tokens,
        )


def measure_rows(outputs: Float[Tensor, "neurons tokens"], bounds: Sequence[int]) -> MeasuredRows:
    """Measure the outputs of some neurons, float32, on a GPU.

    Parameters
    ----------
    outputs
        As `entangle.kernels.exact.fits` wants them.
    bounds
        Tokens ``bounds[g]`` to ``bounds[g + 1]`` are group g of the jackknife; the first group that
        is not empty places the bins.

    Returns
    -------
    MeasuredRows
        On the GPU, not waited for.
    """
    device, tokens = outputs.device, outputs.shape[1]
    filled = next(g for g in range(len(bounds) - 1) if bounds[g] < bounds[g + 1])
    location, scale = place_bins(outputs.t()[bounds[filled] : bounds[filled + 1]])
    ends = torch.tensor(bounds, dtype=torch.int32)
    found, what, histograms = exact.row_statistics(
        outputs, location, scale, density=normal_density(tokens, device),
        bounds=ends.to(device, non_blocking=True),
    )  # fmt: skip
    assert histograms is not None  # noqa: S101
    se, halves, without = resampled(
        histograms.group_counts, histograms.powers, ends.diff().long(), *histograms.ends
    )
    sides = location.double() + scale.double() * histograms.ends.double()
    numbers = [found, what.double()[None], se[None], halves, location[None], scale[None], sides]
    return MeasuredRows(
        numbers=torch.cat([part.double() for part in [*numbers, without]]),
        counts=fold_counts(histograms.counts, SAVED_FOLD),
        n_tokens=tokens,
    )
