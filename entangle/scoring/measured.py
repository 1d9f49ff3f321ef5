"""What scoring one layer yields, whichever method measured it."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from entangle.models.layers import Layer
from entangle.stats.mapping_difficulty import MappingDifficulty
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
    """Largest possible error of WD through the method, in standard deviations; 0 if exact."""
    method: str
    """``exact`` or ``sketch``."""
