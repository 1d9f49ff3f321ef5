"""Which selections a sweep is asked for, and the selections themselves."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from entangle.ablation.candidates import DERIVED, SCORED, column
from entangle.ablation.selection import MATCHED, SCOPES, Selection, select
from entangle.checks import choice, share, whole
from entangle.errors import InvalidInput, unknown_name
from entangle.models.layers import Layer

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

    def check(
        self, layers: Sequence[Layer], *, md: bool = True, scores: pd.DataFrame | None = None
    ) -> None:
        """Raise `UnknownName` or `InvalidInput` for what can be seen before neurons are scored.

        Parameters
        ----------
        layers
            Those whose neurons are changed.
        md
            Whether mapping difficulty will be computed.
        scores
            Table of scores made before, if there are some.
        """
        known = (*DEFAULT, *MATCHED, "all")
        for one in self.wanted:
            if not isinstance(one, Selection):
                choice("selections", one, known, kind="selection")
        if not self.wanted or not self.columns:
            raise InvalidInput("`selections` and `by` must name at least one; got none.")
        whole("seeds", self.seeds, least=1)
        if self.count is not None:
            whole("count", self.count, least=1)
        if self.fraction is not None:
            share("fraction", self.fraction, zero=False)
        if (self.fraction is None) == (self.count is None):
            raise InvalidInput(
                "a selection takes exactly one of `fraction` and `count`; got "
                f"{self.fraction} and {self.count}: drop one of them."
            )
        choice("scope", self.scope, SCOPES)
        self._check_columns(md=md, scores=scores)
        sizes = {layer.name: layer.out_features for layer in layers}
        self._check_sizes(sizes)
        for one in self.wanted:
            if isinstance(one, Selection):
                _check_rows(one, sizes)

    def _check_columns(self, *, md: bool, scores: pd.DataFrame | None) -> None:
        known = (*SCORED, *(name for name, (source, _) in DERIVED.items() if source in SCORED))
        for name in self.columns:
            if scores is None and name not in known:
                raise unknown_name("column", name, known, "Choose a column of the scores.")
            missing = not md if scores is None else column(scores, name).isna().all()
            if missing and (scores is not None or name == "md"):
                raise InvalidInput(
                    f"`by` {name} needs scores that hold it; compute it (for md: md=True, without "
                    "--no-md), or rank by another column."
                )

    def _check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Refuse more neurons than there are, with as many again for matched controls."""
        pools = {f"layer {name!r}": size for name, size in sizes.items()}
        if self.scope == "model":
            pools = {"the model": sum(sizes.values())}
        matched = any(isinstance(one, str) and one in MATCHED for one in self.wanted)
        if not matched and not {*DEFAULT} & {one for one in self.wanted if isinstance(one, str)}:
            return
        for name, size in pools.items():
            count = self.count or max(1, round((self.fraction or 0.0) * size))
            if count > size:
                raise InvalidInput(
                    f"a selection of {count} neurons does not fit {name}, which has {size}; lower "
                    "`fraction` or `count`."
                )
            if matched and self.scope == "layer" and 2 * count > size:
                raise InvalidInput(
                    f"matched controls of {count} neurons do not fit {name} beside the top ones, "
                    f"as it has {size}; lower `fraction` or `count`."
                )

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


def _check_rows(selection: Selection, sizes: Mapping[str, int]) -> None:
    """Check that the rows of a selection are neurons of the chosen layers, given by their sizes."""
    if not selection.n_rows:
        raise InvalidInput(f"the selection {selection.name!r} must hold a neuron; got none.")
    for name, rows in selection.rows.items():
        if name not in sizes:
            raise unknown_name(
                f"layer of the selection {selection.name!r} among the chosen ones:", name, sizes,
                "Choose its layer too (`layers`, --layer).",
            )  # fmt: skip
        outside = [int(row) for row in rows if not 0 <= row < sizes[name]]
        if outside or len(set(rows.tolist())) < len(rows):
            raise InvalidInput(
                f"rows of layer {name!r} in the selection {selection.name!r} must be different "
                f"and in 0..{sizes[name] - 1}; got {outside[:1] or 'one twice'}: select from the "
                "scores of this model."
            )
