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
from entangle.stats import bins
from entangle.stats.resampling import resample_on_gpu
from entangle.stats.sketch import SketchResult, place_bins
from entangle.stats.wasserstein import ShapeStatistics, normal_density, sorted_columns, with_flags


def can_measure(outputs: Float[Tensor, "neurons tokens"], *, groups: int) -> bool:
    """Tell whether `measure_rows` takes these outputs: rows that fit into shared memory."""
    return exact.fits(outputs, groups=groups)


@dataclass(frozen=True, eq=False)
class MeasuredRows:
    """What a GPU was asked to measure of some rows, not waited for.

    `entangle.stats.transfer.fetched` brings it to the CPU, where `results` reads it.
    """

    numbers: Float64[Tensor, "fourteen=14 neurons"]
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
        found, what, se, halves, places = self.numbers.split([6, 1, 1, 2, 4])
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
        As `can_measure` wants them.
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
    se, halves = resample_on_gpu(
        histograms.group_counts, histograms.powers, ends.diff().long(), *histograms.ends
    )
    sides = location.double() + scale.double() * histograms.ends.double()
    numbers = [found, what.double()[None], se[None], halves, location[None], scale[None], sides]
    return MeasuredRows(
        numbers=torch.cat([part.double() for part in numbers]),
        counts=bins.fold_counts(histograms.counts, bins.SAVED_FOLD),
        n_tokens=tokens,
    )
