"""The router: a fixed function from a token to the expert it goes to.

It is fitted on a stream of tokens that is never held at full width: principal components, then
k-means on the projected tokens (Sparse Expansion, arXiv 2405.15756, algorithm A1).

The control of random clusters must give each token a cluster that says nothing about where the
token lies, and the same vector the same cluster every time. A random projection or a hyperplane
code would keep neighbours together; a draw per token would not be repeatable. A keyed hash of the
token's float32 bits does both: one flipped bit of one feature gives an unrelated cluster. Clusters
are equally likely, so their sizes over distinct tokens are binomial, n/k with a standard deviation
of √(n/k · (1 − 1/k)).

Its weakness: it sees bits, not values. A token computed again in another batch shape, dtype or
machine usually differs in its last bits and then goes to another cluster, so the experts' own
calibration tokens reach them again only where the activations are reproduced exactly. And tokens
that are the same vector (the first token of every sequence) stay together.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from entangle.checks import choice, whole
from entangle.doors import Door
from entangle.errors import InvalidInput
from entangle.experts.clusters import kmeans
from entangle.experts.own_router import MAX_TOKENS, OwnRouter, as_centroids, scores_of
from entangle.experts.pca import Pca, fit_pca
from entangle.memory import by_device
from entangle.packed.routing import PackedRouter, hash_clusters
from entangle.precision import accumulator_dtype, exact_in_half, full_precision
from entangle.seeding import check_seed, numpy_rng
from entangle.stats.gram import require_finite

BLOCK_BYTES = 2**26
"""Size of a block of float32 tokens."""
BLOCK_TOKENS = 2**15
"""Most tokens of a block, but on a GPU: a block of few features would hold a whole text."""
_BLOCK_BYTES_GPU = 2**28
_CPU = torch.device("cpu")


def fixed_blocks(
    stream: Iterable[Tensor], *, device: torch.device | None = None
) -> Iterator[Float[Tensor, "tokens features"]]:
    """Yield the tokens of ``stream`` in order, in float32 blocks of one size (the last is shorter).

    Sums over the blocks are then the same to the bit for any chunking of the same tokens. On a GPU
    16-bit tokens stay as they are.

    Parameters
    ----------
    stream
        Chunks of shape (tokens, features) of a floating dtype, all of one width.
    device
        Where the blocks live; by default where the chunks do.

    Raises
    ------
    InvalidInput
        If a chunk has another shape or dtype, or there is no token at all.
    """
    pending: list[Tensor] = []
    held, features, empty = 0, None, True
    for chunk in stream:
        features = _width(chunk, features)
        target = torch.device(device or chunk.device)
        size = rows_per_block(features, device=target)
        rest = chunk
        while rest.shape[0]:
            empty = False
            piece, rest = rest[: size - held], rest[size - held :]
            as_is = exact_in_half(chunk.dtype, target)
            pending.append(piece.detach().to(target, chunk.dtype if as_is else torch.float32))
            held += piece.shape[0]
            if held == size:
                whole, pending, held = torch.cat(pending), [], 0
                del piece  # what is put together is not held twice
                yield whole
                del whole
    if empty:
        raise InvalidInput("`stream` must give at least one token; it is empty.")
    if held:
        yield torch.cat(pending)


def rows_per_block(features: int, *, item_bytes: int = 4, device: torch.device = _CPU) -> int:
    """Return how many tokens of this width fit in a block, at least one."""
    size = by_device(device, cpu=BLOCK_BYTES, gpu=_BLOCK_BYTES_GPU)
    rows = max(1, size // (item_bytes * max(features, 1)))
    return min(rows, by_device(device, cpu=BLOCK_TOKENS, gpu=rows))


def _width(chunk: Tensor, expected: int | None) -> int:
    if not isinstance(chunk, Tensor):
        raise InvalidInput(f"`stream` must give tensors; got {type(chunk).__name__}.")
    if chunk.ndim != 2 or chunk.shape[1] < 1 or not chunk.dtype.is_floating_point:
        raise InvalidInput(
            f"`stream` must give floating-point chunks of shape (tokens, features); "
            f"got {chunk.dtype} of shape {tuple(chunk.shape)}."
        )
    if expected is not None and chunk.shape[1] != expected:
        raise InvalidInput(
            f"`stream` must give chunks of one width; got {expected} and {chunk.shape[1]} features."
        )
    return chunk.shape[1]


def hash_key(features: int, *, seed: int) -> Int64[Tensor, " features"]:
    """Draw the odd 64-bit multipliers of the hash, one per feature."""
    rng = numpy_rng(seed, "routing", "hash")
    return torch.from_numpy(rng.integers(-(2**63), 2**63, size=features) | 1)


Kind = str
"""Name of a router: one of `ROUTERS`, or ``single``."""
KINDS: tuple[Kind, ...] = ("kmeans", "random", "single")
"""Ways to find a token's cluster: the nearest centroid, a hash, or none."""


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
    the token lies: ``random`` hashes its bits (`entangle.experts.router`), ``single`` has one
    cluster.
    """

    kind: Kind
    """One of `KINDS`: routers of one's own have centroids too."""
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
        """Bytes of the tensors that route a token (`folded`); 0 for one cluster."""
        if self.kind == "single":
            return 0
        numbers = self.features + self.k * (self.features + 1)
        return 8 * self.features if self.kind == "random" else 4 * numbers

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

    def folded(self) -> PackedRouter | None:
        """Return the router as it runs beside packed experts; None for a single cluster.

        Scores are worked out in float64 and rounded once to float32.
        """
        if self.kind == "single":
            return None
        made = PackedRouter(self.kind, self.k, self.features)
        if self.kind == "random":
            made.key.copy_(self.hash_key)
        else:
            mean, directions, offset = self._scorer
            made.mean.copy_(mean)
            made.directions.copy_(directions.mT)
            made.offset.copy_(offset)
        return made

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


