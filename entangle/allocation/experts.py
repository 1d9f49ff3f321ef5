"""More experts where more neurons are entangled, at equal stored non-zeros.

What an allocation is called in tables and files.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from entangle.allocation.allocation import ROW, Allocation, Reals
from entangle.checks import choice, several, share, whole
from entangle.errors import InvalidInput
from entangle.models.layers import Layer
from entangle.results.scores import NeuronScores

_HALVINGS = 100


@dataclass(frozen=True, eq=False)
class _Groups:
    """Layers that share a router, and so have one number of experts."""

    members: list[list[str]]
    nonzeros: Reals
    """Non-zeros of one expert of every layer of the group."""
    demand: Reals
    """Share of the group's neurons that are entangled."""

    def stored(self, experts: Reals) -> float:
        return float((experts * self.nonzeros).sum())


def expert_budget(
    allocation: Allocation,
    scores: NeuronScores | pd.DataFrame,
    *,
    experts: int = 16,
    by: str = "wd",
    fraction: float = 0.03,
    lowest: int = 1,
    highest: int | None = None,
    groups: Iterable[Sequence[str | Layer]] | None = None,
) -> Allocation:
    """Share experts out by the number of entangled neurons, at equal stored non-zeros.

    Entangled are the ``fraction`` of all neurons with the largest ``by``. A group g of layers that
    share a router, of which a share e_g is entangled, gets ``k_g = lowest + c · e_g`` experts, at
    most ``highest``; one without any gets ``lowest``. An expert of the group stores its non-zeros,
    ``n_g = Σ (weights − zeros)``, so that c is chosen for ``Σ k_g n_g = experts · Σ n_g``, what
    ``experts`` experts in every layer would store. What groups at ``highest`` cannot take goes to
    the others evenly. The k_g are rounded down, and a group at a time, the largest remainders
    first, up again where the budget still holds: the total is never above that of equal numbers,
    and short of it by less than the non-zeros of the smallest group that has room.

    Parameters
    ----------
    allocation
        Its zeros stay as they are.
    scores
        Scores of its layers, or their ``frame``.
    experts
        Experts a layer, whose stored non-zeros are the budget.
    by
        Numeric column of the scores; neurons without a value are not entangled.
    fraction
        In (0, 1].
    lowest, highest
        Least and greatest number of experts; by default 1 and twice ``experts``.
    groups
        Layers, or their names, that read one input, from
        `entangle.recording.groups.shared_inputs`; by default the layers of a block together,
        which every model allows.

    Returns
    -------
    Allocation
        With ``experts``, and the settings in its manifest under ``expert_budget``.

    Raises
    ------
    InvalidInput, UnknownName
        If a setting is out of range, or scores or groups do not fit the allocation.
    """
    experts, lowest = whole("experts", experts, least=1), whole("lowest", lowest, least=1)
    highest = whole("highest", 2 * experts if highest is None else highest, least=1)
    if not lowest <= experts <= highest:
        raise InvalidInput(
            f"`experts` must lie between `lowest` and `highest`; got {experts}, which is not in "
            f"[{lowest}, {highest}]."
        )
    fraction = share("fraction", fraction, zero=False)
    frame = scores.frame if isinstance(scores, NeuronScores) else scores
    entangled = _entangled(allocation, frame, by, fraction)
    found = _group(allocation, groups, entangled)
    counts = _round(found, _fill(found, experts, lowest, highest), experts, highest)
    by_layer = {
        name: int(count)
        for members, count in zip(found.members, counts, strict=True)
        for name in members
    }
    settings = {
        "experts": experts, "by": by, "fraction": fraction, "lowest": lowest, "highest": highest,
        "stored_nonzeros": int(found.stored(counts)),
        "equal_numbers_store": int(experts * found.nonzeros.sum()),
    }  # fmt: skip
    return replace(
        allocation,
        experts={name: by_layer[name] for name in allocation.zeros},
        manifest=dict(allocation.manifest) | {"expert_budget": settings},
    )


def mean_experts(allocation: Allocation) -> float:
    """Return the equal number of experts that would store as many non-zeros.

    Raises
    ------
    InvalidInput
        If the allocation has no numbers of experts.
    """
    if allocation.experts is None:
        raise InvalidInput("the allocation has no numbers of experts; make them first.")
    kept = _kept(allocation)
    total = sum(kept.values())
    if total == 0:
        return float(np.mean(list(allocation.experts.values())))
    return sum(allocation.experts[name] * kept[name] for name in kept) / total


def _kept(allocation: Allocation) -> dict[str, int]:
    """Return the non-zeros of one expert of every layer."""
    return {
        name: zeros.numel() * allocation.in_features[name] - int(zeros.sum())
        for name, zeros in allocation.zeros.items()
    }


