"""llm-compressor recipes: one SparseGPTModifier for each distinct sparsity of a layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from entangle.allocation.allocation import Allocation
from entangle.allocation.steps import ROW
from entangle.errors import InvalidInput

MODIFIER = "SparseGPTModifier"
_STAGE, _GROUP = "sparsity_stage", "_modifiers"
_HEAD = """\
# Recipe of llm-compressor (github.com/vllm-project/llm-compressor), from `entangle allocate`:
# {overall:.6f} of the weights of {layers} layer(s) are zeros.
"""


def write_recipe(allocation: Allocation) -> bytes:
    """Return a recipe that prunes every layer to its mean sparsity.

    Layers of one sparsity share a modifier, which lists them by their full names, in a group of
    its own (a group holds one modifier of a kind). A layer without zeros is in none: the modifier
    prunes some weights even at sparsity 0. What is lost is said in comments on top. llm-compressor
    finds `torch.nn.Linear` modules only, not GPT-2's ``Conv1D``.
    """
    layers: dict[float, list[str]] = {}
    for name, zeros in allocation.zeros.items():
        total, weights = int(zeros.sum()), zeros.numel() * allocation.in_features[name]
        if total:
            layers.setdefault(total / weights, []).append(name)
    groups = {
        f"layers_{number}{_GROUP}": {MODIFIER: {"sparsity": share, "targets": names}}
        for number, (share, names) in enumerate(sorted(layers.items()))
    }
    head = _HEAD.format(overall=allocation.overall, layers=len(allocation.zeros))
    lost = "".join(f"# {line}\n" for line in recipe_losses(allocation))
    body = yaml.safe_dump({_STAGE: groups}, sort_keys=False, default_flow_style=False, width=100)
    return (head + lost + body).encode()


def recipe_losses(allocation: Allocation) -> list[str]:
    """Say what of the allocation a recipe cannot hold."""
    frame = allocation.layers
    uneven = int((frame["lowest"] != frame["highest"]).sum())
    losses = []
    if uneven:
        losses.append(
            f"lost: the sparsity of single rows ({uneven} of {len(frame)} layers have unequal "
            "rows); the modifier takes one sparsity a layer and spreads the zeros by its own rule."
        )
    losses += rest_lost(allocation)
    dense = int((frame["zeros"] == 0).sum())
    if dense:
        losses.append(f"{dense} layer(s) without zeros are named in no modifier and stay dense.")
    return losses


def rest_lost(allocation: Allocation) -> list[str]:
    """Say what, besides the sparsity of rows, a format of one number a layer cannot hold."""
    lost = []
    if allocation.pattern != ROW:
        lost.append(f"lost: the pattern, {allocation.pattern}; the other tool has one of its own.")
    if allocation.experts is not None:
        lost.append("lost: the number of experts of each layer.")
    return lost


def read_recipe(path: Path, order: Sequence[str]) -> dict[str, float]:
    """Return the sparsity of every layer that a recipe names.

    A list of sparsities is for the targets in the order in which the model has them, not in that of
    the recipe's own list, since that is how the modifier finds them.

    Parameters
    ----------
    path
        The file.
    order
        Full names of the model's layers, in module order.

    Raises
    ------
    InvalidInput
        If it is no recipe, or targets layers by class or pattern instead of by name.
    """
    try:
        recipe = yaml.safe_load(path.read_text("utf-8"))
        groups = [
            group
            for key, stage in recipe.items()
            if key.endswith("_stage")
            for name, group in stage.items()
            if name.endswith(_GROUP)
        ]
        found = [group[MODIFIER] for group in groups if MODIFIER in group]
        pairs = [pair for modifier in found for pair in _sparsities(modifier, order)]
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        text = " ".join(str(error).split())
        raise InvalidInput(
            f"{str(path)!r} is no llm-compressor recipe of {MODIFIER}s ({text}); name another file."
        ) from error
    for name, share in pairs:
        if "." not in name or name.startswith("re:"):
            raise InvalidInput(
                f"the recipe {str(path)!r} must list layers by full name; got the target {name!r}."
            )
        if not 0.0 <= share <= 1.0:
            raise InvalidInput(
                f"the sparsity of {name!r} in {str(path)!r} must be in [0, 1]; got {share}."
            )
    return dict(pairs)


def _sparsities(modifier: dict[str, Any], order: Sequence[str]) -> list[tuple[str, float]]:
    targets, share = modifier["targets"], modifier["sparsity"]
    place = {name: i for i, name in enumerate(order)}
    listed: Sequence[str] = [targets] if isinstance(targets, str) else targets
    names = sorted(listed, key=lambda name: place.get(name, len(place)))
    shares = share if isinstance(share, list) else [share] * len(names)
    if len(shares) != len(names):
        raise TypeError(f"{len(shares)} sparsities for {len(names)} targets")
    return [(str(name), float(one)) for name, one in zip(names, shares, strict=True)]