Blocks = Callable[[], Iterator[Float[Tensor, "_ _"]]]
_MAX_TOKENS = 2**19


def fit_router(
    stream: Iterable[Tensor],
    k: int,
    *,
    seed: int,
    kind: Kind = "kmeans",
    n_components: int | None = None,
    restarts: int = 10,
    max_tokens: int = _MAX_TOKENS,
    device: torch.device | str | None = None,
) -> Router:
    """Fit a router to k clusters.

    The stream is read twice, for the mean and covariance and for the projections, of which
    tokens × n_components numbers are held; a control reads it once. The same tokens give the same
    bytes however they are chunked.

    Parameters
    ----------
    stream
        Chunks of shape (tokens, features), readable more than once: a list, or any object whose
        ``__iter__`` starts again.
    k
        Number of clusters; 1 for ``kind="single"``.
    seed
        Seed of the k-means++ draws, of the hash, and of the subsample.
    kind
        One of `ROUTERS`, such as ``"kmeans"`` or the control ``"random"``, which knows nothing of
        where a token lies; or ``"single"``.
    n_components
        Principal components; by default ``features // 32``, at least 1.
    restarts
        k-means seedings, of which the best is kept. The authors' code runs 100. On the MLP inputs
        of SmolLM2-135M's second block (32 768 tokens, 18 components, k = 16) the mean inertia of
        one restart lies 5.7 % above the best of 300, the best of 10 lies 1.3 % above it, of 20
        0.8 %, of 100 0.2 %.
    max_tokens
        k-means sees at most this many tokens, drawn without replacement from a longer stream.
    device
        Where the fit runs and the router lives; by default where the chunks are.

    Raises
    ------
    InvalidInput
        If a parameter is out of range, the stream cannot be read twice, or fewer than k tokens
        differ.
    NumericalError
        If a token holds NaN or infinity.
    """
    return fit_router_and_labels(
        stream, k, seed=seed, kind=kind, n_components=n_components, restarts=restarts,
        max_tokens=max_tokens, device=device,
    )[0]  # fmt: skip


