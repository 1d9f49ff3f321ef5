"""Load an expanded model from its checkpoint."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from entangle.errors import InvalidInput, Unavailable
from entangle.experts.build import structural_copy
from entangle.experts.checkpoint import install, read_block, refuse_saving
from entangle.experts.expand import KIND
from entangle.models.blocks import evaluates
from entangle.models.layers import list_layers
from entangle.models.loading import AnyModel, LanguageModel, as_language_model, load_model
from entangle.runs.provenance import expand_user, read_manifest
from entangle.runs.reading import inside
from entangle.runs.sealing import file_digest

_MODEL = {"name", "source", "revision", "digest", "dtype", "class"}


@evaluates
def load_expanded(
    path: str | os.PathLike[str],
    *,
    base: AnyModel | None = None,
    device: str | torch.device = "auto",
) -> LanguageModel:
    """Load an expanded model that `entangle.expand` wrote; it generates like any other.

    Parameters
    ----------
    path
        The checkpoint's folder.
    base
        The dense model: a name or path for `entangle.load_model`, a module or a `LanguageModel`;
        by default the name in the checkpoint's manifest.
    device
        Where a base that is named goes.

    Returns
    -------
    LanguageModel
        Experts are held with their zeros, in the base model's dtype: about ``experts`` times the
        memory of the layers that were expanded.

    Raises
    ------
    InvalidInput
        If the folder is no checkpoint, a file is truncated or altered, or the base model is another
        than the one that was expanded.
    Unavailable
        If the base model is not where the manifest says, and ``base`` is not given.
    """
    manifest = _manifest(path)
    if base is None or isinstance(base, str | os.PathLike):
        dense = load_base(path, None if base is None else os.fspath(base), device=device)
    else:
        dense = as_language_model(base)
    _check_digest(dense, manifest, path)
    module = structural_copy(dense.module)
    layers = {layer.name: layer for layer in list_layers(module)}
    missing = set(manifest["settings"]["sparsity"]) - set(manifest.get("layers_without_tokens", ()))
    for name, digest in manifest["files"].items():
        file = expand_user(path) / name
        _check_file(file, digest)
        found = read_block(file, layers)[0]
        install(module, found)
        missing -= {one.layer.name for one in found}
    if missing:
        raise InvalidInput(
            f"{str(path)!r} has no experts for {min(missing)!r}: its manifest.json or a file was "
            "altered; build it anew."
        )
    refuse_saving(module)
    return LanguageModel(module, dense.tokenizer, str(path), "expansion", dense.revision)


def load_base(
    path: str | os.PathLike[str],
    base: str | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device = "auto",
) -> LanguageModel:
    """Load the dense model that a checkpoint was made from, in the dtype it had.

    Parameters
    ----------
    path
        The checkpoint's folder.
    base, revision
        The dense model's name, and the revision of one from the hub; by default those in the
        checkpoint's manifest.
    device
        Where it goes.

    Raises
    ------
    InvalidInput, Unavailable
        If it cannot be loaded, or is another model than the one that was expanded.
    """
    manifest = _manifest(path)
    made_from = manifest["model"]
    if base is None:
        base, revision = str(made_from["name"]), made_from["revision"]
        if made_from["source"] in ("folder", "gguf"):
            places = (str(made_from.get("path")), str(expand_user(base)))
            there = [place for place in places if os.path.exists(place)]  # noqa: PTH110
            if not there:
                raise _no_base(path, made_from, "is no longer there")
            base = there[0]
        if made_from["source"] == "memory":
            raise _no_base(path, made_from, "was in memory only")
    try:
        dense = load_model(base, revision=revision, dtype=str(made_from["dtype"]), device=device)
    except (InvalidInput, Unavailable) as error:
        raise type(error)(f"the dense model of {str(path)!r}: {error}") from error
    _check_digest(dense, manifest, path)
    return dense


def _manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    manifest: dict[str, Any] = read_manifest(path, KIND)
    made_from, files = manifest.get("model"), manifest.get("files")
    settings = manifest.get("settings")
    complete = isinstance(made_from, dict) and made_from.keys() >= _MODEL
    complete &= isinstance(settings, dict) and isinstance(settings.get("sparsity"), dict)
    if not complete or not isinstance(files, dict):
        raise InvalidInput(f"{str(path)!r} has a damaged manifest.json; build it anew.")
    for name in files:
        inside(expand_user(path), name, what=f"the manifest.json of {str(path)!r}")
    return manifest


def _no_base(
    path: str | os.PathLike[str], made_from: Mapping[str, object], why: str
) -> Unavailable:
    return Unavailable(
        f"the dense model {made_from['name']!r} ({made_from['class']}, digest "
        f"{str(made_from['digest'])[:12]}…) of {str(path)!r} {why}; name it with --base (base)."
    )


def _check_digest(
    dense: LanguageModel, manifest: Mapping[str, Any], path: str | os.PathLike[str]
) -> None:
    wanted = str(manifest["model"]["digest"])
    if dense.digest != wanted:
        raise InvalidInput(
            f"the base model {dense.name!r} has digest {dense.digest[:12]}…, but {str(path)!r} was "
            f"made from {wanted[:12]}…; pass the model it was made from as `base` (--base)."
        )


def _check_file(path: Path, digest: str) -> None:
    if not path.is_file():
        raise InvalidInput(f"{str(path)!r} is missing; the checkpoint is incomplete.")
    if file_digest(path) != digest:
        raise InvalidInput(f"{str(path)!r} was truncated or altered; build it anew.")
