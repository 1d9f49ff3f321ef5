"""Loading a language model from the hub, a folder, a GGUF file or the embedded demo.

Adapters (PEFT, LoRA): a folder without a model of its own, merged into the base it names.
"""

import hashlib
import importlib.util
import inspect
import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from entangle.checks import shown
from entangle.errors import InvalidInput
from entangle.memory import free_on, refuse_beyond
from entangle.models import demo, gguf_files, pretrained
from entangle.models.cache import FLOATS, stored_sizes
from entangle.models.hub import ADAPTER_CONFIG, check_folder, check_settings, model_source
from entangle.models.mixtures import run_odd_widths
from entangle.models.pretrained import Loaded
from entangle.models.shards import device_of, digest_of, stored_of
from entangle.models.streaming import is_streamed
from entangle.packed.linear import PackedLinear, PackedRouter
from entangle.precision import check_device_map, resolve_device, resolve_dtype
from entangle.ranks import current
from entangle.runs.progress import tell
from entangle.runs.provenance import expand_user
from entangle.runs.reading import decoding, read_object


def load_adapter(folder: Path, *, dtype: torch.dtype | None) -> Loaded:
    """Load the base that an adapter names and merge the adapter into its weights.

    The result is an ordinary model: its neurons are those of the base, with the adapter's part.
    The adapter is merged in float32 and the sum rounded once to the base's dtype, or ``dtype``.

    Parameters
    ----------
    folder
        Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
    dtype
        Of the parameters; None keeps the one that the base is stored in.

    Raises
    ------
    InvalidInput
        When peft is not installed, the base is no local folder or hub model, or the adapter has no
        merged form.
    """
    settings = read_object(folder / ADAPTER_CONFIG, remedy="save the adapter again")
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base or "\0" in base:
        raise InvalidInput(
            f"adapter {str(folder)!r} must name its base model, a folder or a hub id; got "
            f"{shown(base)}."
        )
    if importlib.util.find_spec("peft") is None:
        raise InvalidInput(
            f"{str(folder)!r} is an adapter of {base!r}, no model of its own, and needs the "
            "package peft: `pip install peft` adds it; or save the merged model "
            "(`merge_and_unload`)."
        )
    revision = settings.get("revision")
    if revision is not None and not isinstance(revision, str):
        raise InvalidInput(
            f"adapter {str(folder)!r} must name the revision of its base; got {shown(revision)}."
        )
    place = _base_folder(folder, base, revision)
    model, tokenizer = pretrained.load_folder(place, dtype=dtype, device_map=None)
    merged = _merged(model, folder)
    tell(f"{str(folder)!r} is an adapter: merged into its base, {base!r}.")
    own = pretrained.tokenizer_of(folder)
    return merged, tokenizer if own is None else own


def _base_folder(folder: Path, base: str, revision: str | None) -> Path:
    beside = folder / base
    try:
        with decoding(folder / ADAPTER_CONFIG, remedy="save the adapter again"):
            is_beside = not expand_user(base).exists() and beside.is_dir()
        if is_beside:  # named from where the adapter lies
            base = str(beside)
        source = model_source(base)
    except InvalidInput as error:
        raise InvalidInput(
            f"the base of adapter {str(folder)!r} cannot be used: {error}"
        ) from error
    if source == "hub":
        return pretrained.fetch_snapshot(base, revision=revision)[0]
    if source != "folder":
        raise InvalidInput(
            f"the base of adapter {str(folder)!r} must be a model folder or a hub id; got "
            f"{base!r} ({source})."
        )
    return expand_user(base)


