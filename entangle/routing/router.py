"""The router: a fixed function from a token to the expert it goes to."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.precision import accumulator_dtype, full_precision
from entangle.routing.blocks import rows_per_block
from entangle.routing.hashing import hash_clusters

Kind = Literal["kmeans", "random", "single"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, eq=False)
class RouterStatistics:
    """What the fit found, on the CPU; the two controls have no components and no restarts."""

    tokens_per_cluster: Int64[Tensor, " k"]
    """Tokens of the fit in each cluster, (k,)."""
    explained_variance: Float64[Tensor, " n_components"]
    """Share of the tokens' variance along each component, in [0, 1]."""
    inertia: float
    """Sum of squared distances of the projected tokens to their centroids; NaN for the controls."""
    restart_inertias: Float64[Tensor, " restarts"]
    """Inertia that every restart ended with, (restarts,)."""
    iterations: Int64[Tensor, " restarts"]
    """Lloyd iterations of every restart, (restarts,)."""

    @property
    def effective_clusters(self) -> float:
        """Balance: exp of the entropy of the cluster sizes, from 1 to k (all the same size)."""
        share = self.tokens_per_cluster.double() / self.tokens_per_cluster.sum()
        return float(torch.special.entr(share).sum().exp())


@dataclass(frozen=True, eq=False)
class Router:
    """Sends every token to one of k clusters.

    A ``kmeans`` router projects the token and takes the nearest centroid; the controls ignore where
    the token lies: ``random`` hashes its bits (`entangle.routing.hashing`), ``single`` has one
    cluster.
    """

    kind: Kind
    mean: Float32[Tensor, " features"]
    """Subtracted before the projection, (features,); zero for the controls."""
    components: Float32[Tensor, "n_components features"]
    """Orthonormal rows; none for the controls."""
    centroids: Float32[Tensor, "k n_components"]
    """Centroids in the projected space."""
    hash_key: Int64[Tensor, " hashed"]
    """Multipliers of the hash, (features,) for ``random``, empty otherwise."""
    statistics: RouterStatistics

    @property
    def k(self) -> int:
        """Number of clusters."""
        return self.centroids.shape[0]

    @property
    def features(self) -> int:
        """Width of a token."""
        return self.mean.shape[0]

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors that route a token, as `state` stores them; 0 for one cluster."""
        if self.kind == "single":
            return 0
        tensors: list[Tensor] = [getattr(self, name) for name in _TENSORS]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @torch.no_grad()
    def route(self, x: Float[Tensor, "*batch features"]) -> Int64[Tensor, "*batch"]:
        """Return the cluster of every token.

        The answer for a token does not depend on the tokens beside it: distances are compared in
        float64 (where the device has it), whose rounding decides only exact ties. A token that
        holds NaN gets some cluster, the same every time; nothing is checked here.

        Raises
        ------
        InvalidInput
            If the tokens do not have the router's width.
        """
        if x.ndim < 1 or x.shape[-1] != self.features:
            raise InvalidInput(
                f"`x` must hold tokens of {self.features} features in its last dimension; "
                f"got shape {tuple(x.shape)}."
            )
        if self.kind == "single":
            return torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
        tokens = x.reshape(-1, self.features)
        rows = rows_per_block(self.features, item_bytes=8)
        clusters = torch.cat([self._clusters(part) for part in tokens.split(rows)])
        return clusters.view(x.shape[:-1])

    def to(self, device: torch.device | str) -> "Router":
        """Return the router on another device; the statistics stay on the CPU."""
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        return replace(self, **moved)

    def state(self) -> dict[str, Tensor]:
        """Return everything as tensors by name, for a safetensors file."""
        state = {name: getattr(self, name).contiguous() for name in _TENSORS}
        for name in _STATISTICS:
            state[f"statistics.{name}"] = torch.as_tensor(getattr(self.statistics, name))
        state["statistics.inertia"] = torch.tensor(self.statistics.inertia, dtype=torch.float64)
        state["kind"] = torch.tensor(KINDS.index(self.kind))
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "Router":
        """Rebuild a router from `state`.

        Raises
        ------
        InvalidInput
            If a tensor is missing or the shapes contradict each other.
        """
        _check_state(state)
        statistics = {name: state[f"statistics.{name}"] for name in _STATISTICS}
        return cls(
            kind=KINDS[int(state["kind"])],
            **{name: state[name] for name in _TENSORS},
            statistics=RouterStatistics(inertia=float(state["statistics.inertia"]), **statistics),
        )

    def _clusters(self, tokens: Tensor) -> Tensor:
        if self.kind == "random":
            return hash_clusters(tokens, self.hash_key, k=self.k)
        mean, directions, offset = self._scorer
        with full_precision():
            return torch.addmm(offset, tokens.to(mean.dtype) - mean, directions).argmax(-1)

    @cached_property
    def _scorer(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, ``Pᵀc``, ``−‖c‖²/2``: the nearest c has the largest ``(x − mean)·Pᵀc − ‖c‖²/2``."""
        wide = accumulator_dtype(self.mean.device)
        centroids = self.centroids.to(wide)
        directions = self.components.to(wide).mT @ centroids.mT
        return self.mean.to(wide), directions, -0.5 * centroids.square().sum(1)


_TENSORS = ("mean", "components", "centroids", "hash_key")
_STATISTICS = tuple(f.name for f in fields(RouterStatistics) if f.name != "inertia")


def _check_state(state: Mapping[str, Tensor]) -> None:
    needed = {"kind", "statistics.inertia", *_TENSORS, *(f"statistics.{n}" for n in _STATISTICS)}
    if missing := sorted(needed - state.keys()):
        raise InvalidInput(f"the router's state lacks {', '.join(missing)}; write it again.")
    kind = int(state["kind"])
    if not 0 <= kind < len(KINDS):
        raise InvalidInput(f"the router's kind must be in [0, {len(KINDS)}); got {kind}.")
    for name, ndim in (("mean", 1), ("centroids", 2)):
        if state[name].ndim != ndim:
            raise InvalidInput(
                f"the router's {name} must have {ndim} dimension{'s' * (ndim > 1)}; "
                f"got {state[name].ndim}."
            )
    (features,), (k, dims) = state["mean"].shape, state["centroids"].shape
    expected = {
        "components": (dims, features),
        "hash_key": (features if KINDS[kind] == "random" else 0,),
        "statistics.tokens_per_cluster": (k,),
        "statistics.explained_variance": (dims,),
    }
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise InvalidInput(
                f"the router's {name} must have shape {shape}; got {tuple(state[name].shape)}."
            )
