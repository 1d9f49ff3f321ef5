"""The one solver of sparse experts: rows of layers, pruned once for every cluster of their inputs.

Rows of an ablation or a decomposition and whole layers of an expansion go one way: a router is
fitted on the layer's inputs (`ExpertSettings.fit`), the tokens are routed and their grams summed by
cluster (`cluster_grams`), and the rows are pruned in all clusters, a few at a time
(`solve_clusters`).

The grams of 16 clusters of a 7B model's down projection are 7.8 GB. Where the recorded inputs of an
expansion lie on a GPU, the tokens of a cluster can be gathered from them, so that only the grams of
a few clusters are held, until the experts of all layers are solved with them (`solve_in_parts`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from entangle.checks import choice, finite, whole
from entangle.errors import InvalidInput
from entangle.experts.router import ROUTERS, Kind, Router, fit_router_and_labels
from entangle.kernels.dispatch import dispatch, on_cpu
from entangle.memory import by_device, free_on_gpu, in_fitting_parts
from entangle.models.layers import Layer
from entangle.precision import full_precision
from entangle.pruning import PRUNERS
from entangle.pruning.factor import Factor, inverse_factor
from entangle.pruning.grid import check_bits, check_group_size
from entangle.pruning.methods import solve
from entangle.pruning.problem import check_gram, prepare, quadratic
from entangle.ranks import current
from entangle.recording.stream import TokenStore
from entangle.seeding import check_seed
from entangle.stats.gram import ClusterGrams, ClusterGramsResult, sum_grams

Sparsity = float | Float[Tensor, " out_features"] | None

_WORK_BYTES, _GPU_SHARE = 2 * 2**30, 4
_COPIES = 6  # of the gram and of the rows, at most, inside a solver
_CHANGE_BYTES, _GRAM_TOKENS = 2**28, 2**13


@dataclass(frozen=True)
class ExpertSettings:
    """How tokens are routed and experts pruned; the fields are explained at `entangle.expand`.

    Raises
    ------
    InvalidInput, UnknownName
        If a value is out of range; patterns are checked with the layers (`check_solvable`).
    """

    router: Kind = "kmeans"
    restarts: int = 10
    seed: int = 0
    pruner: str = "sparsegpt"
    pattern: str = "row"
    bits: int | None = None
    group_size: int | None = None
    damping: float = 0.01

    def __post_init__(self) -> None:
        checked = {
            "restarts": whole("restarts", self.restarts, least=1),
            "bits": (bits := check_bits(self.bits)),
            "group_size": check_group_size(self.group_size, bits),
            "seed": check_seed(self.seed),
            "damping": finite("damping", self.damping, least=0),
            "pruner": choice("pruner", self.pruner, PRUNERS, kind="pruning method"),
            "router": choice("router", self.router, (*ROUTERS, "single")),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def fit(
        self, inputs: TokenStore, k: int, device: torch.device
    ) -> tuple[Router, Int64[Tensor, " tokens"] | None]:
        """Fit a router to k clusters, and find the tokens' where `fit_router_and_labels` does."""
        return fit_router_and_labels(
            inputs, k, seed=self.seed, kind="single" if k == 1 else self.router,
            restarts=self.restarts, device=device,
        )  # fmt: skip


