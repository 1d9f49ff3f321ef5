"""The layers of a result as two menus: blocks, and what each block holds."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from entangle.escapes import visible

OUTSIDE = "outside the blocks"


@dataclass(frozen=True)
class LayerMenu:
    """Names of layers by block and by what they are called inside it."""

    blocks: Mapping[str, Mapping[str, str]]
    """By the block's label: from a layer's label to its full name."""

    @classmethod
    def of(cls, layers: pd.DataFrame) -> "LayerMenu":
        """Make the menus of a table with the columns ``layer``, ``block`` and ``projection``."""
        blocks: dict[str, list[str]] = {}
        for name, block in zip(layers["layer"], layers["block"], strict=True):
            blocks.setdefault(OUTSIDE if pd.isna(block) else str(int(block)), []).append(str(name))
        return cls({block: _labelled(names) for block, names in blocks.items()})

    def label(self, name: str) -> tuple[str, str]:
        """Return the labels of a layer in the two menus, by its full name."""
        return next(
            (block, label)
            for block, layers in self.blocks.items()
            for label, full in layers.items()
            if full == name
        )


def _labelled(names: Sequence[str]) -> dict[str, str]:
    """Give every name the shortest ending, cut at dots, that no other name has."""
    endings = {name: _endings(name) for name in names}
    counts = Counter(ending for name in names for ending in endings[name])
    labels = {
        name: next((one for one in endings[name] if counts[one] == 1), name) for name in names
    }
    return {visible(label): name for name, label in labels.items()}


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
