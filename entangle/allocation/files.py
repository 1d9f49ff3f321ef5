"""Vectors of zeros on disk: one safetensors file an allocation."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from entangle.errors import InvalidInput
from entangle.runs.provenance import SCHEMA_VERSION, expand_user, output_file
from entangle.runs.reading import READ_ERRORS
from entangle.runs.sealing import DIGESTS, check_digest, manifest_digest

KIND = "allocation"
_METADATA = "entangle"
_SUFFIX = ".safetensors"


def check_file(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Check that an allocation can be written, before any work is done.

    Raises
    ------
    InvalidInput
        If the name has another ending than ``.safetensors``, is a folder, or exists and ``force``
        is off.
    """
    target = expand_user(path)
    if target.suffix != _SUFFIX:
        raise InvalidInput(f"an allocation's file must end in {_SUFFIX}; got {str(path)!r}.")
    if target.is_dir():
        raise InvalidInput(f"the output {str(path)!r} is a folder; name a file.")
    if target.exists() and not force:
        raise InvalidInput(
            f"{str(path)!r} exists; name another file or use --force (force=True) to replace it."
        )
    return target


def write_zeros(
    path: str | os.PathLike[str],
    zeros: Mapping[str, Tensor],
    described: Mapping[str, object],
    *,
    force: bool,
) -> Path:
    """Write one int64 vector a layer, and ``described`` as JSON in the file's metadata.

    The file appears when it is complete. Errors are those of `check_file`, and `Unavailable` if the
    file cannot be written.
    """
    target = check_file(path, force=force)
    head = {"schema_version": SCHEMA_VERSION, "kind": KIND, "layers": list(zeros)}
    whole = head | dict(described) | {"sha256": _digest(zeros)}
    whole |= {DIGESTS: {"manifest": manifest_digest(whole)}}
    metadata = {_METADATA: json.dumps(whole, allow_nan=False)}  # one key: keys have no order
    content = to_safetensors({name: part.contiguous() for name, part in zeros.items()}, metadata)
    with output_file(target) as temporary:
        temporary.write_bytes(content)
    return target


def read_zeros(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_zeros` wrote: the vectors in their order, and what was described.

    Raises
    ------
    InvalidInput
        If the file is missing, truncated, altered, or something else.
    """
    source = expand_user(path)
    if not source.is_file():
        raise InvalidInput(f"{str(path)!r} is no file; name one that `entangle allocate` wrote.")
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except READ_ERRORS as error:
        raise InvalidInput(f"{str(path)!r} cannot be read ({error}); allocate anew.") from error
    if _METADATA not in metadata:
        raise InvalidInput(
            f"{str(path)!r} is not an allocation; name a file that `entangle allocate` wrote."
        )
    described = _described(metadata[_METADATA], str(path))
    layers = described.get("layers")
    counts = all(one.ndim == 1 and one.dtype == torch.int64 for one in tensors.values())
    if not isinstance(layers, list) or set(map(str, layers)) != set(tensors) or not counts:
        raise InvalidInput(f"{str(path)!r} was altered (its layers differ); allocate anew.")
    zeros = {str(name): tensors[str(name)] for name in layers}
    if _digest(zeros) != described.get("sha256"):
        raise InvalidInput(
            f"{str(path)!r} was altered (its numbers do not match its digest); allocate anew."
        )
    return zeros, described


def _described(text: str, path: str) -> dict[str, Any]:
    try:
        described = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path!r} was altered ({error}); allocate anew.") from error
    kind = described.get("kind") if isinstance(described, dict) else None
    if kind != KIND:
        raise InvalidInput(f"{path!r} must hold a result of kind {KIND!r}; got {kind!r}.")
    version = described.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InvalidInput(
            f"{path!r} has schema version {version!r}, this version of entangle reads "
            f"{SCHEMA_VERSION}; allocate anew."
        )
    check_digest(path, described)
    return {key: one for key, one in described.items() if key != DIGESTS}


def _digest(zeros: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of all counts in order, in hexadecimal."""
    everything = torch.cat(list(zeros.values()))
    names = "\n".join(f"{name}\t{len(part)}" for name, part in zeros.items())
    return hashlib.sha256(names.encode() + everything.numpy().astype("<i8").tobytes()).hexdigest()