def cluster_grams(
    inputs: TokenStore,
    router: Router,
    device: torch.device,
    *,
    at_once: int = _GRAM_TOKENS,
    shares: Sequence[range] = (),
) -> tuple[ClusterGramsResult, Int64[Tensor, " tokens"]]:
    """Route tokens, so many at once, and return the grams by cluster and the tokens' clusters.

    Of several ranks that have all tokens, each sums the grams of its share of the clusters.
    """
    ranks = current()
    own = shares[ranks.rank] if shares else range(router.k)
    grams, labels = ClusterGrams(max(1, len(own)), router.features, device=device), []
    for _, rows in inputs.blocks(at_once):
        rows = rows.to(device)
        labels.append(router.route(rows))
        mine = labels[-1]
        if len(own) < router.k:
            chosen = (mine >= own.start) & (mine < own.stop)
            rows, mine = rows[chosen], mine[chosen] - own.start
        grams.update(rows, mine)
    found, every = grams.result(), torch.cat(labels)
    if len(own) < router.k:
        whole = [one.new_empty(router.k, *one.shape[1:]) for one in (found.gram, found.total)]
        for tensor, part in zip(whole, (found.gram, found.total), strict=True):
            tensor[own.start : own.stop] = part[: len(own)]
            ranks.fill(tensor, shares)
        count = torch.bincount(every, minlength=router.k).to(device)
        found = ClusterGramsResult(whole[0], whole[1], count)
    return found, every


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of one layer and what they lost."""

    weight: Float[Tensor, "experts out_features in_features"]
    """Sparse weights with their zeros, in the layer's dtype."""
    squared_error: Float[Tensor, " experts"]
    """Sum over the cluster's tokens and all neurons of the squared output error, float64."""
    energy: float
    """Sum over all tokens and neurons of the squared dense output (without bias)."""
    damping: Float[Tensor, " experts"]
    """Multiple of the gram's mean diagonal that was needed; 0 where none is used."""
    tokens: Int64[Tensor, " experts"]
    """Calibration tokens of every cluster."""
    realised_sparsity: float
    """Share of zeros over all experts."""
    shrunk: int
    """Clusters with fewer tokens than inputs, whose gram was shrunk toward the layer's."""


def check_solvable(layer: Layer, sparsity: Sparsity, settings: ExpertSettings) -> None:
    """Raise what `solve_experts` would about its settings, before anything is recorded.

    Raises
    ------
    InvalidInput
        If the sparsity, the pattern or the weight breaks a rule; the message names the layer.
    """
    try:
        prepare(
            layer.weight, None, sparsity=sparsity, pattern=settings.pattern, rows=None,
            bits=settings.bits, group_size=settings.group_size,
        )  # fmt: skip
    except InvalidInput as error:
        raise InvalidInput(f"{layer.name}: {error}") from error


def solve_experts(
    layer: Layer,
    grams: ClusterGramsResult,
    sparsity: Sparsity,
    settings: ExpertSettings,
    *,
    clusters: range | None = None,
) -> Experts:
    """Prune a layer's own dense weight once for every cluster.

    Parameters
    ----------
    layer
        Its weight is the starting point of every expert; it is not changed.
    grams
        ``XᵀX`` and token count of every cluster, over the layer's inputs.
    sparsity
        For all rows, or one value a row; None with an n:m pattern of numbers, such as ``2:4``.
    settings
        Pruner, pattern and the like.
    clusters
        Solve these alone; the experts of the others are not set (`join_experts`).

    Notes
    -----
    Clusters are solved with `shrunk_grams`; errors are computed with their own grams.
    """
    beside = by_device(layer.device, cpu=0, gpu=layer.out_features)
    parts = []
    for some, gram in shrunk_grams(grams, rows=beside, clusters=clusters):
        part = prune_part(
            layer.weight, gram, sparsity, settings, experts=len(gram), first=some.start
        )
        parts.append((part, squared_errors(layer, part.weight, grams.gram[some])))
    weight = None
    if clusters is not None and len(clusters) < len(grams.gram):
        weight = layer.weight.new_empty(len(grams.gram), *layer.weight.shape)
        weight[clusters.start : clusters.stop] = torch.cat([part.weight for part, _ in parts])
    energy = dense_energy(layer, grams.gram.sum(0))
    return join_parts(
        parts, energy=energy, tokens=grams.count, shrunk=count_shrunk(grams), weight=weight
    )


