"""What scoring one layer yields, whichever method measured it."""

import math
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from entangle.models.layers import Layer
from entangle.stats.mapping_difficulty import MappingDifficulty
from entangle.stats.rounding import OutputError, judged, wd_error
from entangle.stats.sketch import SketchResult
from entangle.stats.wasserstein import ShapeStatistics


@dataclass(frozen=True, eq=False)
class MeasuredLayer:
    """Statistics of one layer, before they become rows of tables."""

    layer: Layer
    """The layer measured."""
    shape: ShapeStatistics
    """Distances and moments of every neuron."""
    sketch: SketchResult
    """Standard errors, halves and histograms."""
    pairs: MappingDifficulty | None
    """Pair statistics, None if they were not asked for."""
    wd_bound: Float[Tensor, " neurons"]
    """Largest possible error of WD through the method, in standard deviations, without the
    rounding of the outputs; 0 if exact."""
    method: str
    """``exact`` or ``sketch``."""
    rounding: OutputError
    """Rounding of the outputs that were measured."""

    def judged(self) -> "MeasuredLayer":
        """Hold the statistics against the rounding of the outputs.

        Neurons whose outputs vary by no more than it are constant, and have no WD, standard error
        or mapping difficulty; the bound of the others' WD grows by what it can do to them.
        """
        shape = judged(self.shape, self.rounding.bound)
        bad = shape.constant | shape.nan | shape.inf
        bound = self.wd_bound + wd_error(self.rounding.bound, shape.std)
        pairs = self.pairs
        if pairs is not None:
            pairs = replace(pairs, slope=pairs.slope.masked_fill(bad, math.nan))
        sketch = replace(
            self.sketch,
            shape=shape,
            wd_se=self.sketch.wd_se.masked_fill(bad, math.nan),
            wd_halves=self.sketch.wd_halves.masked_fill(bad, math.nan),
        )
        return replace(self, shape=shape, sketch=sketch, pairs=pairs, wd_bound=bound)