def fit_router_and_labels(
    stream: Iterable[Tensor],
    k: int,
    *,
    seed: int,
    kind: Kind = "kmeans",
    n_components: int | None = None,
    restarts: int = 10,
    max_tokens: int = _MAX_TOKENS,
    device: torch.device | str | None = None,
) -> tuple[Router, Int64[Tensor, " tokens"] | None]:
    """Fit a router as `fit_router` does, and keep the clusters of the tokens it was fitted on.

    Parameters and errors are those of `fit_router`.

    Returns
    -------
    tuple
        The router, and the cluster of every token in the order of the stream, on the device of the
        fit. They are those of ``router.route``, except where two centroids are equally far to
        float32's rounding. None where the fit saw only some of the tokens, and for a control: route
        the tokens then.
    """
    k, restarts = whole("k", k, least=1), whole("restarts", restarts, least=1)
    if n_components is not None:
        n_components = whole("n_components", n_components, least=1)
    _check_parameters(k, max_tokens, kind)
    if isinstance(stream, Iterator):
        raise InvalidInput(
            "`stream` must be readable more than once; got an iterator: pass a list of chunks."
        )
    target = None if device is None else torch.device(device)
    blocks = partial(fixed_blocks, stream, device=target)
    with torch.no_grad():
        if kind == "single":
            return _fit_control(blocks, k, check_seed(seed), kind), None
        fitter = ROUTERS[kind]
        return fitter(
            blocks, k, check_seed(seed), n_components=n_components, restarts=restarts,
            max_tokens=max_tokens,
        )  # fmt: skip


def _fit_own(
    name: str, function: OwnRouter, blocks: Blocks, k: int, seed: int, *, max_tokens: int,
    **_settings: object,
) -> tuple[Router, Tensor | None]:  # fmt: skip
    """Fit a router of somebody's own on some of the tokens, and count those of its clusters."""
    total = sum(len(block) for block in blocks())
    most = min(total, max_tokens, MAX_TOKENS)
    keep = torch.zeros(total, dtype=torch.bool)
    rng = numpy_rng(seed, "routing", "own")
    keep[torch.from_numpy(rng.choice(total, size=most, replace=False))] = True
    pieces, start = [], 0
    for block in blocks():
        require_finite(block)
        pieces.append(block[keep[start : start + len(block)].to(block.device)].float())
        start += len(block)
    directions, offsets = scores_of(name, function, torch.cat(pieces), k, seed)
    components, centroids = as_centroids(directions, offsets)
    made = _control(directions.shape[1], k, seed, "single").to(directions.device)
    made = replace(made, kind="kmeans", components=components, centroids=centroids)
    nothing = torch.zeros(len(components), dtype=torch.float64)
    router = replace(made, statistics=replace(made.statistics, explained_variance=nothing))
    return _counted(router, blocks()), None


def _counted(router: Router, blocks: Iterable[Tensor]) -> Router:
    """Return a router with the tokens of its clusters counted."""
    count = torch.zeros(router.k, dtype=torch.int64)
    for block in blocks:
        require_finite(block)
        count += torch.bincount(router.route(block).flatten(), minlength=router.k).cpu()
    return replace(router, statistics=replace(router.statistics, tokens_per_cluster=count))


def _fit_kmeans(
    blocks: Blocks, k: int, seed: int, *, n_components: int | None, restarts: int, max_tokens: int
) -> tuple[Router, Tensor | None]:
    pca = fit_pca(blocks(), n_components)
    if k > pca.tokens:
        raise InvalidInput(f"`k` must be at most the number of tokens, {pca.tokens}; got {k}.")
    points = _projected(blocks, pca, max_tokens, seed)
    found = kmeans(points, k, restarts=restarts, seed=seed)
    router = Router(
        kind="kmeans",
        mean=pca.mean,
        components=pca.components,
        centroids=found.centroids,
        hash_key=torch.zeros(0, dtype=torch.int64, device=pca.mean.device),
        statistics=RouterStatistics(
            tokens_per_cluster=torch.bincount(found.labels, minlength=k).cpu(),
            explained_variance=pca.explained,
            inertia=found.inertia,
            restart_inertias=found.restart_inertias,
            iterations=found.iterations,
        ),
    )
    return router, found.labels if pca.tokens <= max_tokens else None