def _merged(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    kept = {name: one.dtype for name, one in model.named_parameters() if one.is_floating_point()}
    with pretrained.quiet(), pretrained.broken_as(f"adapter {str(folder)!r}"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            wide = PeftModel.from_pretrained(model.float(), str(folder), local_files_only=True)
        if lacking := next((str(one.message) for one in said if "missing" in str(one.message)), ""):
            raise ValueError(lacking)
        if not hasattr(wide.base_model, "merge_and_unload"):
            raise InvalidInput(
                f"an adapter must have a merged form to be analysed; {str(folder)!r} is of type "
                f"{wide.active_peft_config.peft_type}: load it with peft and pass the module."
            )
        merged = wide.merge_and_unload()
    for name, parameter in merged.named_parameters():
        if name in kept:
            parameter.data = parameter.data.to(kept[name])
    return merged


CHUNK = 1 << 24  # elements hashed at a time; bounds what is copied from a GPU


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model ready to be observed, with its tokenizer and where both came from."""

    module: nn.Module
    """The model. One from `load_model` is in eval mode and no parameter requires a gradient; a
    module of the user's is so only while it is looked at (`entangle.models.blocks`)."""
    tokenizer: PreTrainedTokenizerBase | None
    """None for a model without one, which runs on token ids only."""
    name: str
    """As the user gave it: ``demo``, a hub id or a path."""
    source: str
    """``demo``, ``hub``, ``folder``, ``adapter``, ``gguf`` or ``memory``."""
    revision: str | None
    """Commit hash of a hub model, where known."""

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the first parameter that is not offloaded."""
        return device_of(self.module)

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

        Packed experts and their routers count as parameters. Computed on first use and kept: read
        it before weights are changed.
        """
        named: list[tuple[str, Tensor]] = list(self.module.named_parameters())
        modules = dict(self.module.named_modules())
        for name, one in modules.items():
            if isinstance(one, PackedLinear | PackedRouter):
                named += [(f"{name}.{key}", buffer) for key, buffer in one.named_buffers()]
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
    model: "str | os.PathLike[str] | nn.Module | LanguageModel" = "demo",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    dtype: object = "auto",
    device: str | torch.device = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    stream: bool | None = None,
    memory: int | None = None,
) -> LanguageModel:
    """Load a language model and its tokenizer.

    Parameters
    ----------
    model
        ``demo``, a local Hugging Face folder, a local ``.gguf`` file, a folder of an adapter
        (PEFT, merged into its base), or a hub id. A path object counts as its string. A module or
        a `LanguageModel` comes back wrapped, and none of the other settings but ``tokenizer``
        applies to it.
    tokenizer
        Replaces the model's own.
    revision
        Branch, tag or commit of a hub model.
    dtype
        ``float32``, ``bfloat16``, ``float16`` or any floating dtype of torch or NumPy. ``auto``
        keeps the dtype that the weights are stored in, whatever the config says (GGUF: float32).
    device
        ``auto`` prefers CUDA, then MPS, then the CPU.
    device_map
        Spreads a hub model or folder over several devices (needs accelerate), instead of
        ``device``.
    stream
        Bring the weights of a hub model or folder block by block from their files
        (`entangle.models.streaming`) instead of holding them all; results are the same to the bit.
        By default where they do not fit into what is free on the device, which is told.
    memory
        Bytes that the work on it will take beside it, which must fit too; for that decision alone.

    Raises
    ------
    UnknownName
        When no such model or revision exists.
    InvalidInput
        When a setting breaks a rule, or the folder or file is not a model that can be used.
    Unavailable
        When the hub, or the place of the demo assets, cannot be reached.
    """
    if not isinstance(model, str | os.PathLike):
        given: dict[str, object] = {"revision": revision, "device_map": device_map}
        given |= {"stream": stream or None}
        given |= {"dtype": _unless_auto(dtype), "device": _unless_auto(device)}
        return _wrapped(model, tokenizer, given)
    name = str(os.fspath(model))
    source = model_source(model)
    check_settings(
        source, name, revision=revision, dtype=dtype, device=device, device_map=device_map
    )
    wanted, target = resolve_dtype(dtype), resolve_device(device)
    check_device_map(device_map)
    if stream and device_map is not None:
        raise InvalidInput(
            f"`device_map` spreads a model that is held; got {device_map!r} beside `stream`: leave "
            "one of them out."
        )
    placed = _Placed(target, stream, memory)
    (module, own), commit = _load(source, name, revision, wanted, device_map, placed)
    if device_map is None and not is_streamed(module):
        with pretrained.broken_as(f"model {name!r} on {target}"):
            module.to(target)  # type: ignore[arg-type]
    found = LanguageModel(
        _frozen(module), own if tokenizer is None else tokenizer, name, source, commit
    )
    if source != "demo" and device_map is None and not is_streamed(module):
        _check_runs(found)
    return found


@dataclass(frozen=True)
class _Placed:
    """Where a model goes, and whether its weights are to be held there."""

    device: torch.device
    stream: bool | None
    memory: int | None

    def streams(self, folder: Path, dtype: torch.dtype | None) -> bool:
        """Tell whether the weights of a folder are to come block by block.

        Raises
        ------
        MemoryLimit
            If they are not to, and do not fit.
        """
        if self.stream or (self.stream is None and (folder / ADAPTER_CONFIG).is_file()):
            return bool(self.stream)
        ranks, free = current(), free_on(self.device)
        stored = [(kind, n) for kind, n in stored_sizes(folder) if kind in FLOATS]
        width = max((FLOATS[kind].itemsize for kind, _ in stored), default=0)
        needed = sum(n for _, n in stored) * (dtype.itemsize if dtype is not None else width)
        if self.stream is False:
            refuse_beyond(
                needed, self.device, what=f"holding the weights of {str(folder)!r}",
                remedy="leave --no-stream (stream=False) out: blocks then come from the disk",
            )  # fmt: skip
            return False
        if not any(ranks.exchange(needed + (self.memory or 0) > free)):  # all ranks stream, or none
            return False
        tell(
            f"{str(folder)!r} takes {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free "
            f"on {self.device}"
            + (f", {self.memory / 2**30:.1f} GiB of which go to the work" if self.memory else "")
            + ": its blocks come from the disk one at a time."
        )
        return True


def _check_runs(model: LanguageModel) -> None:
    """Run a few tokens, so that a config that no token passes is told of at once."""
    run_odd_widths(model.module)
    n_tokens = min(4, model.context_length or 4)
    ids = torch.zeros(1, n_tokens, dtype=torch.int64, device=model.device)
    accepted = inspect.signature(model.module.forward).parameters
    options = {"use_cache": False} if "use_cache" in accepted else {}
    with pretrained.broken_as(f"model {model.name!r}"), torch.no_grad():
        model.module(ids, **options)


def _load(
    source: str,
    name: str,
    revision: str | None,
    dtype: torch.dtype | None,
    device_map: str | Mapping[str, Any] | None,
    placed: _Placed,
) -> tuple[pretrained.Loaded, str | None]:
    path, commit = expand_user(name), None
    if placed.stream and source not in ("hub", "folder"):
        raise InvalidInput(
            f"`stream` applies to a hub model or a folder with safetensors weights; {name!r} is "
            f"{source}: leave it out."
        )
    if source == "demo":
        return demo.load_demo(dtype=dtype), None
    if source == "gguf":
        return gguf_files.open_gguf(path, dtype=dtype), None
    if source == "hub":
        path, commit = pretrained.fetch_snapshot(name, revision=revision)
    if source == "adapter" or (source == "hub" and check_folder(path)):
        if device_map is not None:
            raise InvalidInput(
                f"`device_map` applies to whole models; got {device_map!r} for adapter {name!r}."
            )
        return load_adapter(path, dtype=dtype), commit
    if device_map is None and placed.streams(path, dtype):
        return pretrained.open_folder(path, dtype=dtype, device=placed.device), commit
    return pretrained.load_folder(path, dtype=dtype, device_map=device_map), commit


def _unless_auto(setting: object) -> object:
    return None if isinstance(setting, str) and setting == "auto" else setting


def _wrapped(
    model: "nn.Module | LanguageModel",
    tokenizer: PreTrainedTokenizerBase | None,
    given: Mapping[str, object],
) -> LanguageModel:
    for setting, value in given.items():
        if value is not None and isinstance(model, nn.Module | LanguageModel):
            raise InvalidInput(
                f"`{setting}` applies to a model that is loaded by name or path; got {value!r} for "
                f"a {type(model).__name__}: move or cast the module itself."
            )
    return as_language_model(model, tokenizer)


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
        (`entangle.models.blocks.evaluates`).
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
    model = uncompiled_module(model)
    _refuse_encoder_decoder(model)
    name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    return LanguageModel(model, tokenizer, name, "memory", None)


def _refuse_encoder_decoder(module: nn.Module) -> None:
    """Raise `InvalidInput` for a model whose decoder is fed other tokens than it is given."""
    config = getattr(module, "config", None)
    fed = "decoder_input_ids" in inspect.signature(module.forward).parameters
    if fed and getattr(config, "is_encoder_decoder", False):
        raise InvalidInput(
            f"a model must be a decoder or an encoder; {type(module).__name__} is an "
            "encoder-decoder: pass its encoder or decoder."
        )


def uncompiled_module(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` was given, or the module itself."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


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
    stored = stored_of(parameter)
    if stored is not None:
        return digest_of(stored)
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
