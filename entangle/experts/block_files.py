"""The files of a block: its experts as they run, and how they were built.

``block-0000.safetensors`` holds what a model runs on, in `entangle.packed.formats`;
``block-0000.build`` the routers as they were fitted, layouts and report, which only a build that is
resumed, and the report, need.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.experts.build import ExpandedLayer
from entangle.experts.linear import ExpandedLinear, SharedRouting
from entangle.experts.linear import unpack as unpack_flat
from entangle.experts.router import Router
from entangle.experts.storage import Storage
from entangle.models.layers import Layer
from entangle.packed.formats import Layout, fingerprint, unpack
from entangle.runs.reading import READ_ERRORS

_METADATA = "entangle"
"""In the files of a build."""


def block_file(index: int) -> str:
    """Return the name of the file of a block's experts."""
    return f"block-{index:04d}.safetensors"


def build_file(index: int) -> str:
    """Return the name of the file of how a block was built, which running it does not need."""
    return f"block-{index:04d}.build"


def write_block(path: Path, expanded: Sequence[ExpandedLayer]) -> None:
    """Write the experts and routers of one block, as they run (`entangle.packed.formats`).

    In the place of a dense weight is one without elements, so that whoever knows nothing of experts
    finds a wrong shape.
    """
    tensors: dict[str, Tensor] = {}
    for one in expanded:
        name, weight = one.layer.name, one.layer.weight
        packed = one.packed or Storage().pack(weight, one.module.weight)[0]
        tensors |= {f"{name}.{key}": tensor for key, tensor in packed.tensors.items()}
        tensors[f"{name}.weight"] = torch.zeros(0, dtype=weight.dtype)
    for routing, name in _router_names(expanded).items():
        folded = routing.router.folded()
        if folded is not None:
            tensors |= {f"{name}.{key}": tensor for key, tensor in folded.named_buffers()}
    _save(tensors, path, {"format": "pt"})


def write_build(
    path: Path, expanded: Sequence[ExpandedLayer], report: Sequence[Mapping[str, object]]
) -> None:
    """Write routers as they were fitted, the layers' layouts and the rows of the report."""
    tensors: dict[str, Tensor] = {}
    names = _router_names(expanded)
    routers: dict[str, object] = {}
    for number, (routing, name) in enumerate(names.items()):
        folded = routing.router.folded()
        routers |= {} if folded is None else {name: folded.describe()}
        for key, value in routing.router.state().items():
            tensors[f"router {number}:{key}"] = value
    layers = {}
    for one in expanded:
        routing = one.module.routing
        packed = one.packed or Storage().pack(one.layer.weight, one.module.weight)[0]
        layers[one.layer.name] = {
            "router": list(names).index(routing),
            "routed_by": names[routing] if names[routing] in routers else None,
            "layout": packed.layout.describe(),
            "fingerprint": fingerprint(packed.tensors["values"]),
        }
    described = {"layers": layers, "routers": routers, "report": list(report)}
    _save(tensors, path, {_METADATA: json.dumps(described)})


def _router_names(expanded: Sequence[ExpandedLayer]) -> dict[SharedRouting, str]:
    """Return every router, with the name of the first layer that it serves and an ending."""
    names: dict[SharedRouting, str] = {}
    for one in expanded:
        names.setdefault(one.module.routing, f"{one.layer.name}_router")
    return names


def distinct_routers(expanded: Sequence[ExpandedLayer]) -> list[SharedRouting]:
    """Return the routers of some layers, each once, in the order of the layers."""
    return list(dict.fromkeys(one.module.routing for one in expanded))


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file; what the disk says against it is an OSError, as everywhere.

    Of the metadata there is one key: their order is not fixed.
    """
    with disk_refusals():
        save_file({key: one.cpu().contiguous() for key, one in tensors.items()}, path, metadata)


@contextmanager
def disk_refusals() -> Iterator[None]:
    """Raise as an OSError what the disk says against a safetensors file."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def read_block(
    path: Path, build: Path, layers: Mapping[str, Layer]
) -> tuple[list[ExpandedLayer], list[dict[str, object]]]:
    """Read a block's experts and report; bias, dtype and device are those of the dense ``layers``.

    Raises
    ------
    InvalidInput
        If a file is missing, truncated or altered, or does not fit the model.
    """
    try:
        tensors = tensors_of(path)
        described, states = described_in(build), tensors_of(build)
        routings: dict[int, SharedRouting] = {}
        found = []
        for name, entry in described["layers"].items():
            layer, layout = layers[name], Layout(**entry["layout"])
            _check_shape(layer, layout.experts, (layout.out_features, layout.in_features))
            own = {key: tensors[f"{name}.{key}"] for key in layout.tensors()}
            dtype = layer.weight.dtype
            weight = [unpack(own, layout, e, dtype=dtype) for e in range(layout.experts)]
            routing = _routing(entry["router"], states, routings, layer)
            module = ExpandedLinear(torch.stack(weight).to(layer.device), layer.bias, routing)
            found.append(ExpandedLayer(layer, module, None))
        return found, described["report"]
    except READ_ERRORS as error:
        raise damaged(path, error) from error


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file, mapped from it."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _check_shape(layer: Layer, experts: int, shape: tuple[int, int]) -> None:
    if shape != layer.shape:
        raise ValueError(
            f"layer {layer.name!r} has shape {layer.shape}, the experts {[experts, *shape]}"
        )


def _routing(
    number: int,
    tensors: Mapping[str, Tensor],
    routings: dict[int, SharedRouting],
    layer: Layer,
) -> SharedRouting:
    """Return the router of this number, which is built once."""
    if number not in routings:
        prefix = f"router {number}:"
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        routings[number] = SharedRouting(Router.from_state(state).to(layer.device))
    return routings[number]


def damaged(path: Path, error: Exception) -> InvalidInput:
    """Return what is raised over a file that cannot be read."""
    return InvalidInput(
        f"{str(path)!r} is damaged or does not fit the model ({error}); build it anew."
    )


def read_old_block(path: Path, layers: Mapping[str, Layer]) -> list[ExpandedLayer]:
    """Read the experts of a block of a checkpoint of version 1.

    Raises
    ------
    InvalidInput
        As `read_block`.
    """
    try:
        tensors, described = tensors_of(path), described_in(path)["layers"]
        routings: dict[int, SharedRouting] = {}
        found = []
        for name, entry in described.items():
            layer, shape = layers[name], tuple(entry["shape"])
            _check_shape(layer, shape[0], shape[1:])
            routing = _routing(entry["router"], tensors, routings, layer)
            weight = unpack_flat((tensors[f"{name}:bitmap"], tensors[f"{name}:values"]), shape)
            weight = weight.to(layer.device, layer.weight.dtype)
            module = ExpandedLinear(weight, layer.bias, routing)
            found.append(ExpandedLayer(layer, module, None))
        return found
    except READ_ERRORS as error:
        raise damaged(path, error) from error


def described_in(path: Path) -> dict[str, Any]:
    """Return what the file of a block's build, or a block of version 1, says of its layers.

    Raises
    ------
    InvalidInput
        If it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {})[_METADATA])
    except READ_ERRORS as error:
        raise damaged(path, error) from error
    return found
