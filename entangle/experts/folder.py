"""An expansion as a folder that transformers loads: dense rest, index, config, code, model card."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from entangle.models.layers import list_layers
from entangle.models.loading import LanguageModel
from entangle.models.mixtures import ExpertLinear
from entangle.models.pretrained import auto_class, quiet
from entangle.models.shards import present
from entangle.models.streaming import is_streamed
from entangle.packed.huggingface import CARD, MODELING, SparseExpansionConfig, write_code
from entangle.packed.linear import Gating, gating_of
from entangle.runs.provenance import write_json
from entangle.runs.sealing import file_digest

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Most bytes of a file of the dense rest."""
STREAMED_BYTES = 10**9
"""The same of a model that is larger than memory: all of a file is held to be written."""


def find_gated(module: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Gating]:
    """Return the gated MLPs of a dense model whose gate and up have experts, by name.

    Parameters
    ----------
    module
        The dense model.
    layers
        As `SparseExpansionConfig` has them.
    """
    groups: dict[tuple[str, object], list[str]] = {}
    for name, one in layers.items():
        parent, _, leaf = name.rpartition(".")
        groups.setdefault((parent, one["router"]), []).append(leaf)
    found: dict[str, Gating] = {}
    for (parent, _), leaves in groups.items():
        for first, second in combinations(leaves, 2):
            shapes = [_shape(layers[f"{parent}.{leaf}"]) for leaf in (first, second)]
            if parent and shapes[0] == shapes[1]:
                gating = gating_of(module.get_submodule(parent), (first, second))
                found |= {} if gating is None else {parent: gating}
    return found


def _shape(layer: Mapping[str, Any]) -> tuple[int, int]:
    return layer["layout"]["out_features"], layer["layout"]["in_features"]


