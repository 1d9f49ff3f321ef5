"""AlphaPruning: layers with heavier-tailed spectra are less sparse."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from entangle.allocation.budget import Wish
from entangle.allocation.request import Request, min_max
from entangle.allocation.rows import Reals
from entangle.checks import share
from entangle.errors import NumericalError
from entangle.models.layers import Layer

_BINS = 100
_CHUNK = 2**24  # entries of a table of candidates against eigenvalues


def alphapruning(request: Request) -> Wish:
    """Set each block's sparsity by the mean power-law exponent of its layers' spectra.

    Exponents (`power_law_exponent`) are averaged over the layers of a block, scaled linearly to
    [1 − ε, 1 + ε] with ε = ``strength`` (0.3 by default), and multiplied by the one factor that
    makes the weighted mean the sparsity asked for. A large exponent (a light tail) is pruned more.
    Needs the weights only.

    References
    ----------
    Lu et al., "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise
    Pruning of Large Language Models", NeurIPS 2024, arXiv 2410.10912; rule as ``ww_sparsity`` in
    ``lib/prune.py`` of github.com/haiquanlu/AlphaPruning, block-wise.
    """
    rows, measured = request.rows, request.measurements()
    spread = request.settings.strength
    spread = share("strength", spread, one=False)
    exponents = measured.once("alpha", lambda: np.array([_exponent(x) for x in measured.layers]))
    counts = np.bincount(rows.groups)
    means = np.bincount(rows.groups, weights=exponents) / counts
    shape: Reals = (1 - spread + 2 * spread * min_max(means[rows.groups])).astype(np.float64)
    scaled = shape * request.settings.sparsity
    return request.wish(scaled, gain=shape)


def _exponent(layer: Layer) -> float:
    try:
        return power_law_exponent(layer.weight)
    except NumericalError as error:
        raise NumericalError(f"{layer.name}: {error}") from error


def power_law_exponent(weight: Float[Tensor, "rows cols"]) -> float:
    """Estimate the exponent of the power law that the tail of a weight's spectrum follows.

    The eigenvalues of ``W Wᵀ`` above a lower end ``x_min`` give, by Hill's estimator,
    ``α = 1 + n / Σ log(λ_i / x_min)``. The lower end is the eigenvalue whose tail lies closest to
    its power law in Kolmogorov–Smirnov distance, among those up to 1.5 times the most frequent
    eigenvalue (the left edge of the fullest of 100 bins in log10 λ) and, as in the published code,
    above the *logarithm* of 0.95 times it. Eigenvalues that vanish in float32 are left out.

    Raises
    ------
    NumericalError
        If fewer than two eigenvalues differ from zero.

    References
    ----------
    ``net_esd_estimator`` with ``xmin_peak`` in ``lib/esd_utils.py`` of
    github.com/haiquanlu/AlphaPruning.
    """
    eigenvalues = _spectrum(weight)
    if len(eigenvalues) < 2 or float(eigenvalues[0]) == float(eigenvalues[-1]):
        raise NumericalError(
            f"a weight of shape {tuple(weight.shape)} has fewer than two different eigenvalues, so "
            "its spectrum has no tail; leave the layer out or choose another rule."
        )
    tried = _candidates(eigenvalues)
    logs = eigenvalues.log()
    tails = logs.flip(0).cumsum(0).flip(0)
    best, exponent = np.inf, np.nan
    for part in tried.split(max(1, _CHUNK // len(eigenvalues))):
        size = len(eigenvalues) - part
        alpha = 1 + size / (tails[part] - size * logs[part])
        distance = _distances(logs, part, alpha).where(alpha > 1, 1.0)
        found = int(distance.argmin())
        if float(distance[found]) < best:
            best, exponent = float(distance[found]), float(alpha[found])
    return exponent


def _spectrum(weight: Float[Tensor, "rows cols"]) -> Float[Tensor, " n"]:
    """Return the eigenvalues of ``W Wᵀ`` that do not vanish, ascending, float64 on the CPU."""
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device
    wide = weight.to(device, torch.float64)
    wide = wide if wide.shape[0] <= wide.shape[1] else wide.T
    found: Tensor = torch.linalg.eigvalsh(wide @ wide.T).cpu()
    smallest = torch.finfo(torch.float32).eps ** 2 * found[-1]
    return found[found > smallest]


def _candidates(eigenvalues: Float[Tensor, " n"]) -> Tensor:
    """Return the indices of the eigenvalues to try as lower end, all but the last at most."""
    logs = eigenvalues.log10()
    counts = torch.histc(logs, _BINS, min=float(logs[0]), max=float(logs[-1]))
    edges = torch.linspace(float(logs[0]), float(logs[-1]), _BINS + 1, dtype=logs.dtype)
    peak = 10 ** float(edges[int(counts.argmax())])
    inside = (eigenvalues >= np.log10(0.95 * peak)) & (eigenvalues <= 1.5 * peak)
    inside[-1] = False
    found = inside.nonzero()[:, 0]
    return found if len(found) else torch.arange(1)


def _distances(
    logs: Float[Tensor, " n"], first: Tensor, alpha: Float[Tensor, " m"]
) -> Float[Tensor, " m"]:
    """Return the largest gap between each tail's distribution and its power law."""
    index = torch.arange(len(logs))
    size = len(logs) - first
    law = 1 - torch.exp((logs - logs[first, None]) * (1 - alpha)[:, None])
    seen = (index - first[:, None]) / size[:, None]
    return (law - seen).abs().masked_fill(index < first[:, None], 0.0).amax(1)
