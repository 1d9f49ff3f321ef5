"""Training-free methods of pruning a mixture: which experts, or which neurons of them, go.

Each is a number for every expert, or for every neuron of every expert, from `gather`'s statistics;
the lowest go. Two are of another kind: one merges experts, one clusters them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float64
from scipy.cluster.hierarchy import linkage
from torch import Tensor

from entangle.checks import choice, share
from entangle.doors import Door
from entangle.errors import EntangleError, InvalidInput
from entangle.mixtures.pruned import Change, PrunedMixtures
from entangle.mixtures.statistics import Mixture, Statistics, gather

Maker = Callable[[Statistics, "MixtureMethod", float], list[Change]]
"""Makes what becomes of every mixture at a share of its experts' weights that goes."""


@dataclass(frozen=True, eq=False)
class MixtureMethod:
    """A way of pruning mixtures."""

    name: str
    source: str
    """Paper or repository."""
    score: Callable[[Mixture], Tensor]
    """Numbers of the experts of a mixture (experts,), or of their neurons (experts, neurons)."""
    make: Maker
    gradients: bool = False
    """Whether it needs the loss to be differentiated."""


def prune_mixtures(
    statistics: Statistics, method: "str | MixtureMethod", *, sparsity: float
) -> PrunedMixtures:
    """Prune the mixtures of a model by one method.

    Parameters
    ----------
    statistics
        From `gather`.
    method
        One of `MIXTURE_METHODS`.
    sparsity
        Share of the routed experts' stored weights that goes; 0 changes nothing. Whole experts go
        in every mixture alike, rounded to the nearest number; neurons over all mixtures at once.

    Raises
    ------
    UnknownName, InvalidInput
        If the name does not exist, the method needs what is not known of a mixture, or fewer
        experts would be left than a token is sent to.
    """
    known = MIXTURE_METHODS[choice("method", method, MIXTURE_METHODS)] if isinstance(
        method, str
    ) else method  # fmt: skip
    level = share("sparsity", sparsity)
    if known.gradients and not statistics.gradients:
        raise InvalidInput(f"{known.name} needs the loss differentiated; gather with `gradients`.")
    if known.gradients:  # which are not finite anywhere where one expert is not
        for mixture in statistics.mixtures:
            _finite_experts(mixture, known)
    changes = known.make(statistics, known, level)
    return PrunedMixtures(statistics, changes, known.name, level)


def scores_of(method: MixtureMethod, mixture: Mixture) -> Float64[Tensor, "experts ..."]:
    """Return a method's numbers, which must be finite."""
    try:
        found: Any = method.score(mixture)
    except EntangleError:
        raise
    except Exception as error:
        raise InvalidInput(
            f"the method {method.name!r} failed: {type(error).__name__}: {error}"
        ) from error
    shapes = ((mixture.n_experts,), (mixture.n_experts, mixture.width))
    if not isinstance(found, Tensor) or tuple(found.shape) not in shapes:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InvalidInput(
            f"the method {method.name!r} must give scores of shape {shapes[0]} or {shapes[1]}; it "
            f"gave {shape}."
        )
    wrong = (~found.isfinite()).flatten(1).any(1) if found.ndim > 1 else ~found.isfinite()
    if bool(wrong.any()):
        raise InvalidInput(
            f"scores of expert {int(wrong.nonzero()[0, 0])} of {mixture.name!r} are not finite "
            f"({method.name}): its weights or what it sees are not; mend the model."
        )
    return found.double().cpu()


def count_removed(mixture: Mixture, sparsity: float, *, least: int) -> int:
    """Return how many experts go.

    Raises
    ------
    InvalidInput
        If fewer than ``least`` would stay.
    """
    gone = round(mixture.n_experts * sparsity)
    if mixture.n_experts - gone < least:
        raise InvalidInput(
            f"at a density of {1 - sparsity:g} {mixture.n_experts - gone} of "
            f"{mixture.n_experts} experts of {mixture.name!r} are left, but a token is sent to "
            f"{least}; ask for at least {least / mixture.n_experts:g}."
        )
    return gone


def lowest(scores: Tensor, n: int) -> Tensor:
    """Return a mask of the n lowest scores; of equal ones the first go."""
    mask = torch.zeros(scores.numel()).bool()
    mask[scores.flatten().argsort(stable=True)[:n]] = True
    return mask.view(scores.shape)


def _drop(statistics: Statistics, method: MixtureMethod, sparsity: float) -> list[Change]:
    """Drop the lowest experts of every mixture."""
    found = []
    for mixture in statistics.mixtures:
        change = Change(mixture)
        scores = scores_of(method, mixture)
        gone = count_removed(mixture, sparsity, least=mixture.chosen)
        change.dropped = lowest(scores, gone)
        found.append(change)
    return found


