"""Routed outputs one token at a time, and what is measured on them, in plain loops."""

import numpy as np
from numpy.typing import NDArray

from tests.reference.wasserstein import standardised, w1_by_quadrature

Array = NDArray[np.float64]


def routed_outputs(tokens: Array, clusters: list[int], experts: Array, bias: Array | None) -> Array:
    """Return (tokens, rows): every token through the rows of its own expert."""
    outputs = np.zeros((len(tokens), experts.shape[1]))
    for t, token in enumerate(tokens):
        for r, row in enumerate(experts[clusters[t]]):
            outputs[t, r] = float(np.dot(row, token)) + (0.0 if bias is None else bias[r])
    return outputs


def weighted_wd(outputs: Array, clusters: list[int]) -> float:
    """Return Σ n_c/n · WD of one neuron's outputs inside cluster c."""
    total = 0.0
    for cluster in sorted(set(clusters)):
        own = np.array([y for y, c in zip(outputs, clusters, strict=True) if c == cluster])
        if len(own) > 1 and own.min() < own.max():
            total += len(own) / len(outputs) * w1_by_quadrature(np.sort(standardised(own)))
    return total
