"""Allocations as the files that other pruning tools read, and back.

llm-compressor recipes: one SparseGPTModifier for each distinct sparsity of a layer.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from entangle.allocation.allocation import ROW, Allocation
from entangle.allocation.by_row import (
    alphapruning_usage,
    evopress_usage,
    read_alphapruning,
    read_csv,
    read_evopress,
    read_rows,
    write_alphapruning,
    write_csv,
    write_evopress,
    write_rows,
)
from entangle.allocation.files import KIND
from entangle.checks import choice
from entangle.errors import InvalidInput, Unavailable, unknown_name
from entangle.models.layers import Layer
from entangle.runs.provenance import expand_user, make_manifest, output_file

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


FORMATS: Mapping[str, str] = {
    "llmcompressor": ".yaml",
    "alphapruning": ".npy",
    "evopress": ".txt",
    "csv": ".csv",
    "safetensors": ".safetensors",
}
"""Name of each format → ending of its files. The first three hold one sparsity a layer, the other
two every neuron's."""

_ROWS_LOST = "lost: the sparsity of single rows; the file holds one number a layer."


def export(
    allocation: Allocation,
    path: str | os.PathLike[str],
    format: str,  # noqa: A002 - the word that pandas and matplotlib use
    *,
    layers: Sequence[Layer] | None = None,
    force: bool = False,
) -> list[str]:
    """Write an allocation for another tool.

    Parameters
    ----------
    allocation
        What to write.
    path
        File to write; its name must have the ending that `FORMATS` says.
    format
        ``llmcompressor`` (recipe of `SparseGPTModifier`), ``alphapruning`` (array of one float a
        linear), ``evopress`` (lines ``module: level``), ``csv`` (one line a neuron),
        ``safetensors`` (one float64 vector of sparsities a layer).
    layers
        For ``alphapruning``: all linears of the model's blocks, as ``find_layers(module, "all")``
        gives them; those that the allocation does not hold get 0. By default its own layers.
    force
        Replace a file that exists.

    Returns
    -------
    list of str
        What the format cannot hold, and how the other tool is to be called.

    Raises
    ------
    UnknownName, InvalidInput
        If there is no such format, the ending is another, or the file exists without ``force``.
    Unavailable
        If the file cannot be written.

    References
    ----------
    github.com/vllm-project/llm-compressor (`Recipe`, `SparseGPTModifier`),
    github.com/haiquanlu/AlphaPruning (`ww_sparsity`), github.com/IST-DASLab/EvoPress
    (`load_sparse_weights`, `prune.py`).
    """
    target = check_export(path, format, force=force)
    order = _order(allocation, layers)
    writers: Mapping[str, Callable[[], bytes]] = {
        "llmcompressor": lambda: write_recipe(allocation),
        "alphapruning": lambda: write_alphapruning(allocation, order),
        "evopress": lambda: write_evopress(allocation),
        "csv": lambda: write_csv(allocation),
        "safetensors": lambda: write_rows(allocation),
    }
    _write(target, writers[format]())
    return _notes(allocation, format, order)


def import_allocation(
    path: str | os.PathLike[str],
    format: str,  # noqa: A002
    *,
    layers: Sequence[Layer] | None = None,
    sparsity: float | None = None,
    step: int | None = None,
) -> Allocation:
    """Read what `export`, or another tool, wrote.

    Parameters
    ----------
    path, format
        As in `export`.
    layers
        For the formats that hold one sparsity a layer: the layers of the model, in module order.
        The array of AlphaPruning has one number for each of them; the others name theirs. Zeros are
        spread evenly over the rows of a layer, the first rows taking what is left.
    sparsity, step
        For EvoPress: the sparsity of level 0 and the weights between two levels, which are
        ``--sparsity`` and ``--weights_diff`` of its ``prune.py``.

    Raises
    ------
    UnknownName, InvalidInput
        If there is no such format, an argument is missing, or the file is missing, damaged or does
        not fit the layers.
    """
    format = choice("format", format, FORMATS)  # noqa: A001
    source = expand_user(path)
    if not source.is_file():
        raise InvalidInput(f"{str(path)!r} is no file; name one in format {format}.")
    try:
        fields = _read(source, format, layers, sparsity, step)
    except OSError as error:
        raise Unavailable(
            f"{str(path)!r} cannot be read ({error.strerror or error}); check the path."
        ) from error
    settings = {"rule": "imported", "format": format, "file": source.name}
    manifest = make_manifest(KIND, model=None, scores=None, settings=settings)
    try:
        return Allocation(**fields, manifest=manifest)
    except InvalidInput as error:
        raise InvalidInput(f"{str(path)!r}: {error}") from error