@dataclass(frozen=True, eq=False)
class PrunedPart:
    """Some rows in some neighbouring clusters."""

    weight: Float[Tensor, "part rows in_features"]
    """Sparse weights with their zeros, in the dense weight's dtype."""
    damping: Float[Tensor, " part"]
    """As in `Experts`."""
    realised: Float[Tensor, "part rows"]
    """Share of zeros of every row."""

    @property
    def zeros(self) -> Float[Tensor, " rows"]:
        """Zeros of every row, summed over the clusters; whole numbers, float64."""
        return (self.realised.double() * self.weight.shape[2]).round().sum(0)


def prune_part(
    weight: Float[Tensor, "rows in_features"],
    gram: Float[Tensor, "part in_features in_features"] | None,
    sparsity: Sparsity,
    settings: ExpertSettings,
    *,
    experts: int = 1,
    first: int = 0,
    factor: Factor | None = None,
) -> PrunedPart:
    """Prune rows once for every gram.

    Parameters
    ----------
    weight
        Dense rows; not changed.
    gram
        Of some neighbouring clusters, as `shrunk_grams` gives them; None if the factor is enough.
    sparsity, settings
        As in `solve_experts`.
    experts
        Number of these clusters.
    first
        Number of the first cluster.
    factor
        Of the grams' inverses, if it is known: layers with one input have the same.
    """
    problem = prepare(
        weight.expand(experts, -1, -1), gram, sparsity=sparsity,
        pattern=settings.pattern, rows=None, bits=settings.bits, group_size=settings.group_size,
        loss=False,
    )  # fmt: skip
    result = solve(
        replace(problem, first=first, factor=factor),
        method=settings.pruner, damping=settings.damping, seed=settings.seed,
    )  # fmt: skip
    return PrunedPart(result.weight, result.damping.flatten(), result.realised_sparsity)