def _replace(statistics: Statistics, method: MixtureMethod, sparsity: float) -> list[Change]:
    """Put the mean output into the place of the lowest experts of every mixture."""
    found = []
    for mixture in statistics.mixtures:
        if mixture.bank.norms_outputs:
            raise InvalidInput(
                f"{method.name} puts a constant in an expert's place, but a norm follows those of "
                f"{mixture.name!r}; choose another method."
            )
        change = Change(mixture)
        change.novices = lowest(
            scores_of(method, mixture), count_removed(mixture, sparsity, least=0)
        )
        found.append(change)
    return found


def _remove(statistics: Statistics, method: MixtureMethod, sparsity: float) -> list[Change]:
    """Remove the lowest neurons of all mixtures."""
    changes = [Change(mixture) for mixture in statistics.mixtures]
    scores = [scores_of(method, mixture) for mixture in statistics.mixtures]
    flat = torch.cat([one.flatten() for one in scores])
    gone = lowest(flat, round(len(flat) * sparsity)).split([one.numel() for one in scores])
    for change, mask in zip(changes, gone, strict=True):
        change.neurons = ~mask.view_as(change.neurons)
    return changes


def _merge(statistics: Statistics, method: MixtureMethod, sparsity: float) -> list[Change]:
    """Keep the most used experts of all mixtures, and merge each other into the one most alike."""
    changes = [Change(mixture) for mixture in statistics.mixtures]
    used = [scores_of(method, mixture) for mixture in statistics.mixtures]
    ranked = [one.clone() for one in used]
    for one in ranked:  # every mixture keeps one
        one[one.argmax()] = torch.inf
    flat = torch.cat(ranked)
    left = max(len(changes), len(flat) - round(len(flat) * sparsity))
    gone = lowest(flat, len(flat) - left).split([len(one) for one in used])
    for change, mask in zip(changes, gone, strict=True):
        size = change.mixture.logits.diagonal().sqrt().clamp_min(1e-300)
        alike = change.mixture.logits / size / size[:, None]
        dominant = (~mask).nonzero()[:, 0]
        nearest = dominant[alike[:, dominant].argmax(1)]
        change.groups = torch.where(mask, nearest, change.groups)
    return changes


def _cluster(statistics: Statistics, method: MixtureMethod, sparsity: float) -> list[Change]:
    """Keep one expert of every cluster of routers' rows."""
    mixtures = statistics.mixtures
    for mixture in mixtures:  # refused before anything is computed
        count_removed(mixture, sparsity, least=mixture.chosen)
    merges: list[tuple[float, int, int]] = []
    trees = []
    for place, mixture in enumerate(mixtures):
        _finite_experts(mixture, method)
        trees.append(linkage(mixture.router.weight.double().cpu().numpy(), "complete"))
        merges += [
            (float(height), place, step)
            for step, height in enumerate(trees[-1][: mixture.n_experts - mixture.chosen, 2])
        ]
    gone = round(sum(mixture.n_experts for mixture in mixtures) * sparsity)
    done = [0] * len(mixtures)
    for _, place, _ in sorted(merges)[:gone]:  # heights rise, so the first ones of each tree
        done[place] += 1
    changes = [Change(mixture) for mixture in mixtures]
    for change, tree, n in zip(changes, trees, done, strict=True):
        for members in _clusters(tree, n):
            if len(members) > 1:
                change.dropped[members] = True
                change.dropped[_central(change.mixture, members)] = False
    return changes


def _finite_experts(mixture: Mixture, method: MixtureMethod) -> None:
    wrong = [
        number
        for number in range(mixture.n_experts)
        if not all(bool(s.weight[number].isfinite().all()) for s in mixture.bank.stacks.values())
    ]
    if wrong or not bool(mixture.router.weight.isfinite().all()):
        where = f"expert {wrong[0]}" if wrong else "the router"
        raise InvalidInput(
            f"weights of {where} of {mixture.name!r} are not finite ({method.name}); mend the "
            "model."
        )


def _clusters(tree: Any, steps: int) -> Iterator[list[int]]:
    """Yield the clusters after the first ``steps`` merges of a tree of scipy's."""
    n = len(tree) + 1
    members = {number: [number] for number in range(n)}
    for step in range(steps):
        a, b = (int(one) for one in tree[step, :2])
        members[n + step] = sorted(members.pop(a) + members.pop(b))
    yield from members.values()


def _central(mixture: Mixture, members: Sequence[int]) -> int:
    """Return the expert whose weights are nearest to the members' mean."""
    distances = torch.zeros(len(members)).double()
    for stack in mixture.bank.stacks.values():
        own = stack.weight[list(members)].double()
        distances += (own - own.mean(0)).square().sum((1, 2)).cpu()
    return members[int(distances.argmin())]


