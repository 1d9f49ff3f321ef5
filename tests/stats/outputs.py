"""Shapes of output distributions for the tests of the sketch, and how to feed and compare it."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from entangle.stats.sketch import OutputSketch, SketchResult

Array = NDArray[np.float64]
MOMENTS = ("mean", "std", "skewness", "excess_kurtosis")

SMOOTH: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "t3": lambda rng, n: rng.standard_t(3, n),
    "skewed": lambda rng, n: rng.exponential(size=n) - 3,
    "bimodal": lambda rng, n: rng.standard_normal(n) + np.where(rng.random(n) < 0.3, -4, 4),
    "offset": lambda rng, n: 50 + 0.01 * rng.standard_normal(n),
    "outliers": lambda rng, n: rng.standard_normal(n) * np.where(rng.random(n) < 1e-3, 3000, 1),
}
ROUGH: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "two atoms": lambda rng, n: np.where(rng.random(n) < 0.5, -1.0, 1.0),
    "lattice": lambda rng, n: np.round(2 * rng.standard_normal(n)),
    "constant and one outlier": lambda rng, n: np.where(np.arange(n) == n - 1, 1.0, 0.0),
    "far atoms": lambda rng, n: np.where(rng.random(n) < 0.2, 1e6, 0.0),
    "core and far atom": lambda rng, n: np.where(rng.random(n) < 0.2, 1e6, rng.random(n)),
    "log-normal": lambda rng, n: np.exp(3 * rng.standard_normal(n)),
    "narrow pilot": lambda rng, n: rng.standard_normal(n) * np.where(np.arange(n) < 600, 1e-5, 1),
    "constant pilot": lambda rng, n: np.where(
        np.arange(n) < 3 * n // 4, 0.0, 1e5 * rng.standard_normal(n)
    ),
    "constant pilot, two far atoms": lambda rng, n: np.where(
        np.arange(n) < 600, 5.0, np.where(rng.random(n) < 0.9, 3.0, 10.0)
    ),
}


def columns(shapes: dict[str, Callable[[np.random.Generator, int], Array]], n: int) -> Tensor:
    """Return one column a shape, float32, of shape (tokens, neurons)."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([make(rng, n) for make in shapes.values()], axis=1)).float()


def sketched(outputs: Tensor, *, chunk: int = 1000) -> SketchResult:
    made = OutputSketch(outputs.shape[1])
    for part in outputs.split(chunk):
        made.update(part)
    return made.result()


def grouped(outputs: Tensor, groups: list[int], *, n_groups: int = 8) -> OutputSketch:
    """Feed as many equal chunks as there are entries in ``groups``."""
    made = OutputSketch(outputs.shape[1], n_groups=n_groups)
    for part, group in zip(outputs.tensor_split(len(groups)), groups, strict=True):
        made.update(part, group=group)
    return made


def assert_same(a: SketchResult, b: SketchResult, *, tol: float) -> None:
    """Counts and extremes exactly, everything else to rounding."""
    assert a.n_tokens == b.n_tokens
    for name in ("counts", "location", "scale", "low", "high"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("wd_bound", "wd_se", "wd_halves"):
        torch.testing.assert_close(
            getattr(a, name), getattr(b, name), rtol=tol, atol=tol, equal_nan=True, msg=name
        )
    each = [one.wd_without[~one.wd_without.isnan().all(1)] for one in (a, b)]  # groups in use
    torch.testing.assert_close(*each, rtol=tol, atol=tol, equal_nan=True)
    for name in ("wd", "ks", *MOMENTS[1:]):
        torch.testing.assert_close(
            getattr(a.shape, name), getattr(b.shape, name), rtol=tol, atol=tol, equal_nan=True
        )
    torch.testing.assert_close(
        (a.shape.mean - b.shape.mean) / b.shape.std, 0 * b.shape.std, atol=tol, rtol=0,
        equal_nan=True,
    )  # fmt: skip
    for name in ("constant", "nan", "inf"):
        assert torch.equal(getattr(a.shape, name), getattr(b.shape, name)), name
