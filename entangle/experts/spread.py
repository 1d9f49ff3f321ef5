"""Building shared out to several ranks: each runs its sequences, and solves its clusters.

Of every distinct input of a block's layers, all ranks get all rows, in the order of the text, as
one rank alone records them; one rank fits the router. So what is built does not depend on how many
ranks there are.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate, pairwise

import torch
from jaxtyping import Int64
from safetensors.torch import load, save
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.experts.linear import ExpandedLinear, SharedRouting
from entangle.experts.router import Router
from entangle.experts.solver import (
    Experts,
    ExpertSettings,
    Sparsity,
    Totals,
    solve_in_parts,
    totals_of,
)
from entangle.experts.storage import Storage
from entangle.models.layers import Layer
from entangle.packed.formats import UNIT, Layout, Packed, room
from entangle.ranks import Ranks
from entangle.recording.stream import ByteBudget, TokenStore

_ROWS = 2**13


def share_inputs(
    ranks: Ranks,
    own: Sequence[tuple[list[Layer], TokenStore]],
    layers: Sequence[Layer],
    *,
    budget: ByteBudget,
    stack: ExitStack,
) -> list[tuple[list[Layer], TokenStore]]:
    """Return the inputs that all ranks recorded, on each of them.

    Parameters
    ----------
    ranks
        Who recorded, the first the beginning of the text.
    own
        This rank's inputs, with the layers that read them; they are closed as they are sent.
    layers
        All that were watched.
    budget, stack
        As of `entangle.experts.build.record_inputs`.

    Raises
    ------
    InvalidInput
        If layers read one input on some ranks only.
    """
    if ranks.size == 1:
        return list(own)
    seen = [[[one.name for one in members], *_described(store)] for members, store in own]
    every = ranks.exchange(seen)
    groups: list[list[str]] = []
    place: dict[str, int] = {}
    for names in (names for part in every for names, *_ in part):
        home = place.get(names[0], len(groups))
        if home == len(groups):
            groups.append(list(names))
        place |= {name: home for name in names if name not in place}
        if any(place[name] != home for name in names) or len(names) != len(groups[home]):
            raise InvalidInput(
                f"layer {names[0]!r} has the input of another layer in some of its runs only, so "
                "they cannot be recorded together; take it alone."
            )
    known = {layer.name: layer for layer in layers}
    mine = {members[0].name: store for members, store in own}
    found = []
    for names in groups:
        described = [next((rest for one, *rest in part if one == names), None) for part in every]
        store = stack.enter_context(TokenStore(budget))
        members = [known[name] for name in names]
        _collect(ranks, store, mine.get(names[0]), described, device=members[0].device)
        found.append((members, store))
    return found


def _described(store: TokenStore) -> tuple[int, int, str]:
    width = next((rows.shape[1] for rows in store.chunks()), 0)
    return store.n_tokens, width, str(store.dtype).removeprefix("torch.")


def _collect(
    ranks: Ranks,
    store: TokenStore,
    own: TokenStore | None,
    described: Sequence[tuple[int, int, str] | None],
    *,
    device: torch.device,
) -> None:
    """Append the rows of every rank's record to a store, on all ranks."""
    known = [one for one in described if one is not None]
    width, dtype = known[0][1], getattr(torch, known[0][2])
    counts = [0 if one is None else one[0] for one in described]
    pieces = [min(_ROWS, n - start) for n in counts for start in range(0, n, _ROWS)]
    first = True
    for rank, count in enumerate(counts):
        sent = own.blocks(_ROWS) if own is not None and rank == ranks.rank else None
        for start in range(0, count, _ROWS):
            if sent is not None:
                rows = next(sent)[1].to(device).contiguous()
            else:
                rows = torch.empty(min(_ROWS, count - start), width, dtype=dtype, device=device)
            ranks.broadcast(rows, by=rank, met=not first)
            if first:
                store.reserve(pieces, rows)
                first = False
            store.append(rows)
    if own is not None:
        own.close()


