"""Minimal pairs: sentences that differ in one point, one acceptable and the other not."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from entangle.errors import InvalidInput

RESERVED = ("overall", "macro")
"""Names of rows over all paradigms in tables of accuracies."""


@dataclass(frozen=True, eq=False)
class MinimalPairs:
    """Pairs of sentences, each of a paradigm (one kind of contrast, such as ``wh_island``)."""

    good: tuple[str, ...]
    """Acceptable sentence of each pair, shape (n_pairs,)."""
    bad: tuple[str, ...]
    """Unacceptable sentence of each pair, shape (n_pairs,)."""
    paradigms: tuple[str, ...]
    """Paradigm of each pair, shape (n_pairs,)."""
    source: str
    """What the user gave: ``blimp``, a data set's id or a path."""
    settings: Mapping[str, object]
    """Everything else that decided the pairs; JSON-serialisable."""

    def __post_init__(self) -> None:
        sizes = {len(self.good), len(self.bad), len(self.paradigms)}
        if len(sizes) > 1 or not self.good:
            raise InvalidInput(
                "`good`, `bad` and `paradigms` must have one value for each of at least 1 pair; "
                f"got {len(self.good)}, {len(self.bad)} and {len(self.paradigms)}."
            )
        for number, (good, bad) in enumerate(zip(self.good, self.bad, strict=True)):
            check_pair(good, bad, f"pair {number}")
        for name in set(self.paradigms) & set(RESERVED):
            raise InvalidInput(
                f"a paradigm must not be called {name!r}, which names a row over all paradigms; "
                "rename it."
            )
        copied = json.loads(json.dumps(dict(self.settings)))
        object.__setattr__(self, "settings", MappingProxyType(copied))

    @property
    def n_pairs(self) -> int:
        """Number of pairs."""
        return len(self.good)

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Number of pairs of every paradigm, in the order in which they come first."""
        return MappingProxyType(dict(Counter(self.paradigms)))

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of paradigm, good and bad sentence, as one JSON list a line."""
        rows = zip(self.paradigms, self.good, self.bad, strict=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        return hashlib.sha256(lines.encode()).hexdigest()

    def describe(self) -> dict[str, object]:
        """Return source, counts, digest and settings, JSON-serialisable, for a run's manifest."""
        return {
            "source": self.source,
            "n_pairs": self.n_pairs,
            "paradigms": dict(self.counts),
            "digest": self.digest,
            "settings": dict(self.settings),
        }


def check_pair(good: str, bad: str, where: str) -> None:
    """Raise `InvalidInput` if a sentence is empty or no Unicode text, or both are the same."""
    if not good.strip() or not bad.strip():
        raise InvalidInput(f"both sentences of a pair must hold text; one of {where} is empty.")
    if any("\ud800" <= character <= "\udfff" for character in good + bad):
        raise InvalidInput(
            f"both sentences of a pair must be Unicode text; one of {where} has half a surrogate "
            "pair: mend it."
        )
    if good == bad:
        raise InvalidInput(f"the sentences of a pair must differ; both of {where} are {good!r}.")
