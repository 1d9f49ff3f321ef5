"""Checkpoints of version 1, and packed ones of another format, written anew in today's."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from entangle.experts.block_files import (
    block_file,
    build_file,
    described_in,
    read_block,
    read_old_block,
    write_block,
    write_build,
)
from entangle.experts.build import ExpandedLayer
from entangle.experts.checkpoint import complete, dense_of, is_packed
from entangle.experts.expand import model_costs
from entangle.experts.linear import ExpandedLinear
from entangle.experts.storage import Storage
from entangle.models.layers import list_layers
from entangle.models.loading import AnyModel
from entangle.results.expansion import costs_to_write, read_run, write_run
from entangle.runs.provenance import expand_user, output_folder


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: AnyModel | None = None,
    format: str = "bitmap",  # noqa: A002 - the word that the file's config has
    values: str | None = None,
    device: str = "auto",
    force: bool = False,
) -> None:
    """Write a checkpoint of `entangle.expand` anew, so that transformers loads it.

    Parameters
    ----------
    path
        Its folder; it stays as it is.
    out
        The new folder.
    base
        The dense model, as for `entangle.load_expanded`.
    format
        As for `entangle.expand`.
    values
        As for `entangle.expand`; by default as the checkpoint's were stored.
    device
        Where a base that is named goes.
    force
        Replace an existing folder.

    Raises
    ------
    InvalidInput, UnknownName
        If the checkpoint is damaged, or a setting does not fit it.
    Unavailable
        If the dense model cannot be had.
    """
    manifest, dense = dense_of(path, base, device=device)
    settings = manifest["settings"]
    values = settings.get("values") if values is None else values
    bits, group_size = settings.get("bits"), settings.get("group_size")
    storage = Storage(format, values, bits, settings.get("pattern", "row"), group_size)
    layers = {layer.name: layer for layer in list_layers(dense.module)}
    where = expand_user(path)
    changed = manifest | {"settings": settings | {"format": format, "values": values}}
    with output_folder(out, force=force) as folder:
        written: list[str] = []
        report: list[dict[str, Any]] = []
        blocks = [name for name in manifest["files"] if _is_block(name)]
        for index in sorted(int(name[len("block-") : -len(".safetensors")]) for name in blocks):
            source = where / block_file(index)
            if is_packed(manifest):
                found, rows = read_block(source, where / build_file(index), layers)
            else:
                found, rows = read_old_block(source, layers), described_in(source)["report"]
            made = [_stored(one, storage) for one in found]
            _count_bytes(rows, made)
            report += rows
            write_block(folder / block_file(index), made)
            write_build(folder / build_file(index), made, rows)
            written += [block_file(index), build_file(index)]
        costs = model_costs(dense.module, report)
        changed["costs"] = costs_to_write(costs)
        _write_tables(where, folder, report, costs)
        complete(folder, dense, changed, written)


def _is_block(name: str) -> bool:
    return name.startswith("block-") and name.endswith(".safetensors")


def _stored(one: ExpandedLayer, storage: Storage) -> ExpandedLayer:
    packed, weight = storage.pack(one.layer.weight, one.module.weight)
    module = ExpandedLinear(weight, one.layer.bias, one.module.routing)
    return ExpandedLayer(one.layer, module, None, packed)


def _count_bytes(rows: list[dict[str, Any]], made: list[ExpandedLayer]) -> None:
    packed = {one.layer.name: one.packed for one in made}
    for row in rows:
        found = packed.get(str(row["layer"]))
        if found is not None:
            row["bytes"] = sum(tensor.nbytes for tensor in found.tensors.values())


def _write_tables(
    where: Path, folder: Path, report: Sequence[Mapping[str, Any]], costs: Mapping[str, float]
) -> None:
    """Write the tables of the build, with the bytes that are stored now, and how it went."""
    table = pd.read_parquet(where / "layers.parquet")
    stored = {row["layer"]: row["bytes"] for row in report}
    table["bytes"] = table["layer"].map(stored).fillna(table["bytes"]).astype(table["bytes"].dtype)
    table.to_parquet(folder / "layers.parquet", index=False)
    if (where / "model.parquet").is_file():
        table = pd.read_parquet(where / "model.parquet")
        table.loc[table.index[-1], "bytes"] = costs["bytes"]  # the last is the expansion
        table.to_parquet(folder / "model.parquet", index=False)
    run: Mapping[str, object] = read_run(where)
    if run:
        write_run(folder, run)