def squared_errors(
    layer: Layer,
    sparse: Float[Tensor, "part out_features in_features"],
    gram: Float[Tensor, "part in_features in_features"],
) -> Float[Tensor, " part"]:
    """Return the squared output error of experts, summed over tokens and neurons, in float64.

    Parameters
    ----------
    layer
        The dense layer.
    sparse
        Its experts.
    gram
        ``XᵀX`` of each expert's own tokens.
    """
    dense = layer.weight.float()
    few = max(1, _CHANGE_BYTES // (4 * dense.numel()))
    at_once = by_device(sparse.device, cpu=len(sparse), gpu=few)
    parts = zip(sparse.split(at_once), gram.split(at_once), strict=True)
    return torch.cat([_quadratic(some.float() - dense, own) for some, own in parts])


def dense_energy(layer: Layer, gram: Float[Tensor, "in_features in_features"]) -> float:
    """Return the squared dense output (without bias), summed over tokens and neurons."""
    return float(_quadratic(layer.weight.float()[None], gram[None]).sum())


def join_parts(
    parts: Sequence[tuple[PrunedPart, Float[Tensor, " _"]]],
    *,
    energy: float,
    tokens: Int64[Tensor, " experts"],
    shrunk: int,
    weight: Float[Tensor, "experts out_features in_features"] | None = None,
) -> Experts:
    """Put the experts of all clusters, in order, and what they lost, together.

    ``weight`` is given where the parts' weights lie in one tensor already.
    """
    if weight is None:
        weight = torch.cat([part.weight for part, _ in parts])
    return Experts(
        weight=weight,
        squared_error=torch.cat([lost for _, lost in parts]),
        energy=energy,
        damping=torch.cat([part.damping for part, _ in parts]),
        tokens=tokens,
        realised_sparsity=sum(int(part.zeros.sum()) for part, _ in parts) / weight.numel(),
        shrunk=shrunk,
    )


def shrunk_grams(
    grams: ClusterGramsResult, *, rows: int = 0, clusters: range | None = None
) -> Iterator[tuple[slice, Float[Tensor, "part features features"]]]:
    """Yield the grams to solve experts with, as many clusters at a time as the work memory holds.

    A cluster with fewer tokens n_c than inputs d has a singular gram. It is shrunk toward the
    layer's: ``G_c + (d − n_c) · G / n``, as if d − n_c average tokens of the layer had been seen.

    Parameters
    ----------
    grams
        ``XᵀX`` and token count of every cluster.
    rows
        Weight rows that are solved with every gram, where they count beside it in memory.
    clusters
        Yield these alone.

    Yields
    ------
    tuple
        The clusters, and their grams.
    """
    k, features = grams.gram.shape[:2]
    work = max(_WORK_BYTES, free_on_gpu(grams.gram.device) // _GPU_SHARE)
    per_batch = max(1, work // (_COPIES * 4 * features * (features + rows)))
    chosen = range(k) if clusters is None else clusters
    parts = [
        slice(start, min(start + per_batch, chosen.stop))
        for start in range(chosen.start, chosen.stop, per_batch)
    ]
    if not count_shrunk(grams):
        yield from ((part, grams.gram[part]) for part in parts)
        return
    average = grams.gram.sum(0) / max(1, int(grams.count.sum()))
    for part in parts:
        own = grams.gram[part]
        missing = (features - grams.count[part]).clamp_min(0).to(own)
        yield part, own + missing[:, None, None] * average


def count_shrunk(grams: ClusterGramsResult) -> int:
    """Count the clusters whose gram `shrunk_grams` shrinks."""
    return int((grams.count < grams.gram.shape[1]).sum())


def _in_one_product(rows: Tensor, gram: Tensor) -> Tensor:
    with full_precision():
        return (rows @ gram.to(rows.dtype) * rows).sum((1, 2), dtype=torch.float64)


@dispatch(_in_one_product, where=on_cpu)
def _quadratic(rows: Tensor, gram: Tensor) -> Tensor:
    """Return the sum over rows of ``row · gram · rowᵀ``, shape (experts,), float64."""
    with full_precision():
        return quadratic(rows, gram.to(rows.dtype)).sum(1, dtype=torch.float64)


_WORK_BYTES_AT_ONCE, _WORK_SHARE = 2**30, 1 / 3
_FACTOR_WORK = 1 / 3  # of a gram, beside the gram and its factor
_COPIES_FUSED, _COPIES_OF_ROWS = 1.75, 6  # of an expert's float32 rows, at most, while it is solved


class ClusterTokens:
    """The tokens of a record, cluster by cluster.

    Parameters
    ----------
    store
        None of it in a file; what is not on its device is brought there as it is asked for.
    labels
        Cluster of every token.
    k
        Number of clusters.
    """

    def __init__(self, store: TokenStore, labels: Int64[Tensor, " tokens"], k: int) -> None:
        self._store, self._chunks = store, list(store.chunks())
        self._features = self._chunks[0].shape[1]
        self._order: list[tuple[Tensor, ...]] = []
        sizes = []
        for rows, own in zip(
            self._chunks, labels.split([len(rows) for rows in self._chunks]), strict=True
        ):
            order = own.to(rows.device).argsort(stable=True)
            sizes.append(torch.bincount(own, minlength=k))
            self._order.append(order.split(sizes[-1].tolist()))
        self.count: Int64[Tensor, " k"] = torch.stack(sizes).sum(0)
        """Tokens of each cluster."""

    def batches(self, cluster: int) -> Iterator[Float[Tensor, "tokens features"]]:
        """Yield a cluster's tokens in order, 8,192 at a time, each time in the same memory."""
        size = max(1, min(_GRAM_TOKENS, sum(len(order[cluster]) for order in self._order)))
        rows, held = self._chunks[0].new_empty(size, self._features, device=self._store.device), 0
        for chunk, order in zip(self._chunks, self._order, strict=True):
            left = order[cluster]
            while len(left):
                some, left = left.tensor_split([size - held])
                place = rows[held : held + len(some)]
                if chunk.device == rows.device:
                    torch.index_select(chunk, 0, some, out=place)
                else:
                    place.copy_(chunk.index_select(0, some))
                held += len(some)
                if held == size:
                    yield rows
                    held = 0
        if held:
            yield rows[:held]

    def grams(self, clusters: Sequence[int], device: torch.device) -> Float[Tensor, "part _ _"]:
        """Return ``XᵀX`` of some clusters."""
        sets = [self.batches(cluster) for cluster in clusters]
        return sum_grams(sets, self._features, device=device)


def whole_gram(store: TokenStore, device: torch.device) -> Float[Tensor, "_ _"]:
    """Return ``XᵀX`` of all tokens of a record."""
    features = next(iter(store.chunks())).shape[1]
    everything = (rows.to(device) for _, rows in store.blocks(_GRAM_TOKENS))
    return sum_grams([everything], features, device=device)[0]


Totals = tuple[list[float], Tensor | None]
"""Energy of every layer over all tokens, and the mean of ``xxᵀ`` where clusters are short."""


def totals_of(layers: Sequence[Layer], whole: Tensor, labels: Tensor, k: int) -> Totals:
    """Return what layers with one input have in common, given its gram, which is overwritten."""
    energies = [dense_energy(layer, whole) for layer in layers]
    short = int(torch.bincount(labels, minlength=k).min()) < len(whole)
    return energies, whole.div_(len(labels)) if short else None


def solve_in_parts(
    layers: Sequence[Layer],
    store: TokenStore,
    labels: Int64[Tensor, " tokens"],
    sparsity: Sequence[Sparsity],
    settings: ExpertSettings,
    *,
    k: int,
    size: int | None = None,
    clusters: range | None = None,
    totals: Totals | None = None,
) -> list[Experts]:
    """Prune the dense weights of layers with one input once for every cluster.

    As `entangle.experts.solver.solve_experts` on the clusters' grams, to rounding.

    Parameters
    ----------
    layers
        They read one input.
    store
        That input, none of it in a file.
    labels
        Cluster of every token.
    sparsity
        Of each layer.
    settings
        Pruner, pattern and the like.
    k
        Number of clusters.
    size
        Clusters at a time; None for as many as seem to fit.
    clusters
        As in `solve_experts`.
    totals
        Of all tokens, where another rank has summed them.

    Raises
    ------
    torch.OutOfMemoryError
        If memory runs out with one cluster. With more, half as many are tried.
    """
    totals = totals or totals_of(layers, whole_gram(store, layers[0].device), labels, k)
    group = _Group(layers, ClusterTokens(store, labels, k), sparsity, settings, totals)
    weights = [layer.weight.new_empty(k, *layer.weight.shape) for layer in layers]
    own = range(k) if clusters is None else clusters

    def solve_some(some: range) -> list[tuple[PrunedPart, Float[Tensor, " part"]]]:
        some = own[some.start : some.stop]
        return group.solve(some, [weight[some.start : some.stop] for weight in weights])

    at_once = size or clusters_at_once(layers, store.n_bytes, settings, k)
    found = in_fitting_parts(len(own), at_once, solve_some, told="solving")
    shrunk = sum(missing > 0 for missing in group.missing)
    by_layer = zip(zip(*found, strict=True), group.energies, weights, strict=True)
    return [
        join_parts(parts, energy=energy, tokens=group.tokens.count, shrunk=shrunk, weight=weight)
        for parts, energy, weight in by_layer
    ]


def clusters_at_once(
    layers: Sequence[Layer], input_bytes: int, settings: ExpertSettings, k: int
) -> int:
    """Return how many clusters to solve together, so that the parts are of about one size.

    The work memory is a third of what inputs and experts take, which is held anyway, and at least
    1 GiB. It does not depend on what is free, so that one seed gives one result.
    """
    weights = [layer.weight for layer in layers]
    held = input_bytes + k * sum(weight.numel() * weight.element_size() for weight in weights)
    work = max(_WORK_BYTES_AT_ONCE, _WORK_SHARE * held)
    most = max(1, int(work / _bytes_a_cluster(weights, settings)))
    parts = -(-k // most)
    return -(-k // parts)


def _bytes_a_cluster(weights: Sequence[Tensor], settings: ExpertSettings) -> int:
    """Return the most that solving one cluster takes: gram, factor, and copies of the rows."""
    width = max(4, *(weight.element_size() for weight in weights))
    alone = settings.pruner == "sparsegpt" and width == 4  # the factor, without the gram
    fused = alone and settings.bits is None and settings.pattern in ("row", "block")
    gram = width * weights[0].shape[1] ** 2
    rows = width * max(weight.numel() for weight in weights)
    solving = (1 if alone else 2) * gram + (_COPIES_FUSED if fused else _COPIES_OF_ROWS) * rows
    return int(max((2 + _FACTOR_WORK) * gram, solving))


class _Group:
    """Layers with one input, and how the experts of some of its clusters are solved."""

    def __init__(
        self,
        layers: Sequence[Layer],
        tokens: ClusterTokens,
        sparsity: Sequence[Sparsity],
        settings: ExpertSettings,
        totals: Totals,
    ) -> None:
        self.tokens = tokens
        self.missing: list[int] = (layers[0].in_features - tokens.count).clamp_min(0).tolist()
        self._layers, self._sparsity, self._settings = layers, sparsity, settings
        self._device = layers[0].device
        self.energies, self._average = totals

    def solve(
        self, clusters: range, into: Sequence[Tensor]
    ) -> list[tuple[PrunedPart, Float[Tensor, " part"]]]:
        """Return each layer's experts of some clusters, put into ``into``, and what they lost.

        SparseGPT needs no grams but their factor, so that the two are held together only while it
        is made: the grams are then summed again for the errors.
        """
        grams = self.tokens.grams(clusters, self._device)
        self._shrink_(grams, clusters)
        factor = self._factor(grams, clusters.start)
        held = grams if factor is None else None
        del grams
        pruned = []
        for layer, share, place in zip(self._layers, self._sparsity, into, strict=True):
            part = prune_part(
                layer.weight, held, share, self._settings, first=clusters.start, factor=factor,
                experts=len(clusters),
            )  # fmt: skip
            pruned.append(replace(part, weight=place.copy_(part.weight)))
            del part
        del factor
        if held is None:
            grams = self.tokens.grams(clusters, self._device)
        else:
            grams = self._restored_(held, clusters)
        errors = [
            squared_errors(layer, experts.weight, grams)
            for layer, experts in zip(self._layers, pruned, strict=True)
        ]
        return list(zip(pruned, errors, strict=True))

    def _shrink_(self, grams: Tensor, clusters: range) -> None:
        """Shrink the grams of short clusters as `entangle.experts.solver.shrunk_grams` does."""
        for gram, cluster in zip(grams, clusters, strict=True):
            if self._average is not None and self.missing[cluster]:
                gram.add_(self._average, alpha=self.missing[cluster])

    def _restored_(self, grams: Tensor, clusters: range) -> Tensor:
        """Undo `_shrink_`, by summing again what few tokens such a cluster has."""
        for gram, cluster in zip(grams, clusters, strict=True):
            if self.missing[cluster]:
                gram.copy_(self.tokens.grams([cluster], self._device)[0])
        return grams

    def _factor(self, grams: Tensor, first: int) -> Factor | None:
        """Factorise the grams for all layers, where that is all that they are solved with."""
        weights = [layer.weight for layer in self._layers]
        wide = any(weight.dtype == torch.float64 for weight in weights)
        if wide or self._settings.pruner != "sparsegpt":
            return None
        grams = check_gram(grams, weights[0].expand(len(grams), -1, -1), grams.dtype)
        return inverse_factor(grams, damping=self._settings.damping, first=first)
