"""Doors for others' ideas: what can be chosen by name, and how to add to it.

A door is a mapping from names to things of one kind, ours and others' alike. Others come in by
`Door.register`, or by an entry point of the door's group in the metadata of an installed package,
which is loaded when its name is asked for::

    [project.entry-points."entangle.pruners"]
    mine = "my_package:prune"
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from entangle.errors import EntangleError, InvalidInput, unknown_name

Thing = TypeVar("Thing")

KINDS = ("pruners", "routers", "rules", "methods", "mixtures", "columns", "measures")
"""The doors: groups of entry points are ``entangle.`` and one of these."""


@dataclass(frozen=True)
class Plugin:
    """Where something that can be chosen comes from."""

    door: str
    """One of `KINDS`."""
    name: str
    source: str
    """Paper or repository, or the package that brought it."""


class Door(Mapping[str, Thing], Generic[Thing]):
    """What there is of one kind, by name.

    Parameters
    ----------
    kind
        One of `KINDS`.
    adapt
        Makes a thing out of what somebody gives, with its name; checks it.
    """

    def __init__(self, kind: str, adapt: Callable[[str, Any], Thing]) -> None:
        self.kind, self._adapt = kind, adapt
        self._things: dict[str, Thing] = {}
        self._sources: dict[str, str] = {}
        self._ours: set[str] = set()

    def register(self, name: str, thing: Any, *, source: str = "") -> None:
        """Add something.

        Parameters
        ----------
        name
            How it is chosen.
        thing
            What the door takes; see its documentation.
        source
            Paper, repository or package, for `entangle list`.

        Raises
        ------
        InvalidInput
            If the name is taken, or the door does not take such a thing.
        """
        word = isinstance(name, str) and name.split() == [name] and not set(name) & set(",=/:")
        if not word:
            raise InvalidInput(
                f"a name of {self.kind} must be a word without comma, =, / or :; got {name!r}."
            )
        if name in self._things or name in self._found():
            raise InvalidInput(
                f"{self.kind} already have {name!r} ({self.source(name)}); choose another name."
            )
        self._things[name] = self._adapt(name, thing)
        self._sources[name] = source

    def own(self, name: str, thing: Any, *, source: str) -> None:
        """Add something of this package's."""
        self.register(name, thing, source=source)
        self._ours.add(name)

    def remove(self, name: str) -> None:
        """Take out what `register` added."""
        self[name]
        self._things.pop(name)
        self._sources.pop(name, None)

    def _found(self) -> Mapping[str, EntryPoint]:
        return _installed(self.kind)

    def __getitem__(self, name: str) -> Thing:
        """Return a thing; load it where an installed package brings it."""
        if name in self._things:
            return self._things[name]
        found = self._found().get(name)
        if found is None:
            raise unknown_name(f"name of {self.kind}", name, list(self))
        try:
            made = self._adapt(name, found.load())
        except EntangleError:
            raise
        except Exception as error:
            raise InvalidInput(
                f"{self.kind} {name!r} of {_package(found)} cannot be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error
        self._things[name] = made
        return made

    def __iter__(self) -> Iterator[str]:
        """Go over the names, ours first."""
        yield from self._things
        yield from (name for name in self._found() if name not in self._things)

    def __len__(self) -> int:
        """Count the names."""
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        """Tell whether a name exists, without loading what it stands for."""
        return name in self._things or name in self._found()

    def is_ours(self, name: str) -> bool:
        """Tell whether something is part of this package."""
        return name in self._ours

    def source(self, name: str) -> str:
        """Return where something comes from."""
        if name in self._sources:
            return self._sources[name]
        found = self._found().get(name)
        return _package(found) if found is not None else ""

    def listed(self) -> list[Plugin]:
        """Return everything that can be chosen, with its source."""
        return [Plugin(self.kind, name, self.source(name)) for name in self]


def with_installed(kind: str, ours: Sequence[str]) -> tuple[str, ...]:
    """Return names of ours and of installed packages; nothing is loaded."""
    return (*ours, *(name for name in _installed(kind) if name not in ours))


def brought(door: "Door[Any]", names: Iterable[str]) -> dict[str, str]:
    """Return where those of some names of a door come from that are not ours, for manifests."""
    known = [one for one in dict.fromkeys(names) if one in door and not door.is_ours(one)]
    return {one: door.source(one) for one in known}


def packages() -> dict[str, dict[str, str]]:
    """Return what installed packages bring, by kind and name; nothing is loaded."""
    found = {kind: {n: _package(one) for n, one in _installed(kind).items()} for kind in KINDS}
    return {kind: brought for kind, brought in found.items() if brought}


def _package(found: EntryPoint) -> str:
    dist = found.dist
    return f"{dist.name} {dist.version}" if dist is not None else found.value


@cache
def _installed(kind: str) -> Mapping[str, EntryPoint]:
    """Return the entry points of installed packages.

    Raises
    ------
    InvalidInput
        If two packages bring one name.
    """
    found: dict[str, EntryPoint] = {}
    for one in entry_points(group=f"entangle.{kind}"):
        if one.name in found:
            raise InvalidInput(
                f"{_package(found[one.name])} and {_package(one)} both bring {kind} {one.name!r}; "
                "uninstall one of them."
            )
        found[one.name] = one
    return found
