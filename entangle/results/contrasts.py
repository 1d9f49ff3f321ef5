"""Differences between two arms, with intervals from what both were measured on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entangle.checks import named, plain_value, shown
from entangle.errors import InvalidInput, unknown_name
from entangle.stats.intervals import (
    Interval,
    pairs_interval,
    perplexity_ratio_interval,
    window_difference_interval,
)

ARM = ["intervention", "strength", "experts", "router", "selection", "by", "seed"]
"""Columns that name an arm."""
SETTING = ["intervention", "strength", "experts", "router"]
"""Columns that arms to be compared usually have in common."""
RATIOS = ("perplexity", "perplexity_ratio")
"""Measures whose comparison is a ratio; that of all others is a difference."""
PARADIGM = "accuracy:"
"""Start of the accuracy on one paradigm of minimal pairs; ``accuracy:macro`` is their mean."""

_BY_WINDOW = {"perplexity": "loss", "perplexity_ratio": "loss", "kl": "kl",
              "top1_agreement": "agreement"}  # fmt: skip
_BY_PAIR = ("accuracy", "accuracy_difference")


@dataclass(frozen=True, eq=False)
class Compared:
    """The raw numbers of every arm that a measure is made of."""

    measure: str
    """As in the column ``measure`` of an ablation's table."""
    table: pd.DataFrame
    """One row an arm and window or pair: columns of `ARM`, ``item``, ``value`` and ``stratum``."""
    text: Mapping[str, object]
    """Description of the evaluation text; empty for pairs."""

    @staticmethod
    def can(measure: str, windows: pd.DataFrame, pairs: pd.DataFrame) -> bool:
        """Tell whether an ablation's tables hold the numbers that a measure is made of."""
        if measure in _BY_WINDOW:
            return _BY_WINDOW[measure] in windows
        return "good" in pairs and (measure in _BY_PAIR or "paradigm" in pairs)

    @classmethod
    def of(
        cls, measure: str, windows: pd.DataFrame, pairs: pd.DataFrame, text: object
    ) -> "Compared":
        """Choose the numbers of a measure from an ablation's tables.

        Raises
        ------
        UnknownName, InvalidInput
            If there is no such measure, or the ablation did not take it.
        """
        measure = named("measure", measure)
        by_pair = measure in _BY_PAIR or measure.startswith(PARADIGM)
        if not by_pair and measure not in _BY_WINDOW:
            raise unknown_name(
                "measure to compare", measure, [*_BY_WINDOW, *_BY_PAIR, f"{PARADIGM}PARADIGM"]
            )
        source, column = (pairs, "good") if by_pair else (windows, _BY_WINDOW[measure])
        if column not in source:
            raise InvalidInput(
                f"this ablation measured no {measure.partition(':')[0]}, which is to be compared; "
                "measure it too."
            )
        if not by_pair:
            table = source.rename(columns={"window": "item", column: "value"}).assign(stratum="")
            return cls(measure, table, text if isinstance(text, Mapping) else {})
        right = (source["good"] > source["bad"]).astype(np.float64)
        stratum = source.get("paradigm", "")
        table = source.assign(value=right, stratum=stratum).rename(columns={"pair": "item"})
        return cls(measure, _paradigm(table, measure), {})

    def arm(self, spec: str | Mapping[str, object]) -> pd.DataFrame:
        """Return the rows of the one arm that a selection's name, or columns of `ARM`, tell of.

        Raises
        ------
        UnknownName, InvalidInput
            If a column does not exist, or no arm or several are meant.
        """
        if not isinstance(spec, str | Mapping):
            raise InvalidInput(
                f"an arm must be a selection's name or columns and their values; got {shown(spec)}."
            )
        wanted: dict[str, Any] = {"selection": spec} if isinstance(spec, str) else dict(spec)
        part = self.table
        for name, value in wanted.items():
            if name not in ARM:
                raise unknown_name("column of an arm", name, ARM)
            known = part[name].dropna().unique().tolist()
            same: Any = plain_value(value)
            part = part[part[name].eq(same).fillna(value=False)]
            if part.empty:
                raise InvalidInput(f"no arm of {wanted} was measured; `{name}` may be {known}.")
        open_to = [name for name in ARM[:-1] if part[name].nunique(dropna=False) > 1]
        if open_to:
            values = part[open_to[0]].unique().tolist()
            raise InvalidInput(
                f"{wanted} must name one arm (its seeds aside); got several: say which "
                f"`{open_to[0]}` of {values}."
            )
        return part

    def interval(
        self, a: pd.DataFrame, b: pd.DataFrame, *, n_boot: int = 1000, level: float, seed: int
    ) -> Interval:
        """Compare two arms, given by their rows; values of several seeds are averaged."""
        first, second = (one.groupby("item", sort=True)["value"].mean() for one in (a, b))
        x, y = (np.ascontiguousarray(one.to_numpy(np.float64)) for one in (first, second))
        if self.measure in RATIOS:
            tokens, told = int(str(self.text["n_tokens"])), self.text.get("window_tokens")
            counts = np.full(len(x), tokens / len(x)) if told is None else np.array(told, float)
            return perplexity_ratio_interval(
                x, y, counts, tokens, n_boot=n_boot, level=level, seed=seed
            )
        if self.measure in _BY_WINDOW:
            return window_difference_interval(
                x, y, self._positions(len(x)), n_boot=n_boot, level=level, seed=seed
            )
        strata = a.drop_duplicates("item").sort_values("item")["stratum"].to_numpy()
        macro = self.measure == f"{PARADIGM}macro"
        return pairs_interval(x - y, strata, macro=macro, n_boot=n_boot, level=level, seed=seed)

    def _positions(self, windows: int) -> NDArray[np.int64]:
        """Predicted tokens of each window, which are told where they are not all as many."""
        each = int(str(self.text["n_tokens"])) // int(str(self.text["n_windows"]))
        told: Any = self.text.get("window_tokens")
        return np.full(windows, each) if told is None else np.array(told, dtype=np.int64)


def _paradigm(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return the pairs that an accuracy is of."""
    name = measure.removeprefix(PARADIGM)
    if measure in _BY_PAIR:
        return table
    if not table["stratum"].any():
        raise InvalidInput(
            "this ablation was saved without the pairs' paradigms; compare `accuracy`, or ablate "
            "anew."
        )
    if name == "macro":
        return table
    known = table["stratum"].unique().tolist()
    if name not in known:
        raise unknown_name("paradigm", name, known)
    return table[table["stratum"] == name]