def share_router(
    ranks: Ranks,
    fitted: tuple[Router, Int64[Tensor, " tokens"] | None] | None,
    *,
    by: int,
    tokens: int,
    device: torch.device,
) -> tuple[Router, Int64[Tensor, " tokens"] | None]:
    """Return the router, and the clusters of the tokens if it has them, that rank ``by`` fitted."""
    if ranks.size == 1:
        assert fitted is not None  # noqa: S101
        return fitted
    router, labels = (None, None) if fitted is None else fitted
    content = ranks.told(None if router is None else save(router.state()), by=by)
    has_labels = ranks.exchange(labels is not None)[by]
    if router is None:
        router = Router.from_state(load(content)).to(device)
    if has_labels:
        if labels is None:
            labels = torch.empty(tokens, dtype=torch.int64, device=device)
        ranks.broadcast(labels, by=by)
    return router, labels


def share_built(
    ranks: Ranks,
    found: Sequence[tuple[Layer, ExpandedLinear]] | None,
    layers: Sequence[Layer],
) -> list[tuple[Layer, ExpandedLinear]] | None:
    """Return, on all ranks, the layers of a block that the first rank has read; None if none."""
    described, states, known = b"", b"", {layer.name: layer for layer in layers}
    routings: list[SharedRouting] = []
    if ranks.rank == 0 and found is not None:
        routings = list(dict.fromkeys(module.routing for _, module in found))
        places = [
            [layer.name, routings.index(module.routing), len(module.weight)]
            for layer, module in found
        ]
        described = json.dumps(places).encode()
        states = save(
            {f"{i}:{k}": v for i, one in enumerate(routings) for k, v in one.router.state().items()}
        )
    described = ranks.told(described)
    if not described:
        return None
    states = ranks.told(states)
    if ranks.rank:
        routings = _routings(load(states))
    made = []
    for place, (name, routing, k) in enumerate(json.loads(described)):
        layer = known[name]
        if ranks.rank == 0 and found is not None:
            module = found[place][1]
        else:
            weight = layer.weight.new_empty(k, *layer.weight.shape)
            module = ExpandedLinear(weight, layer.bias, routings[routing])
        ranks.broadcast(module.weight.data, by=0)
        made.append((layer, module))
    return made


def _routings(states: Mapping[str, Tensor]) -> list[SharedRouting]:
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in states.items():
        number, _, name = key.partition(":")
        found.setdefault(int(number), {})[name] = value
    return [SharedRouting(Router.from_state(found[i])) for i in sorted(found)]


def share_totals(
    ranks: Ranks, layers: Sequence[Layer], whole: Tensor | None, labels: Tensor, k: int, *, by: int
) -> Totals | None:
    """Return what rank ``by`` finds of layers' common input, whose gram it alone has summed.

    None of one rank, and where none has summed it.
    """
    if not any(ranks.exchange(whole is not None)):
        return None
    found, average = None, None
    if whole is not None:
        energies, average = totals_of(layers, whole, labels, k)
        found = [energies, average is not None]
    energies, short = ranks.exchange(found)[by]
    if short:
        width, device = layers[0].in_features, layers[0].device
        average = torch.empty(width, width, device=device) if average is None else average
        ranks.broadcast(average, by=by)
    return energies, average


def share_packing(
    ranks: Ranks, storage: Storage, dense: Tensor, weight: Tensor, *, to: int
) -> Packed | None:
    """Return the packed experts of a layer on rank ``to``, of which every rank packs some.

    Parameters
    ----------
    ranks
        All have all experts.
    storage
        How; what is stored of ``n16`` is as wide as the fullest block of all experts needs, so
        that one rank packs them.
    dense, weight
        As of `entangle.experts.storage.Storage.pack`.
    to
        Who needs them; None on the others.
    """
    if ranks.size == 1 or storage.format == "n16":
        return storage.pack(dense, weight)[0] if ranks.rank == to else None
    shares = [ranks.part(len(weight), rank=rank) for rank in range(ranks.size)]
    own = shares[ranks.rank]
    mine = storage.pack(dense, weight[own.start : own.stop])[0] if len(own) else None
    known = None
    if mine is not None:
        known = [int(mine.tensors["starts"][-1, -1]), mine.layout.describe()]
    every = ranks.exchange(known)
    ends = list(accumulate((0 if one is None else one[0] for one in every), initial=0))
    _, described = next(filter(None, every))
    layout = Layout(**described | {"experts": len(weight), "stored": room(ends[-1])})
    found = {}
    for name, (shape, dtype) in layout.tensors().items():
        found[name] = torch.zeros(shape, dtype=dtype, device=weight.device)
        of_values = name in ("values", "index")
        a_unit = UNIT * len(found[name]) // max(1, layout.stored) if of_values else 0
        places = [range(a * a_unit, b * a_unit) for a, b in pairwise(ends)] if of_values else shares
        if mine is not None:
            place, part = places[ranks.rank], mine.tensors[name]
            found[name][place.start : place.stop] = part[: len(place)]
            if name == "starts":
                found[name][place.start : place.stop] += ends[ranks.rank]
        ranks.fill(found[name], places, to=to)
    return Packed(found, layout) if ranks.rank == to else None


