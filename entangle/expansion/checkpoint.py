"""Expanded layers on disk: one safetensors file a block, packed, and a manifest for them all."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from entangle.errors import InvalidInput
from entangle.expansion.build import ExpandedLayer
from entangle.expansion.linear import ExpandedLinear, SharedRouting
from entangle.expansion.packing import pack, unpack
from entangle.models.layers import Layer
from entangle.reading import READ_ERRORS
from entangle.routing import Router

_METADATA = "entangle"


def block_file(index: int) -> str:
    """Return the name of the file of a block's experts."""
    return f"block-{index:04d}.safetensors"


def write_block(
    path: Path, expanded: Sequence[ExpandedLayer], report: Sequence[Mapping[str, object]]
) -> None:
    """Write the experts and routers of one block.

    Experts are stored as a bitmap (one bit a weight) and the non-zeros in the layer's dtype;
    routers as they are, once for all the layers that share one; the rows of the report beside them.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, object]] = {}
    routers = distinct_routers(expanded)
    for one in expanded:
        number = routers.index(one.module.routing)
        tensors[f"{one.layer.name}:bitmap"], tensors[f"{one.layer.name}:values"] = pack(
            one.module.weight.detach()
        )
        layers[one.layer.name] = {"router": number, "shape": list(one.module.weight.shape)}
    for number, routing in enumerate(routers):
        for name, value in routing.router.state().items():
            tensors[f"router {number}:{name}"] = value.cpu().contiguous()
    _save(tensors, path, json.dumps({"layers": layers, "report": list(report)}))


def distinct_routers(expanded: Sequence[ExpandedLayer]) -> list[SharedRouting]:
    """Return the routers of some layers, each once, in the order of the layers."""
    return list(dict.fromkeys(one.module.routing for one in expanded))


def _save(tensors: dict[str, Tensor], path: Path, described: str) -> None:
    """Write a safetensors file; what the disk says against it is an OSError, as everywhere."""
    try:
        save_file(tensors, path, {_METADATA: described})  # one key: their order is not fixed
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def read_block(
    path: Path, layers: Mapping[str, Layer]
) -> tuple[list[ExpandedLayer], list[dict[str, object]]]:
    """Read a block's experts and report; bias, dtype and device are those of the dense ``layers``.

    Raises
    ------
    InvalidInput
        If the file is missing, truncated or altered, or does not fit the model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {})[_METADATA])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return _rebuild(described["layers"], tensors, layers), described["report"]
    except READ_ERRORS as error:
        raise InvalidInput(
            f"{str(path)!r} is damaged or does not fit the model ({error}); build it anew."
        ) from error


def _rebuild(
    described: Mapping[str, Mapping[str, object]],
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Layer],
) -> list[ExpandedLayer]:
    routings: dict[object, SharedRouting] = {}
    rebuilt = []
    for name, entry in described.items():
        layer, number, shape = layers[name], entry["router"], entry["shape"]
        if not isinstance(shape, list) or tuple(shape[1:]) != layer.shape:
            raise ValueError(f"layer {name!r} has shape {layer.shape}, the experts {shape}")
        if number not in routings:
            prefix = f"router {number}:"
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            routings[number] = SharedRouting(Router.from_state(state).to(layer.device))
        weight = unpack((tensors[f"{name}:bitmap"], tensors[f"{name}:values"]), tuple(shape))
        module = ExpandedLinear(
            weight.to(layer.device, layer.weight.dtype), layer.bias, routings[number]
        )
        rebuilt.append(ExpandedLayer(layer, module, None))
    return rebuilt


def install(module: nn.Module, expanded: Sequence[ExpandedLayer]) -> None:
    """Put expanded layers into a model, in place of the dense ones."""
    for one in expanded:
        module.set_submodule(one.layer.name, one.module)