def _entangled(
    allocation: Allocation, frame: pd.DataFrame, by: str, fraction: float
) -> Mapping[str, int]:
    """Count the entangled neurons of every layer."""
    numeric = frame.select_dtypes("number").columns.tolist()
    remedy = "Choose a numeric column of the scores."
    by = choice("by", by, numeric, kind="column", remedy=remedy)
    sizes = frame.groupby("layer", sort=False).size()
    for name in allocation.zeros:
        if sizes.get(name, 0) != allocation.rows(name):
            raise InvalidInput(
                f"the scores must hold the {allocation.rows(name)} neurons of layer {name!r}; got "
                f"{sizes.get(name, 0)}: give the scores that the allocation was made from."
            )
    own = frame[frame["layer"].isin(list(allocation.zeros))]
    values = own[by].replace([np.inf, -np.inf], np.nan).dropna()
    wanted = min(len(values), max(1, round(fraction * len(own))))
    chosen = values.sort_values(ascending=False, kind="stable").index[:wanted]
    return {str(name): int(n) for name, n in own.loc[chosen].groupby("layer").size().items()}


def _group(
    allocation: Allocation,
    groups: Iterable[Sequence[str | Layer]] | None,
    entangled: Mapping[str, int],
) -> _Groups:
    if groups is None:
        by_block: dict[object, list[str]] = {}
        for name in allocation.zeros:
            by_block.setdefault(allocation.blocks.get(name, name), []).append(name)
        members = list(by_block.values())
    else:
        members = [
            [str(getattr(one, "name", one)) for one in several("groups", group, Layer)]
            for group in groups
            if len(group)
        ]
    named = [name for group in members for name in group]
    if sorted(named) != sorted(allocation.zeros):
        odd = sorted(set(named) ^ set(allocation.zeros)) or sorted(named)
        raise InvalidInput(
            f"`groups` must name every layer of the allocation once; {odd[0]!r} is not."
        )
    kept = _kept(allocation)
    return _Groups(
        members,
        np.array([sum(kept[name] for name in group) for group in members], dtype=np.float64),
        np.array(
            [
                sum(entangled.get(name, 0) for name in group)
                / sum(allocation.rows(name) for name in group)
                for group in members
            ]
        ),
    )


def _fill(groups: _Groups, experts: int, lowest: int, highest: int) -> Reals:
    """Return numbers of experts, not yet whole, that store what equal numbers would."""
    budget = experts * groups.nonzeros.sum()
    wanting = groups.demand > 0
    full = np.where(wanting, float(highest), float(lowest))
    if groups.stored(full) <= budget:
        return _bisect(groups, budget, full, (~wanting).astype(np.float64), highest)
    base = np.full(len(groups.demand), float(lowest))
    return _bisect(groups, budget, base, groups.demand, highest)


def _bisect(groups: _Groups, budget: float, base: Reals, slope: Reals, highest: int) -> Reals:
    """Return ``min(base + c · slope, highest)`` with the c that stores the budget."""
    rising = slope[slope > 0]
    low, high = 0.0, highest / float(rising.min()) if len(rising) else 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if groups.stored(np.minimum(base + middle * slope, highest)) <= budget:
            low = middle
        else:
            high = middle
    filled: Reals = np.minimum(base + low * slope, highest)
    return filled


def _round(groups: _Groups, wanted: Reals, experts: int, highest: int) -> Reals:
    """Round down, then up one group at a time as long as the budget holds."""
    budget = experts * groups.nonzeros.sum()
    counts = np.floor(wanted + 1e-9)
    order = np.argsort(counts - wanted, kind="stable")
    raised = True
    while raised:
        raised = False
        for index in order:
            left = budget - groups.stored(counts)
            if counts[index] < highest and 0 < groups.nonzeros[index] <= left:
                counts[index] += 1
                raised = True
    return counts


def rule_label(allocation: Allocation) -> str:
    """Return the rule and the columns that it read, if any, for example ``protect wd`` or ``owl``.

    A rule whose strength was searched for is ``search: linear wd``.
    """
    return allocation.rule


def nominal_sparsity(allocation: Allocation) -> float:
    """Return the overall sparsity as it was asked for: to 4 digits, if that is the same budget."""
    rounded = round(allocation.overall, 4)
    same = round(rounded * allocation.n_weights) == allocation.n_zeros
    return rounded if same else allocation.overall


def zeros_digest(allocation: Allocation) -> str:
    """Return the SHA-256 of all layers' names and zeros, and of an n:m pattern, in hexadecimal."""
    digest = hashlib.sha256()
    if allocation.pattern != ROW:
        digest.update(f"{allocation.pattern}\n".encode())
    for name, zeros in allocation.zeros.items():
        digest.update(f"{name}\t{len(zeros)}\n".encode())
        digest.update(zeros.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
