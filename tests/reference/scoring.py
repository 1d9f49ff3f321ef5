"""Scores of neurons by slow, obvious means: one sequence at a time, one neuron at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]


def inputs_and_outputs(
    module: nn.Module, names: Sequence[str], ids: Tensor
) -> dict[str, tuple[Matrix, Matrix]]:
    """Return what goes into and comes out of layers: (tokens, in) and (tokens, out)."""
    kept: dict[str, tuple[list[Matrix], list[Matrix]]] = {name: ([], []) for name in names}

    def keep(name: str, args: tuple[Any, ...], output: Tensor) -> None:
        for store, tensor in zip(kept[name], (args[0], output), strict=True):
            rows = tensor.reshape(-1, tensor.shape[-1])
            store.append(rows.to(torch.float64).numpy().copy())

    handles = [
        module.get_submodule(name).register_forward_hook(
            lambda _module, args, output, name=name: keep(name, args, output)
        )
        for name in names
    ]
    with torch.no_grad():
        for sequence in ids:
            module(sequence[None])
    for handle in handles:
        handle.remove()
    return {name: (np.concatenate(x), np.concatenate(y)) for name, (x, y) in kept.items()}


def wasserstein(y: Vector) -> float:
    """Integrate |F_n − Φ| of the standardised outputs numerically, piece by piece."""
    z = np.sort((y - y.mean()) / y.std())
    levels = np.arange(len(z) + 1) / len(z)
    edges = np.array([-12.0, *z, 12.0])
    crossing = stats.norm.ppf(levels).clip(edges[:-1], edges[1:])  # where F_n meets Φ
    nodes, weights = np.polynomial.legendre.leggauss(40)
    total = 0.0
    for low, high in ((edges[:-1], crossing), (crossing, edges[1:])):
        half = (high - low)[:, None] / 2
        points = low[:, None] + half * (1 + nodes)
        gap = np.abs(levels[:, None] - stats.norm.cdf(points))
        total += float((gap * weights * half).sum())
    return total


def neuron_scores(y: Vector) -> dict[str, float]:
    """Return the distances and moments of one neuron's outputs."""
    z = (y - y.mean()) / y.std()
    return {
        "wd": wasserstein(y),
        "ks": float(stats.kstest(z, "norm").statistic),
        "mean": float(y.mean()),
        "std": float(y.std()),
        "skewness": float(stats.skew(y)),
        "excess_kurtosis": float(stats.kurtosis(y)),
    }


def mapping_difficulty(
    x: Matrix,
    y: Vector,
    pairs: Sequence[Sequence[int]],
    output_norm: Callable[[Sequence[float]], Any] = np.median,
) -> float:
    """Return MD, N_x being the maximum, with pairs of identical inputs left out."""
    dx, dy = [], []
    for a, b in pairs:
        distance = float(np.sqrt(sum((x[a] - x[b]) ** 2)))
        if distance > 0:
            dx.append(distance)
            dy.append(abs(float(y[a] - y[b])))
    n_x, n_y = max(dx), float(output_norm(dy))
    return float(np.mean([(v / n_y) / (u / n_x) for u, v in zip(dx, dy, strict=True)]))


def jackknife(y: Vector, groups: Sequence[range]) -> float:
    """Return the standard error of WD by leaving out one group of tokens at a time."""
    without = [wasserstein(np.delete(y, list(group))) for group in groups]
    spread = sum((value - np.mean(without)) ** 2 for value in without)
    return float(np.sqrt((len(groups) - 1) / len(groups) * spread))


def weight_rows(module: nn.Module, name: str, *, transposed: bool) -> Matrix:
    """Return one row a neuron."""
    weight = module.get_submodule(name).get_parameter("weight").detach().double().numpy()
    return weight.T if transposed else weight