def check_export(
    path: str | os.PathLike[str],
    format: str,  # noqa: A002
    *,
    force: bool = False,
) -> Path:
    """Check that `export` can write a file, before any work is done; errors as there."""
    format = choice("format", format, FORMATS)  # noqa: A001
    target = expand_user(path)
    if target.suffix != FORMATS[format]:
        raise InvalidInput(
            f"a file in format {format} must end in {FORMATS[format]}; got {str(path)!r}."
        )
    if target.is_dir():
        raise InvalidInput(f"the output {str(path)!r} is a folder; name a file.")
    if target.exists() and not force:
        raise InvalidInput(
            f"{str(path)!r} exists; name another file or use --force (force=True) to replace it."
        )
    return target


def _read(
    source: Path,
    name: str,
    layers: Sequence[Layer] | None,
    sparsity: float | None,
    step: int | None,
) -> dict[str, Any]:
    if name == "csv":
        return read_csv(source)
    if name == "safetensors":
        return read_rows(source)
    if layers is None:
        raise InvalidInput(f"`layers` must be given to read format {name}; got None.")
    sizes = {layer.name: layer.weight.numel() for layer in layers}
    if name == "alphapruning":
        return _spread(read_alphapruning(source, list(sizes.items())), layers)
    if name == "llmcompressor":
        return _spread(read_recipe(source, list(sizes)), layers)
    if sparsity is None or step is None:
        raise InvalidInput("`sparsity` and `step` must be given to read format evopress.")
    return _spread(read_evopress(source, sizes, sparsity=sparsity, step=step), layers)


def _spread(shares: Mapping[str, float], layers: Sequence[Layer]) -> dict[str, Any]:
    """Spread the zeros of every layer evenly over its rows; layers that are not named are left."""
    known = {layer.name: layer for layer in layers}
    for name in shares:
        if name not in known:
            raise unknown_name("layer", name, known, "The file does not fit the layers given.")
    chosen = [layer for layer in layers if layer.name in shares]
    zeros = {}
    for layer in chosen:
        rows, width = layer.shape
        total = round(shares[layer.name] * rows * width)
        zeros[layer.name] = total // rows + (torch.arange(rows) < total % rows).long()
    return {
        "zeros": zeros,
        "in_features": {layer.name: layer.in_features for layer in chosen},
        "experts": None,
        "blocks": {layer.name: layer.block for layer in chosen if layer.block is not None},
    }


def _order(allocation: Allocation, layers: Sequence[Layer] | None) -> list[tuple[str, int]]:
    if layers is None:
        return [
            (name, zeros.numel() * allocation.in_features[name])
            for name, zeros in allocation.zeros.items()
        ]
    names = {layer.name for layer in layers}
    for name in allocation.zeros:
        if name not in names:
            raise unknown_name("layer", name, names, "`layers` must hold all of the allocation's.")
    return [(layer.name, layer.weight.numel()) for layer in layers]


def _notes(allocation: Allocation, name: str, order: Sequence[tuple[str, int]]) -> list[str]:
    if name == "llmcompressor":
        return recipe_losses(allocation)
    usage = {"alphapruning": lambda: alphapruning_usage(allocation, order),
             "evopress": lambda: evopress_usage(allocation)}  # fmt: skip
    if name not in usage:
        return []
    frame = allocation.layers
    uneven = bool((frame["lowest"] != frame["highest"]).any())
    return [*[_ROWS_LOST] * uneven, *rest_lost(allocation), usage[name]()]


def _write(target: Path, content: bytes) -> None:
    with output_file(target) as temporary:
        temporary.write_bytes(content)
