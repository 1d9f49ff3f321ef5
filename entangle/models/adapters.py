"""Adapters (PEFT, LoRA): a folder without a model of its own, merged into the base it names."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch

from entangle.checks import shown
from entangle.errors import InvalidInput
from entangle.models import pretrained
from entangle.models.pretrained import Loaded
from entangle.models.sources import ADAPTER_CONFIG, model_source
from entangle.progress import tell
from entangle.provenance import expanded
from entangle.reading import decoding, read_object


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
            is_beside = not expanded(base).exists() and beside.is_dir()
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
    return expanded(base)


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
