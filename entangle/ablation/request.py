"""Which selections a sweep is asked for, and the selections themselves."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from entangle.ablation.selection import MATCHED, Selection, select
from entangle.errors import InvalidInput, unknown_name

DEFAULT = ("top", "bottom", "random")
"""Selections of an ablation, unless others are asked for."""


@dataclass(frozen=True, eq=False)
class Request:
    """Which selections are asked for; the fields are explained at `entangle.ablate`."""

    wanted: Sequence[str | Selection]
    columns: Sequence[str]
    fraction: float | None
    count: int | None
    scope: str
    seeds: int
    seed: int

    def check(self) -> None:
        """Raise `UnknownName` or `InvalidInput` for what can be seen without scores."""
        known = (*DEFAULT, *MATCHED, "all")
        for one in self.wanted:
            if not isinstance(one, Selection) and one not in known:
                raise unknown_name("selection", one, known)
        if not self.wanted or not self.columns:
            raise InvalidInput("`selections` and `by` must name at least one; got none.")
        if isinstance(self.seeds, bool) or self.seeds < 1:
            raise InvalidInput(f"`seeds` must be at least 1; got {self.seeds}.")
        if self.fraction is not None and not 0.0 < self.fraction <= 1.0:
            raise InvalidInput(f"`fraction` must be in (0, 1]; got {self.fraction}.")

    def describe(self) -> dict[str, object]:
        """Return the request, JSON-serialisable."""
        named = [s if isinstance(s, str) else s.describe() for s in self.wanted]
        return {
            "selections": named, "by": list(self.columns), "fraction": self.fraction,
            "count": self.count, "scope": self.scope, "seeds": self.seeds,
        }  # fmt: skip

    def selections(self, frame: pd.DataFrame) -> list[Selection]:
        """Return every selection, random ones once a seed; no two may have one name."""
        found = list(self._each(frame))
        names = [(one.rule, one.by, one.seed) for one in found]
        for name, one in zip(names, found, strict=True):
            if names.count(name) > 1:
                raise InvalidInput(
                    f"two selections are called {one.name!r} and could not be told apart; ablate "
                    "them one after the other."
                )
        return found

    def _each(self, frame: pd.DataFrame) -> Iterator[Selection]:
        size: dict[str, Any] = {"fraction": self.fraction, "count": self.count, "scope": self.scope}
        for one in dict.fromkeys(self.wanted):
            if isinstance(one, Selection):
                yield one
            elif one == "all":
                yield select(frame, one)
            elif one in ("top", "bottom"):
                for column in self.columns:
                    yield select(frame, one, by=column, **size)
            else:
                like = None
                if one in MATCHED:
                    like = select(frame, "top", by=self.columns[0], **size)
                for draw in range(self.seed, self.seed + self.seeds):
                    options: dict[str, Any] = size if like is None else {"like": like}
                    yield select(frame, one, seed=draw, **options)