def solve_shares(
    ranks: Ranks,
    layers: Sequence[Layer],
    store: TokenStore,
    labels: Tensor,
    sparsity: Sequence[Sparsity],
    settings: ExpertSettings,
    shares: Sequence[Sequence[range]],
    totals: Totals | None = None,
) -> list[Experts | None]:
    """Solve this rank's clusters: of all layers side by side where they are the same.

    Arguments are those of `solve_in_parts`, and `cluster_shares`.
    """
    rank, k = ranks.rank, max(own[-1].stop for own in shares)
    together = all(own is shares[0] for own in shares)
    found: list[Experts | None] = [None] * len(layers)
    for some in [range(len(layers))] if together else [range(i, i + 1) for i in range(len(layers))]:
        own = shares[some.start][rank]
        if len(own):
            known = None if totals is None else (totals[0][some.start : some.stop], totals[1])
            found[some.start : some.stop] = solve_in_parts(
                [layers[i] for i in some], store, labels, [sparsity[i] for i in some], settings,
                k=k, clusters=own, totals=known,
            )  # fmt: skip
    return found


def join_experts(
    ranks: Ranks, layer: Layer, own: Experts | None, shares: Sequence[range]
) -> Experts:
    """Return a layer's experts, of which every rank has solved its share of the clusters.

    Parameters
    ----------
    ranks
        Who solved them.
    layer
        The dense layer.
    own
        What `solve_experts` or `solve_in_parts` gave for this rank's; None if it has none.
    shares
        Clusters of every rank.
    """
    if ranks.size == 1:
        assert own is not None  # noqa: S101
        return own
    known = None
    if own is not None:
        zeros = round(own.realised_sparsity * own.weight.numel())
        rest = [own.energy, own.tokens.tolist(), own.shrunk, str(own.damping.dtype)]
        known = [own.squared_error.tolist(), own.damping.tolist(), zeros, *rest]
    found = [one for one in ranks.exchange(known) if one is not None]
    energy, tokens, shrunk, dtype = found[0][3:]
    k, device = len(tokens), layer.device
    weight = layer.weight.new_empty(k, *layer.weight.shape) if own is None else own.weight
    ranks.fill(weight, shares)
    errors, damping = ([one for part in found for one in part[i]] for i in (0, 1))
    kind = getattr(torch, dtype.removeprefix("torch."))
    return Experts(
        weight=weight,
        squared_error=torch.tensor(errors, dtype=torch.float64, device=device),
        energy=energy,
        damping=torch.tensor(damping, dtype=kind, device=device),
        tokens=torch.tensor(tokens, device=device),
        realised_sparsity=sum(part[2] for part in found) / weight.numel(),
        shrunk=shrunk,
    )


def cluster_shares(k: int, layers: int, ranks: Ranks, *, at_once: int) -> list[list[range]]:
    """Return which clusters every rank solves, of each of so many layers with one input.

    With as many clusters as ranks or more, layers share them out alike, in runs of ``at_once``
    where there are enough, so that clusters are solved side by side as on one rank. With fewer, the
    layers go to different ranks.
    """
    if k < ranks.size:
        units = [
            [(i * k + c) * ranks.size // (layers * k) for c in range(k)] for i in range(layers)
        ]
        return [_runs_of(owners, ranks.size) for owners in units]
    run = at_once if -(-k // at_once) >= ranks.size else 1
    parts = [ranks.part(-(-k // run), rank=rank) for rank in range(ranks.size)]
    return [[range(min(k, p.start * run), min(k, p.stop * run)) for p in parts]] * layers


def _runs_of(owners: Sequence[int], size: int) -> list[range]:
    """Return the run of places that each of so many owners has; their numbers rise."""
    return [range(bisect_left(owners, one), bisect_right(owners, one)) for one in range(size)]