def _projected(blocks: Blocks, pca: Pca, max_tokens: int, seed: int) -> Float32[Tensor, "_ _"]:
    """Project all tokens, or a random subset in the order of the stream."""
    keep = None
    if pca.tokens > max_tokens:
        rng = numpy_rng(seed, "routing", "subsample")
        keep = torch.zeros(pca.tokens, dtype=torch.bool)
        keep[torch.from_numpy(rng.choice(pca.tokens, size=max_tokens, replace=False))] = True
    count = min(pca.tokens, max_tokens)
    found, start, filled = pca.mean.new_empty(count, len(pca.components)), 0, 0
    for block in blocks():
        stop = start + block.shape[0]
        rows = pca.project(block)
        if keep is not None:
            rows = rows[keep[start:stop].to(block.device)]
        if stop <= pca.tokens:
            found[filled : filled + len(rows)] = rows
        start, filled = stop, filled + len(rows)
    if start != pca.tokens:
        raise InvalidInput(
            f"`stream` must give the same tokens every time; got {pca.tokens}, then {start}."
        )
    return found


def _fit_control(blocks: Blocks, k: int, seed: int, kind: Kind) -> Router:
    """Build a control and count the tokens of its clusters."""
    rest = blocks()
    first = next(rest)
    router = _control(first.shape[1], k, seed, kind).to(first.device)
    return _counted(router, chain([first], rest))


def _control(features: int, k: int, seed: int, kind: Kind) -> Router:
    none = torch.zeros(0, dtype=torch.int64)
    return Router(
        kind=kind,
        mean=torch.zeros(features),
        components=torch.zeros(0, features),
        centroids=torch.zeros(k, 0),
        hash_key=hash_key(features, seed=seed) if kind == "random" else none,
        statistics=RouterStatistics(
            tokens_per_cluster=torch.zeros(k, dtype=torch.int64),
            explained_variance=none.double(),
            inertia=float("nan"),
            restart_inertias=none.double(),
            iterations=none,
        ),
    )


def _check_parameters(k: int, max_tokens: int, kind: str) -> None:
    choice("kind", kind, (*ROUTERS, "single"))
    if kind == "single" and k != 1:
        raise InvalidInput(f"`k` must be 1 for the single cluster; got {k}.")
    whole("max_tokens", max_tokens, least=k)


Fitter = Callable[..., tuple[Router, Tensor | None]]
"""Fits a router to blocks of tokens, given their number of clusters and a seed."""


def as_fitter(name: str, thing: Any) -> Fitter:
    """Return what fits a router: `thing` itself if it is ours, or one made of an `OwnRouter`.

    Raises
    ------
    InvalidInput
        If it is no function; when it is run, what `entangle.experts.own_router.scores_of` refuses.
    """
    if getattr(thing, "fits_router", False):
        ours: Fitter = thing
        return ours
    if not callable(thing):
        raise InvalidInput(f"a router must be a function; {name!r} is {type(thing).__name__}.")
    return partial(_fit_own, name, thing)


def _fit_random(
    blocks: Blocks, k: int, seed: int, **_settings: object
) -> tuple[Router, Tensor | None]:
    return _fit_control(blocks, k, seed, "random"), None


ROUTERS: Door[Fitter] = Door("routers", as_fitter)
"""Routers of several clusters by name."""
for _name, _fitter, _source in (
    ("kmeans", _fit_kmeans, "arXiv 2405.15756, algorithm A1: k-means on principal components"),
    ("random", _fit_random, "the control: a hash of the token's bits"),
):
    _fitter.fits_router = True  # type: ignore[attr-defined]
    ROUTERS.own(_name, _fitter, source=_source)
