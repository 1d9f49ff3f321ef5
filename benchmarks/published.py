"""The published ways, written from their descriptions, to compare with.

SparseGPT (Frantar and Alistarh, ICML 2023, algorithm 1): one matrix at a time, one column after
another, one threshold over a block of 128 columns of all rows. Wasserstein distance (arXiv
2405.15756, eq. 1): against one normal sample of the same length. Sparse Expansion (algorithms A1
and A2): all activations of a layer in one float32 tensor, a factorisation and a solve for each
expert.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from entangle.experts.clusters import kmeans

Assign = Callable[[str, Tensor], Tensor]
"""From a layer's name and its inputs (tokens, features) to the tokens' clusters."""

BLOCK = 128


def solve(weight: Tensor, gram: Tensor, sparsity: float, *, damping: float = 0.01) -> Tensor:
    """Prune one float32 matrix (rows, cols) by SparseGPT with the block rule."""
    weight, hessian = weight.clone(), gram.clone()
    cols = weight.shape[1]
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    losses = weight.new_zeros(weight.shape[0])
    for start in range(0, cols, BLOCK):
        stop = min(start + BLOCK, cols)
        block, corner = weight[:, start:stop].clone(), factor[start:stop, start:stop]
        saliency = block**2 / corner.diagonal() ** 2
        threshold = saliency.flatten().sort().values[int(saliency.numel() * sparsity)]
        pruned = saliency <= threshold
        errors = torch.zeros_like(block)
        for j in range(stop - start):
            column = block[:, j]
            final = column.clone()
            final[pruned[:, j]] = 0
            error = (column - final) / corner[j, j]
            losses += error**2 / 2
            block[:, j:] -= error[:, None] @ corner[j : j + 1, j:]
            block[:, j], errors[:, j] = final, error
        weight[:, start:stop] = block
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight


def wd(outputs: np.ndarray) -> float:
    """Score one neuron."""
    standardised = (outputs - outputs.mean()) / outputs.std()
    sample = np.random.default_rng().standard_normal(len(outputs))
    return float(wasserstein_distance(standardised, sample))


def _clusters(x: Tensor, experts: int) -> Tensor:
    _, _, components = torch.pca_lowrank(x, q=x.shape[1] // 32)
    return kmeans((x - x.mean(0)) @ components, experts, restarts=10, seed=0).labels


def _recorded(body: torch.nn.Module, layer: torch.nn.Linear, ids: Tensor) -> Tensor:
    """Return the inputs of a layer, (tokens, features), float32."""
    inputs = torch.empty(ids.numel(), layer.in_features, device=ids.device)
    filled = 0

    def keep(_layer: torch.nn.Module, arguments: tuple[Tensor]) -> None:
        nonlocal filled
        rows = arguments[0].flatten(0, -2)
        inputs[filled : filled + len(rows)] = rows
        filled += len(rows)

    hook = layer.register_forward_pre_hook(keep)
    for sequence in ids.split(1):
        body(sequence)
    hook.remove()
    return inputs


def expand_block(
    body: torch.nn.Module,
    mlp: torch.nn.Module,
    ids: Tensor,
    *,
    experts: int,
    sparsity: float,
    assign: Assign | None = None,
) -> tuple[dict[str, list[Tensor]], list[float]]:
    """Return the experts of each layer of a model's only block, and the layers' relative errors.

    ``body`` maps token ids (sequences, tokens) to hidden states. The inputs of gate and up are
    given back before those of down are recorded. Principal components come from torch (randomised),
    k-means from `entangle.experts.clusters` with 10 restarts (published: 100), unless ``assign``
    gives the clusters of the tokens (of the inputs of the layer that it names). The pass through
    the experts, which would feed a next block, is left out, as there is none.
    """
    errors, found = [], dict[str, list[Tensor]]()
    for group in (("gate_proj", "up_proj"), ("down_proj",)):
        x = _recorded(body, getattr(mlp, group[0]), ids)
        labels = _clusters(x, experts) if assign is None else assign(group[0], x)
        for name in group:
            weights, error = _expand_layer(getattr(mlp, name), x, labels, experts, sparsity)
            found[name] = weights
            errors.append(error)
        del x
    return found, errors


def _expand_layer(
    layer: torch.nn.Linear, x: Tensor, labels: Tensor, experts: int, sparsity: float
) -> tuple[list[Tensor], float]:
    """Return a layer's experts and its relative error."""
    weight, weights, lost, energy = layer.weight.float(), [], 0.0, 0.0
    for cluster in range(experts):
        tokens = x[labels == cluster]
        gram = tokens.T @ tokens
        solved = solve(weight, gram, sparsity)
        change = solved - weight
        lost += float(((change @ gram) * change).sum())
        energy += float(((weight @ gram) * weight).sum())
        weights.append(solved.to(layer.weight.dtype))
    return weights, lost / energy
