"""The arms of a comparison: pruning methods and expansions, at several sparsities."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from entangle.allocation.allocation import Allocation
from entangle.allocation.experts import mean_experts, nominal_sparsity
from entangle.checks import choice, named, several, share, shown, whole
from entangle.errors import InvalidInput
from entangle.results.comparison import METHODS, UNIFORM

Named = tuple[str, Allocation]
"""What an allocation is called in the tables, and the allocation. Those of several sparsities may
have one name."""


@dataclass(frozen=True)
class Arm:
    """One model to build."""

    method: str
    """A key of `METHODS`."""
    sparsity: float
    """Share of zeros: in every row, or of all layers together with an allocation."""
    experts: int
    """Experts a layer (on average with an allocation that has its own); 1 without a router."""
    allocation: str = UNIFORM
    """Name of the allocation, or ``uniform``: ``sparsity`` in every row."""

    @property
    def key(self) -> str:
        """Digest of what makes the arm, which names its file."""
        content = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """A short name for messages."""
        allocated = "" if self.allocation == UNIFORM else f" {self.allocation}"
        return f"{self.method} {self.sparsity:g} k={self.experts}{allocated}"


def arms(
    methods: str | Iterable[str],
    sparsities: float | Iterable[float],
    experts: int | Iterable[int],
    *,
    allocations: Named | Iterable[Named] = (),
) -> list[Arm]:
    """Return the models to build: methods without a router once, others for every count above 1.

    What is listed twice is built once. One expert of a method with a router is the plain method.

    Parameters
    ----------
    methods
        Keys of `METHODS`.
    sparsities
        Shares of zeros in [0, 1], the same in every row.
    experts
        Numbers of experts a layer.
    allocations
        Every method is built with each of them too. One that has numbers of experts of its own is
        built with those, in place of ``experts``.

    Raises
    ------
    InvalidInput, UnknownName
        A method that does not exist, a number out of range, or nothing to build.
    """
    methods = [choice("method", one, METHODS) for one in several("methods", methods, empty=True)]
    sparsities = [share("sparsity", one) for one in several("sparsity", sparsities, empty=True)]
    experts = [whole("experts", k, least=1) for k in several("experts", experts, empty=True)]
    allocations = several_named(allocations)
    routed = {method for method in methods if METHODS[method][1] != "single"}
    levels: list[tuple[float, str, Allocation | None]]
    levels = [(sparsity, UNIFORM, None) for sparsity in sparsities]
    levels += [(sparsity, name, one) for (name, sparsity), one in by_name(allocations).items()]
    found = [
        Arm(method, sparsity, k, name)
        for sparsity, name, allocation in levels
        for method in methods
        for k in (_counts(allocation, experts) if method in routed else [1])
    ]
    if not found:
        raise InvalidInput(
            "there is nothing to build: name at least one method, one `sparsity` and, for methods "
            f"with a router, a number of `experts` above 1; got methods {list(methods)}, "
            f"sparsity {list(sparsities)} and experts {list(experts)}."
        )
    return list(dict.fromkeys(found))


def several_named(allocations: Named | Iterable[Named]) -> list[Named]:
    """Return named allocations, or one, as a list."""
    if isinstance(allocations, tuple) and len(allocations) == 2:
        name, one = allocations
        if isinstance(name, str) and isinstance(one, Allocation):
            return [(name, one)]
    found = several("allocations", allocations, empty=True)
    for one in found:
        if not (isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], Allocation)):
            raise InvalidInput(
                f"`allocations` must be pairs of a name and an Allocation; got {shown(one)}."
            )
    return [(named("allocations", name), one) for name, one in found]


def by_name(allocations: Sequence[Named]) -> dict[tuple[str, float], Allocation]:
    """Return allocations by name and sparsity, which must tell them apart."""
    found: dict[tuple[str, float], Allocation] = {}
    for name, allocation in allocations:
        key = name, nominal_sparsity(allocation)
        if name == UNIFORM:
            raise InvalidInput(f"an allocation must not be called {UNIFORM!r}; rename it.")
        if key in found:
            raise InvalidInput(
                f"two allocations of sparsity {key[1]:g} are called {name!r} and could not be told "
                "apart; rename one."
            )
        found[key] = allocation
    return found


def _counts(allocation: Allocation | None, experts: Sequence[int]) -> list[int]:
    if allocation is None or allocation.experts is None:
        return [k for k in experts if k > 1]
    return [round(mean_experts(allocation))]


def common_layers(allocations: Sequence[Named]) -> list[str] | None:
    """Return the layers of all allocations, None without any; they must have one pattern too."""
    first: tuple[str, list[str]] | None = None
    patterns = sorted({allocation.pattern for _, allocation in allocations})
    if len(patterns) > 1:
        raise InvalidInput(
            f"allocations that are compared must have one pattern; got {' and '.join(patterns)}."
        )
    for name, allocation in allocations:
        layers = list(allocation.zeros)
        first = first or (name, layers)
        if layers != first[1]:
            raise InvalidInput(
                f"allocations that are compared must be for the same layers; {first[0]!r} has "
                f"{len(first[1])} and {name!r} has {len(layers)}, or others."
            )
    return None if first is None else first[1]
