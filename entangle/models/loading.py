"""Loading a language model from the hub, a folder, a GGUF file or the embedded demo."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from entangle.errors import InvalidInput, UnknownName
from entangle.models import demo, pretrained
from entangle.precision import resolve_device, resolve_dtype
from entangle.provenance import expanded

_LONGEST_NAME = 2000  # characters; no path or hub id is longer

CHUNK = 1 << 24  # elements hashed at a time; bounds what is copied from a GPU


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model ready to be observed, with its tokenizer and where both came from."""

    module: nn.Module
    """The model. One from `load_model` is in eval mode and no parameter requires a gradient; a
    module of the user's is so only while it is looked at (`entangle.models.evaluating`)."""
    tokenizer: PreTrainedTokenizerBase | None
    """None for a model without one, which runs on token ids only."""
    name: str
    """As the user gave it: ``demo``, a hub id or a path."""
    source: str
    """``demo``, ``hub``, ``folder``, ``gguf`` or ``memory``."""
    revision: str | None
    """Commit hash of a hub model, where known."""

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the first parameter that is not offloaded."""
        devices = (p.device for p in self.module.parameters() if p.device.type != "meta")
        return next(devices, torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        dtypes = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        return next(dtypes, torch.get_default_dtype())

    @property
    def context_length(self) -> int | None:
        """Longest sequence in tokens, None where the architecture sets no limit."""
        config = self._text_config()
        names = ("max_position_embeddings", "max_seq_len", "n_positions")
        limit = next((v for n in names if isinstance(v := getattr(config, n, None), int)), 0)
        return limit - _reserved_positions(self.module) if limit > 0 else None

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the rows of the input embedding."""
        getter = getattr(self.module, "get_input_embeddings", None)
        table = getter() if callable(getter) else None
        tables = (m for m in self.module.modules() if isinstance(m, nn.Embedding))
        weight = getattr(table if table is not None else next(tables, None), "weight", None)
        if not isinstance(weight, Tensor):
            raise InvalidInput(f"the model must have a token embedding; {self.name!r} has none.")
        return weight.shape[0]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the parameters' names, shapes, dtypes and bytes, in hexadecimal.

        Computed on first use and kept: read it before weights are changed.
        """
        named = list(self.module.named_parameters())
        modules = dict(self.module.named_modules())
        offloaded = any(parameter.is_meta for _, parameter in named)
        with ThreadPoolExecutor(1 if offloaded else min(4, os.cpu_count() or 1)) as pool:
            hashes = pool.map(lambda item: _hash(modules, *item), named)
            lines = [
                f"{name}\t{tuple(parameter.shape)}\t{parameter.dtype}\t{value}\n"
                for (name, parameter), value in zip(named, hashes, strict=True)
            ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def describe(self) -> dict[str, object]:
        """Return what a manifest records about the model, as JSON values."""
        return {
            "name": self.name,
            "source": self.source,
            "revision": self.revision,
            "digest": self.digest,
            "class": type(self.module).__name__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "n_parameters": sum(p.numel() for p in self.module.parameters()),
        }

    def _text_config(self) -> object:
        config = getattr(self.module, "config", None)
        getter = getattr(config, "get_text_config", None)
        return getter() if callable(getter) else config


def load_model(
    name: str = "demo",
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: str | Mapping[str, Any] | None = None,
) -> LanguageModel:
    """Load a language model and its tokenizer.

    Parameters
    ----------
    name
        ``demo``, a local Hugging Face folder, a local ``.gguf`` file, or a hub id.
    revision
        Branch, tag or commit of a hub model.
    dtype
        ``auto`` keeps the stored dtype (GGUF: float32).
    device
        ``auto`` prefers CUDA, then MPS, then the CPU.
    device_map
        Spreads a hub model or folder over several devices (needs accelerate), instead of
        ``device``.

    Raises
    ------
    UnknownName
        When no such model or revision exists.
    InvalidInput
        When a setting breaks a rule, or the folder or file is not a model that can be used.
    Unavailable
        When the hub, or the place of the demo assets, cannot be reached.
    """
    source = _source(name)
    if revision is not None and source != "hub":
        raise InvalidInput(
            f"`revision` applies to models from the hub; got {revision!r} for the {source} "
            f"model {name!r}: leave it out."
        )
    if device_map is not None and (source in ("demo", "gguf") or device != "auto"):
        raise InvalidInput(
            f"`device_map` applies to a hub model or folder, without `device`; got {device_map!r} "
            f"for the {source} model {name!r} with device {str(device)!r}."
        )
    wanted, target = resolve_dtype(dtype), resolve_device(device)
    path, commit = expanded(name), None
    if source == "demo":
        path = demo.demo_model_folder()
    elif source == "hub":
        path, commit = pretrained.fetch_snapshot(name, revision=revision)
    if source == "gguf":
        module, tokenizer = pretrained.load_gguf(path, dtype=wanted)
    else:
        module, tokenizer = pretrained.load_folder(path, dtype=wanted, device_map=device_map)
    if device_map is None:
        with pretrained.broken_as(f"model {name!r} on {target}"):
            module.to(target)  # type: ignore[arg-type]
    return LanguageModel(_frozen(module), tokenizer, name, source, commit)


AnyModel = LanguageModel | nn.Module | str | os.PathLike[str]
"""What every function that takes a model takes: a name or path for `load_model`, a module that
takes token ids, or a `LanguageModel`."""


def as_language_model(
    model: AnyModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> LanguageModel:
    """Return ``model`` as a `LanguageModel`.

    Parameters
    ----------
    model
        A `LanguageModel` (returned as it is), a name or path for `load_model`, or a module, which
        is left as it is: functions that run it hold it in eval mode meanwhile
        (`entangle.models.evaluating.evaluates`).
    tokenizer
        Replaces the model's own.

    Raises
    ------
    InvalidInput
        If it is none of these; and as `load_model`.
    """
    if isinstance(model, str | os.PathLike):
        model = load_model(os.fspath(model))
    if isinstance(model, LanguageModel):
        return model if tokenizer is None else replace(model, tokenizer=tokenizer)
    if not isinstance(model, nn.Module):
        raise InvalidInput(
            "`model` must be a name, a path, a module or a LanguageModel; got "
            f"{type(model).__name__}."
        )
    name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    return LanguageModel(model, tokenizer, name, "memory", None)


def _source(name: str) -> str:
    if not name:
        raise InvalidInput(
            f"`model` must be demo, a hub id, a folder or a .gguf file; got {name!r}."
        )
    if name == "demo":
        return "demo"
    if len(name) > _LONGEST_NAME:
        raise UnknownName(f"unknown model {name[:40]!r}…: a name of {len(name)} characters.")
    path = expanded(name)
    if path.is_dir():
        return "folder"
    if path.suffix == ".gguf" and path.is_file():
        return "gguf"
    if path.exists():
        raise InvalidInput(
            f"a model file must end in .gguf; got {name!r}: give its folder instead."
        )
    if path.suffix == ".gguf" or name.startswith((".", "~", "/", "\\")) or name.count("/") > 1:
        raise UnknownName(f"unknown model {name!r}: there is no such folder or file.")
    return "hub"


def _frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def _reserved_positions(module: nn.Module) -> int:
    """Count the rows of a learned position table that padding takes (RoBERTa's first two)."""
    tables = (
        child.padding_idx + 1
        for name, child in module.named_modules()
        if isinstance(child, nn.Embedding) and "position" in name and child.padding_idx is not None
    )
    return next(tables, 0)


def _hash(modules: Mapping[str, nn.Module], name: str, parameter: Tensor) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(modules, name, parameter):
        digest.update(chunk.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _chunks(modules: Mapping[str, nn.Module], name: str, parameter: Tensor) -> Iterator[Tensor]:
    if not parameter.is_meta:
        yield from torch.split(parameter.detach().reshape(-1), CHUNK)
        return
    from accelerate.utils import align_module_device  # it did the offloading

    owner, _, key = name.rpartition(".")
    with align_module_device(modules[owner], "cpu"):
        yield from torch.split(modules[owner].get_parameter(key).detach().reshape(-1), CHUNK)
