"""What an allocation asks of an expansion: sparsity of every row, experts of every layer."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from entangle.allocation.allocation import Allocation
from entangle.errors import InvalidInput
from entangle.expansion.solve import Sparsity
from entangle.models.layers import Layer

Allocated = Allocation | Mapping[str, float | Tensor]
"""An allocation, or sparsities by layer name: for all rows, or one value a row."""


def planned_sparsity(
    layers: Sequence[Layer],
    allocation: Allocated | None,
    *,
    sparsity: float | None,
    pattern: str,
    digest: str,
) -> dict[str, Sparsity]:
    """Return the sparsity of every layer.

    Parameters
    ----------
    layers
        Layers to expand.
    allocation
        Decides, if given; one of class `Allocation` must be for these layers, and no others, of
        this model.
    sparsity
        Of all layers without an allocation.
    pattern
        As in `entangle.pruning.prune`.
    digest
        Of the model.

    Raises
    ------
    InvalidInput
        Naming what does not fit.
    """
    if allocation is None:
        return {layer.name: sparsity for layer in layers}
    if isinstance(allocation, Allocation):
        if pattern != "row":
            raise InvalidInput(
                "an allocation gives every row a number of zeros, which needs `pattern` 'row'; got "
                f"{pattern!r}."
            )
        allocation.check(layers, digest)
        return {layer.name: allocation.sparsity[layer.name] for layer in layers}
    for layer in layers:
        if allocation.get(layer.name) is None:
            raise InvalidInput(f"`allocation` must name every layer; {layer.name!r} is missing.")
    return {layer.name: allocation[layer.name] for layer in layers}


def planned_experts(
    layers: Sequence[Layer], allocation: Allocated | None, experts: int, *, tokens: int
) -> dict[str, int]:
    """Return the number of experts of every layer: the allocation's, if it has any.

    Raises
    ------
    InvalidInput
        If a number is below 1 or above the number of ``tokens`` to calibrate on.
    """
    counts = {layer.name: experts for layer in layers}
    if isinstance(allocation, Allocation) and allocation.experts is not None:
        counts = {name: allocation.experts[name] for name in counts}
    for count in dict.fromkeys(counts.values()):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InvalidInput(f"`experts` must be an integer of at least 1; got {count!r}.")
        if count > tokens:
            raise InvalidInput(
                f"`experts` must be at most the number of tokens to calibrate on, {tokens}; got "
                f"{count}."
            )
    return counts


def describe_allocation(allocation: Allocated | None) -> dict[str, object]:
    """Return what a manifest's settings record of an allocation; nothing for other sparsities."""
    if not isinstance(allocation, Allocation):
        return {}
    return {"allocation": dict(allocation.manifest) | {"overall": allocation.overall}}


def check_shared(groups: Sequence[Sequence[Layer]], experts: Mapping[str, int]) -> None:
    """Raise `InvalidInput` unless layers that read one input have equally many experts.

    They share a router, so that a token goes to the expert of one number in all of them.

    Parameters
    ----------
    groups
        From `entangle.recording.groups.shared_inputs`.
    experts
        By layer name.
    """
    for members in groups:
        first = members[0].name
        for layer in members[1:]:
            if experts[layer.name] != experts[first]:
                raise InvalidInput(
                    f"layers {first!r} and {layer.name!r} read one input and share a router, so "
                    f"their numbers of experts must be equal; got {experts[first]} and "
                    f"{experts[layer.name]}."
                )