def _cluster_then_sparsen(
    statistics: Statistics, method: MixtureMethod, sparsity: float
) -> list[Change]:
    """Drop experts and zero weights of the others: each keeps the root of the density."""
    each = 1 - (1 - sparsity) ** 0.5
    changes = _cluster(statistics, method, each)
    left = sum(int((~one.dropped).sum()) for one in changes)
    share_left = left / sum(len(one.dropped) for one in changes)
    rest = 1 - (1 - sparsity) / share_left
    if rest <= 0:
        return changes
    with PrunedMixtures(statistics, changes).applied():
        again = gather(statistics.model, statistics.calibration)
    for change, seen in zip(changes, again.mixtures, strict=True):
        change.powers, change.sparsity = seen, rest
    return changes


def _frequency(mixture: Mixture) -> Tensor:
    return mixture.counts


def _activation_norm(mixture: Mixture) -> Tensor:
    return mixture.norms


def _mean_norm(mixture: Mixture) -> Tensor:
    return mixture.mean(mixture.norms)


def _mean_square(mixture: Mixture) -> Tensor:
    return mixture.mean(mixture.squares)


def _reap(mixture: Mixture) -> Tensor:
    mixture.need_gates("reap")
    return mixture.mean(mixture.gated)


def _easy_ep(mixture: Mixture) -> Tensor:
    mixture.need_turning("easy-ep")
    return mixture.turning


def _mone(mixture: Mixture) -> Tensor:
    """Norm of the outputs' standard deviations times the mean routing weight over all tokens."""
    mixture.need_gates("mone")
    counts = mixture.counts.clamp_min(1)[:, None]
    variance = mixture.outputs_squared / counts - (mixture.outputs / counts).square()
    return variance.clamp_min(0).sum(1).sqrt() * mixture.gates / max(1, mixture.tokens)


def _heapr(mixture: Mixture) -> Tensor:
    """Return the mean square of a neuron times that of the loss's derivative by it.

    The derivative by neuron k is ``w_k · g``, with g that by the expert's output, so its mean
    square is ``w_k' M w_k``.
    """
    return torch.where(
        mixture.counts[:, None] > 0,
        mixture.mean(mixture.neurons) * mixture.mean(mixture.sensitivity), -1.0,
    )  # fmt: skip


def _usage(mixture: Mixture) -> Tensor:
    """Share of a mixture's calls; its weights must be finite to be merged."""
    _finite_experts(mixture, MIXTURE_METHODS["m-smoe"])
    return mixture.counts / mixture.counts.sum().clamp_min(1)


def as_mixture_method(name: str, thing: Any) -> MixtureMethod:
    """Return a method: ``thing`` itself, or one made of a function of a `Mixture`.

    The function returns a number for every expert (the lowest of each mixture are dropped), or for
    every neuron of every expert (the lowest of all mixtures are removed).
    """
    if isinstance(thing, MixtureMethod):
        return replace(thing, name=name)
    if not callable(thing):
        raise InvalidInput(
            f"a method for mixtures must be a function of `Mixture`; {name!r} is "
            f"{type(thing).__name__}."
        )
    return MixtureMethod(name, "", thing, _drop_or_remove)


def _drop_or_remove(statistics: Statistics, method: MixtureMethod, sparsity: float) -> list[Change]:
    flat = all(scores_of(method, one).ndim == 1 for one in statistics.mixtures)
    return (_drop if flat else _remove)(statistics, method, sparsity)


MIXTURE_METHODS: Door[MixtureMethod] = Door("mixtures", as_mixture_method)
"""Methods of pruning mixtures by name."""

_UNIFIED = "arXiv 2606.15716"
_OURS: tuple[tuple[str, str, Callable[[Mixture], Tensor], Maker], ...] = (
    ("frequency", "tokens that an expert is sent", _frequency, _drop),
    ("ean", "sum of the norms of an expert's outputs", _activation_norm, _drop),
    ("reap", "arXiv 2510.13999; github.com/CerebrasResearch/reap", _reap, _drop),
    ("man", f"{_UNIFIED}: mean norm of outputs", _mean_norm, _drop),
    ("msan", f"{_UNIFIED}: mean squared norm of outputs", _mean_square, _drop),
    ("easy-ep", "github.com/RUCAIBox/EASYEP", _easy_ep, _drop),
    ("mone", "github.com/zxgx/mode-pd: mean outputs in place of experts", _mone, _replace),
    ("m-smoe", "github.com/UNITES-Lab/MC-SMoE, without distillation", _usage, _merge),
    ("stun", "github.com/thnkinbtfly/STUN, then Wanda", _frequency, _cluster_then_sparsen),
    ("stun-experts", "github.com/thnkinbtfly/STUN, its first stage", _frequency, _cluster),
)  # fmt: skip
for _name, _source, _score, _make in _OURS:
    MIXTURE_METHODS.own(_name, MixtureMethod(_name, _source, _score, _make), source=_source)
_source = "github.com/LLIKKE/HEAPr, from its formula"
MIXTURE_METHODS.own(
    "heapr", MixtureMethod("heapr", _source, _heapr, _remove, gradients=True), source=_source
)
