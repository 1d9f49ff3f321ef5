"""Packed experts as a quantisation method of transformers, ``sparse-expansion``.

``config.json`` names the layers, their routers and the gated MLPs; ``from_pretrained`` puts
`PackedLinear` and `PackedGated` in the place of the dense modules and maps their tensors from the
file as they are. The dense rest follows ``dtype=``; experts, scales and routers stay as stored.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from entangle.errors import InvalidInput
from entangle.packed.formats import Layout, check_starts, fingerprint
from entangle.packed.linear import Gating, PackedGated, PackedLinear
from entangle.packed.routing import PackedRouter

METHOD = "sparse-expansion"
"""Name of the method in ``config.json``."""
VERSION = 2
"""Of what ``config.json`` says of the experts; checkpoints without it are of version 1."""
MODELING, CARD = "modeling_sparse_expansion.py", "README.md"
"""Files that lie beside the weights."""

_CODE = '''"""A model with packed sparse experts; needs `pip install neuron-entanglement`."""
import entangle  # noqa: F401  (registers the quantisation method "sparse-expansion")
import transformers


class {name}(transformers.{name}):
    """As in transformers."""
'''
_STORED = {
    torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.float32: "F32",
}  # fmt: skip


class SparseExpansionConfig(QuantizationConfigMixin):
    """What ``config.json`` says of the experts.

    Parameters
    ----------
    layers
        By name: ``layout`` (`Layout`), ``router``, the name of its router or None, and
        ``fingerprint`` of its values (`entangle.packed.formats.fingerprint`).
    routers
        By name: ``kind``, ``experts``, ``features`` (`PackedRouter`).
    gated
        Gated MLPs by name (`Gating`).
    version
        Of the format.

    Raises
    ------
    InvalidInput
        If the format is newer than this package, or a part of it is damaged.
    """

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        routers: Mapping[str, Mapping[str, Any]] | None = None,
        gated: Mapping[str, Mapping[str, str]] | None = None,
        version: int = VERSION,
        **_others: object,
    ) -> None:
        self.quant_method: Any = METHOD
        self.version = version
        self.layers, self.routers = dict(layers or {}), dict(routers or {})
        self.gated = dict(gated or {})
        if not isinstance(version, int) or version > VERSION:
            raise InvalidInput(
                f"the packed experts are of format {version!r}, this version of entangle reads up "
                f"to {VERSION}; upgrade it (pip install -U neuron-entanglement)."
            )
        try:
            self.layouts()
            for one in self.routers.values():
                PackedRouter(**one, device="meta")
            for names in self.gated.values():
                Gating(**names)
            for one in self.layers.values():
                if one["router"] is not None:
                    self.routers[one["router"]]
        except (TypeError, KeyError, AttributeError) as error:
            raise InvalidInput(
                f"config.json has a damaged quantization_config ({type(error).__name__}: {error}); "
                "copy it again."
            ) from error

    def layouts(self) -> dict[str, Layout]:
        """Return the layout of every layer by name."""
        return {name: Layout(**one["layout"]) for name, one in self.layers.items()}

    def stored(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """Yield name, shape and dtype of every tensor of experts and routers in the files."""
        for name, layout in self.layouts().items():
            for key, (shape, dtype) in layout.tensors().items():
                yield f"{name}.{key}", shape, dtype
        for name, one in self.routers.items():
            for key, buffer in PackedRouter(**one, device="meta").named_buffers():
                yield f"{name}.{key}", tuple(buffer.shape), buffer.dtype


class SparseExpansionQuantizer(HfQuantizer):
    """Loads and saves models with packed experts."""

    requires_calibration = True
    quantization_config: Any

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_others: object
    ) -> None:
        self._folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        if checkpoint_files:
            check_files(checkpoint_files, self.quantization_config)
        install(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **_others: object) -> None:
        model.requires_grad_(False)
        # not methods: those are pickled by their names, which the class has too
        model.save_pretrained = partial(_save_pretrained, model)
        model._upload_modified_files = partial(_upload, model)

    def is_serializable(self) -> bool:
        """Tell that ``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """There are no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The products are operators."""
        return True

    def place_beside(self, folder: Path) -> None:
        """Write the model card of the folder that was loaded, if it has one."""
        card = None if self._folder is None else self._folder / CARD
        if card is not None and card.is_file() and card.resolve() != (folder / CARD).resolve():
            shutil.copyfile(card, folder / CARD)


def _save_pretrained(
    self: Any, save_directory: str | os.PathLike[str], *args: Any, **kw: Any
) -> Any:
    folder = Path(save_directory)
    if not folder.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_code(folder, type(self).__name__)
        self.hf_quantizer.place_beside(folder)
    return type(self).save_pretrained(self, save_directory, *args, **kw)


