"""What an allocation asks of an expansion: sparsity of every row, experts of every layer."""

from collections.abc import Mapping, Sequence

from numpy import ndarray
from torch import Tensor, float64

from entangle.allocation.allocation import Allocation
from entangle.checks import real, tensor_of, whole
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
        As in `entangle.pruning.prune`; with an allocation ``row``, or the allocation's own.
    digest
        Of the model.

    Raises
    ------
    InvalidInput
        Naming what does not fit.
    """
    if allocation is None:
        share = _share(sparsity)
        return {layer.name: share for layer in layers}
    if isinstance(allocation, Allocation):
        if pattern not in ("row", allocation.pattern):
            own = "" if allocation.pattern == "row" else f" or its own, {allocation.pattern!r}"
            raise InvalidInput(
                "an allocation gives every row a number of zeros, which needs `pattern` 'row'"
                f"{own}; got {pattern!r}."
            )
        allocation.check(layers, digest)
        return {layer.name: allocation.sparsity[layer.name] for layer in layers}
    if not isinstance(allocation, Mapping):
        raise InvalidInput(
            "`allocation` must be an Allocation, from entangle.allocation.load_allocation, or "
            f"sparsities by layer name; got {type(allocation).__name__}."
        )
    for layer in layers:
        if allocation.get(layer.name) is None:
            raise InvalidInput(f"`allocation` must name every layer; {layer.name!r} is missing.")
    return {layer.name: _share(allocation[layer.name]) for layer in layers}


def _share(sparsity: object) -> Sparsity:
    """Return one sparsity as a float, several as a tensor."""
    if sparsity is None or isinstance(sparsity, Tensor):
        return sparsity
    if isinstance(sparsity, Sequence | ndarray) and not isinstance(sparsity, str):
        return tensor_of("sparsity", sparsity, float64)
    return real("sparsity", sparsity)


def planned_pattern(allocation: Allocated | None, pattern: str) -> str:
    """Return the pattern to prune in: that of an allocation that was made for n:m is its own."""
    return allocation.pattern if isinstance(allocation, Allocation) else pattern


def planned_experts(
    layers: Sequence[Layer], allocation: Allocated | None, experts: int, *, tokens: int
) -> dict[str, int]:
    """Return the number of experts of every layer: the allocation's, if it has any.

    Raises
    ------
    InvalidInput
        If a number is below 1 or above the number of ``tokens`` to calibrate on.
    """
    experts = whole("experts", experts, least=1)
    counts = {layer.name: experts for layer in layers}
    if isinstance(allocation, Allocation) and allocation.experts is not None:
        counts = {name: allocation.experts[name] for name in counts}
    for count in dict.fromkeys(counts.values()):
        check_experts(count, tokens=tokens)
    return counts


def check_experts(count: int, *, tokens: int) -> None:
    """Raise `InvalidInput` unless so many experts can be fitted on so many tokens."""
    if whole("experts", count, least=1) > tokens:
        raise InvalidInput(
            f"`experts` must be at most the number of tokens to calibrate on, {tokens}; got "
            f"{count}."
        )


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
        From `entangle.recording.recorder.shared_inputs`.
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
