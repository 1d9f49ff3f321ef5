"""What sparse experts do to a layer's neurons: outputs, pairs, clusters, modes, in tidy tables."""

from entangle.decomposition.decompose import decompose
from entangle.decomposition.result import Decomposition, load_decomposition

__all__ = ["Decomposition", "decompose", "load_decomposition"]
