"""Load an expanded model from its checkpoint."""

import os
from pathlib import Path

import torch

from entangle.errors import InvalidInput
from entangle.expansion.build import structural_copy
from entangle.expansion.checkpoint import file_digest, install, read_block
from entangle.expansion.expand import KIND
from entangle.models.layers import list_layers
from entangle.models.loading import LanguageModel, load_model
from entangle.provenance import read_manifest


def load_expanded(
    path: str | os.PathLike[str],
    *,
    base: LanguageModel | str | None = None,
    device: str | torch.device = "auto",
) -> LanguageModel:
    """Load an expanded model that `entangle.expand` wrote; it generates like any other.

    Parameters
    ----------
    path
        The checkpoint's folder.
    base
        The dense model, or its name; by default the name in the checkpoint's manifest.
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
    """
    manifest = read_manifest(path, KIND)
    folder = Path(path).expanduser()
    model, files = manifest.get("model"), manifest.get("files")
    if not isinstance(model, dict) or not isinstance(files, dict):
        raise InvalidInput(f"{str(path)!r} has a damaged manifest.json; build it anew.")
    if not isinstance(base, LanguageModel):
        dense = load_model(
            base or str(model["name"]),
            revision=model["revision"] if base is None else None,
            dtype=str(model["dtype"]),
            device=device,
        )
    else:
        dense = base
    if dense.digest != model["digest"]:
        raise InvalidInput(
            f"the base model {dense.name!r} has digest {dense.digest[:12]}…, but {str(path)!r} was "
            f"made from {str(model['digest'])[:12]}…; pass the model it was made from as `base`."
        )
    module = structural_copy(dense.module)
    layers = {layer.name: layer for layer in list_layers(module)}
    for name, digest in files.items():
        _check_file(folder / name, digest)
        install(module, read_block(folder / name, layers)[0])
    return LanguageModel(module, dense.tokenizer, str(path), "expansion", dense.revision)


def _check_file(path: Path, digest: str) -> None:
    if not path.is_file():
        raise InvalidInput(f"{str(path)!r} is missing; the checkpoint is incomplete.")
    if file_digest(path) != digest:
        raise InvalidInput(f"{str(path)!r} was truncated or altered; build it anew.")