def loads_alone(module: nn.Module, blocks: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether transformers can build a model anew, from its class and config.

    It cannot where experts of a mixture, which it keeps in stacked parameters, were expanded in the
    ``blocks`` (as in `config_of`).
    """
    stacked = {one.name for one in list_layers(module) if isinstance(one.module, ExpertLinear)}
    if any(name in stacked for block in blocks for name in block["layers"]):
        return False
    return isinstance(module, PreTrainedModel) and type(module).__module__.startswith(
        "transformers."
    )


def write_dense(folder: Path, dense: LanguageModel, config: SparseExpansionConfig) -> list[str]:
    """Write what was not expanded, and all that transformers needs, beside the files of the blocks.

    Parameters
    ----------
    folder
        Holds the blocks.
    dense
        The dense model, from transformers.
    config
        Of the experts.

    Returns
    -------
    list
        Names of the files of weights.
    """
    module: Any = dense.module
    blocks = sorted(path.name for path in folder.glob("block-*.safetensors"))
    weight_map: dict[str, str] = {}
    total = 0
    for name in blocks:
        with safe_open(folder / name, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
        total += (folder / name).stat().st_size
    made = []
    most = STREAMED_BYTES if is_streamed(module) else SHARD_BYTES
    shards = list(_shards(_rest(module, config), most))
    for number, tensors in enumerate(shards, 1):
        made.append("dense.safetensors" if len(shards) == 1 else f"dense-{number:04d}.safetensors")
        here = {key: present(one).detach().cpu().contiguous() for key, one in tensors.items()}
        save_file(here, folder / made[-1], {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, made[-1])
        total += (folder / made[-1]).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)
    with quiet():
        _write_config(folder, dense, config)
        if module.can_generate():
            module.generation_config.save_pretrained(folder)
        if dense.tokenizer is not None:
            dense.tokenizer.save_pretrained(folder)
    write_code(folder, type(module).__name__)
    return made


def _rest(module: Any, config: SparseExpansionConfig) -> dict[str, Tensor]:
    """Return the tensors of a dense model but the weights that have experts, tied ones once."""
    expanded = {f"{name}.weight" for name in config.layers}
    state = {
        key: one for key, one in module.state_dict(keep_vars=True).items() if key not in expanded
    }
    kept: dict[str, Tensor] = remove_tied_weights_from_state_dict(state, module)
    return kept


def _shards(tensors: Mapping[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for key, tensor in tensors.items():
        if shard and size + tensor.nbytes > most:
            yield shard
            shard, size = {}, 0
        shard[key] = tensor
        size += tensor.nbytes
    yield shard


def _write_config(folder: Path, dense: LanguageModel, config: SparseExpansionConfig) -> None:
    own: Any = copy.deepcopy(dense.module.config)
    name, auto = type(dense.module).__name__, auto_class(own, folder).__name__
    own.architectures = [name]
    own.auto_map = {auto: f"{Path(MODELING).stem}.{name}"}
    own.dtype = dense.dtype
    own.quantization_config = config.to_dict()
    own.save_pretrained(folder)


def write_card(folder: Path, dense: LanguageModel, manifest: Mapping[str, Any]) -> None:
    """Write the model card: how the folder is used, and what was measured."""
    settings = manifest["settings"]
    base = f"base_model: {dense.name}\n" if dense.source == "hub" else ""
    shares = [one["mean"] if isinstance(one, dict) else one for one in _shares(settings)]
    rows = _measured(folder, manifest)
    text = f"""---
library_name: transformers
tags: [sparse-expansion, entangle]
{base}---
# Sparse Expansion of {dense.name if dense.source != "folder" else Path(dense.name).name}

{len(settings["sparsity"])} linear layers have {settings["experts"]} sparse expert(s) each
({_percent(shares)} zeros, {settings["pruner"]}, format {settings["format"]}, values
{_values(settings)}); a router sends every token to one.
Method: [arXiv 2405.15756](https://arxiv.org/abs/2405.15756).

{rows}
Costs are multiples of the dense model's, over all linear layers: operations a token, stored
non-zeros, and stored bytes, bitmaps and routers included.

```python
# pip install neuron-entanglement
import entangle  # or trust_remote_code=True below
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/or/hub-id", dtype="auto")
```
"""
    (folder / CARD).write_text(text, encoding="utf-8")


def _shares(settings: Mapping[str, Any]) -> list[Any]:
    return list(settings["sparsity"].values())


def _percent(shares: list[Any]) -> str:
    known = [float(share) for share in shares if share is not None]
    return f"{100 * sum(known) / len(known):.0f} %" if known else "n:m"


def _values(settings: Mapping[str, Any]) -> str:
    bits, values = settings["bits"], settings["values"] or "as the model's"
    if bits is None:
        return values
    coded = settings["values"] is None and bits <= 8
    return f"codes of {bits} bits" if coded else f"{values}, quantised to {bits} bits"


def _measured(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Return the table: of all models that were measured, or of the expansion alone."""
    if (folder / "model.parquet").is_file():
        table = pd.read_parquet(folder / "model.parquet")
    else:
        own = {"model": "expansion", "perplexity": manifest.get("perplexity")}
        table = pd.DataFrame([own | dict(manifest["costs"])])
    table = table[[name for name in _COLUMNS if name in table]].dropna(axis=1, how="all")
    head = f"| {' | '.join(table.columns)} |\n|{'---|' * len(table.columns)}\n"
    return head + "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in table.to_numpy())


_COLUMNS = ("model", "perplexity", "flops", "nonzeros", "bytes")


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of files by name."""
    return {name: file_digest(folder / name) for name in names}


def config_of(blocks: Sequence[Mapping[str, Any]], module: nn.Module) -> SparseExpansionConfig:
    """Return the config of the experts of all blocks of a dense model."""
    layers: dict[str, Any] = {}
    routers: dict[str, Any] = {}
    for block in blocks:
        layers |= {
            name: {
                "layout": one["layout"],
                "router": one["routed_by"],
                **{key: one[key] for key in ("fingerprint",) if key in one},
            }
            for name, one in block["layers"].items()
        }
        routers |= block["routers"]
    gated = {name: one.describe() for name, one in find_gated(module, layers).items()}
    return SparseExpansionConfig(layers, routers, gated)