def _upload(self: Any, working_dir: str | os.PathLike[str], *args: Any, **kw: Any) -> Any:
    self.hf_quantizer.place_beside(
        Path(working_dir)
    )  # transformers has put a card of its own there
    return type(self)._upload_modified_files(self, working_dir, *args, **kw)


def write_code(folder: Path, name: str) -> None:
    """Write the module that ``trust_remote_code=True`` imports, for a class of transformers."""
    (folder / MODELING).write_text(_CODE.format(name=name), encoding="utf-8")


def check_files(files: Sequence[str | os.PathLike[str]], config: SparseExpansionConfig) -> None:
    """Check that files hold the tensors of all experts and routers, by names, shapes and dtypes.

    Of the numbers only those are read that say where rows stand, and the first values.

    Raises
    ------
    InvalidInput
        If one is missing, of another size or of another build, or a file is truncated.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(key)
                    found[key] = tuple(part.get_shape()), part.get_dtype()
        except (SafetensorError, OSError) as error:
            raise InvalidInput(
                f"{str(file)!r} is truncated or damaged ({error}); copy it again."
            ) from error
    for name, shape, dtype in config.stored():
        if name not in found:
            raise InvalidInput(f"no file holds {name!r}; the folder is incomplete: copy it again.")
        if found[name] != (shape, _STORED[dtype]):
            raise InvalidInput(
                f"{name!r} is {found[name][1]} of shape {found[name][0]}, but config.json says "
                f"{_STORED[dtype]} of shape {shape}; the files do not belong together."
            )
    for file in files:
        _check_numbers(file, config)


def _check_numbers(file: str | os.PathLike[str], config: SparseExpansionConfig) -> None:
    with safe_open(file, framework="pt") as opened:
        keys = set(opened.keys())
        for name, layout in config.layouts().items():
            if f"{name}.starts" in keys and layout.format != "n16":
                check_starts(opened.get_tensor(f"{name}.starts"), layout)
            known = config.layers[name].get("fingerprint")
            if known is None or f"{name}.values" not in keys:
                continue
            if fingerprint(opened.get_tensor(f"{name}.values")) != known:
                raise InvalidInput(
                    f"the experts of {name!r} in {str(file)!r} are of another build than "
                    "config.json; the files do not belong together: copy them again."
                )


def install(model: nn.Module, config: SparseExpansionConfig) -> None:
    """Put empty packed modules, on the meta device, in the place of a model's dense ones.

    Raises
    ------
    InvalidInput
        If the model lacks a layer, or has one of another shape.
    """
    routers: dict[str, PackedRouter] = {}
    for name, one in config.routers.items():
        routers[name] = PackedRouter(**one, device="meta")
        path, _, leaf = own_name(model, name, new=True).rpartition(".")
        model.get_submodule(path).add_module(leaf, routers[name])
    for name, layout in config.layouts().items():
        own = own_name(model, name)
        dense: Any = model.get_submodule(own)
        shape = tuple(dense.weight.shape)
        if sorted(shape) != sorted((layout.out_features, layout.in_features)):
            raise InvalidInput(
                f"layer {name!r} has weights of shape {shape}, its experts are "
                f"{layout.out_features} × {layout.in_features}; config.json is of another model."
            )
        bias, dtype = dense.bias is not None, dense.weight.dtype
        router = routers.get(config.layers[name]["router"])
        with torch.device("meta"):
            packed = PackedLinear(layout, bias=bias, router=router, dtype=dtype)
        model.set_submodule(own, packed)
    install_gated(model, config)


def install_gated(model: nn.Module, config: SparseExpansionConfig) -> None:
    """Put `PackedGated` in the place of the gated MLPs, whose layers are packed already."""
    for name, names in config.gated.items():
        own, gating = own_name(model, name), Gating(**names)
        gate, up = (model.get_submodule(f"{own}.{part}") for part in (gating.gate, gating.up))
        assert isinstance(gate, PackedLinear)  # noqa: S101
        assert isinstance(up, PackedLinear)  # noqa: S101
        before = model.get_submodule(own)
        made = PackedGated(gating, gate, up, before.get_submodule(gating.down))
        for child, module in before.named_children():
            if isinstance(module, PackedRouter):
                made.add_module(child, module)
        model.set_submodule(own, made.train(before.training))


def own_name(model: nn.Module, name: str, *, new: bool = False) -> str:
    """Return a module's name in this model, which may be the body of the one that has a head.

    Of a ``new`` one only what will hold it must be there.

    Raises
    ------
    InvalidInput
        If it has no such module.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(candidate.rpartition(".")[0] if new else candidate)
        except AttributeError:
            continue
        return candidate
    raise InvalidInput(f"the model has no module {name!r}; config.json is of another model.")


def register() -> None:
    """Add the method to transformers' lists, once."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(SparseExpansionConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(SparseExpansionQuantizer)


register()
