"""Token ids that exist already: in a safetensors file or in an array."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from entangle.calibration.padding import checked_mask
from entangle.errors import InvalidInput
from entangle.reading import decoding, regular_file

METADATA_KEY = "entangle.calibration_set"
_NAMES = ("ids", "input_ids")
_MASK = "attention_mask"
_REMEDY = "give a valid safetensors file"


@dataclass(frozen=True, eq=False)
class TokenFile:
    """What a safetensors file of token ids holds."""

    ids: Int64[Tensor, "..."]
    """Token ids, shape (tokens,) for a running text or (n_seq, seq_len)."""
    origin: dict[str, Any] | None
    """`CalibrationSet.describe` of the set that was saved, None for any other file."""
    mask: Bool[Tensor, "n_seq seq_len"] | None = None
    """True where an id is a token of the text, False where it is a pad; None where all are."""


def integer_ids(values: Tensor | NDArray[np.generic], *, name: str) -> Int64[Tensor, "..."]:
    """Return a CPU int64 copy of a one- or two-dimensional integer array of token ids.

    Raises
    ------
    InvalidInput
        If the array is empty, has another number of dimensions, or does not hold integers.
    """
    tensor = values if isinstance(values, Tensor) else _from_numpy(values, name)
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise InvalidInput(f"{name} must hold integer token ids; got {tensor.dtype}.")
    if tensor.ndim not in (1, 2) or tensor.numel() == 0:
        raise InvalidInput(
            f"{name} must have shape (tokens,) or (n_seq, seq_len) and hold at least one token; "
            f"got shape {tuple(tensor.shape)}."
        )
    return tensor.detach().to("cpu", torch.int64, copy=True)


def _from_numpy(values: NDArray[np.generic], name: str) -> Tensor:
    if values.dtype.kind not in "iu":
        raise InvalidInput(f"{name} must hold integer token ids; got {values.dtype}.")
    return torch.from_numpy(values.astype(np.int64))


def read_token_file(path: Path) -> TokenFile:
    """Read the tensor ``ids`` (or ``input_ids``) of a safetensors file.

    Raises
    ------
    Unavailable
        If the file is missing or unreadable.
    InvalidInput
        If it is corrupt or holds no such integer tensor, or its ``attention_mask`` does not fit.
    """
    with decoding(regular_file(path), remedy=_REMEDY), safe_open(path, framework="pt") as file:
        name = _name(path, list(file.keys()))
        tensor, metadata = file.get_tensor(name), file.metadata() or {}
        masked = file.get_tensor(_MASK) if _MASK in list(file.keys()) else None
    ids = integer_ids(tensor, name=f"tensor `{name}` of '{path}'")
    return TokenFile(*masked_ids(ids, masked, _origin(path, metadata), name=f"{_MASK} of '{path}'"))


def masked_ids(
    ids: Int64[Tensor, "..."],
    mask: Tensor | None,
    origin: dict[str, Any] | None = None,
    *,
    name: str,
) -> tuple[Tensor, dict[str, Any] | None, Tensor | None]:
    """Return the fields of a `TokenFile`; a running text loses its pads.

    Raises
    ------
    InvalidInput
        As `checked_mask`.
    """
    if mask is None:
        return ids, origin, None
    if ids.ndim == 2:
        return ids, origin, checked_mask(mask, ids, name=name)
    if mask.ndim != 1:
        raise InvalidInput(
            f"`{name}` must have the shape of the ids, {tuple(ids.shape)}; got {tuple(mask.shape)}."
        )
    real = checked_mask(mask[None], ids[None], name=name)
    return ids if real is None else ids[real[0]], origin, None


def _name(path: Path, names: list[str]) -> str:
    for name in _NAMES:
        if name in names:
            return name
    raise InvalidInput(
        f"'{path}' must hold token ids in a tensor named `ids` or `input_ids`; "
        f"it has {', '.join(sorted(names)[:5]) or 'no tensors'}."
    )


def _origin(path: Path, metadata: dict[str, str]) -> dict[str, Any] | None:
    if METADATA_KEY not in metadata:
        return None
    remedy = f"its metadata `{METADATA_KEY}` is corrupt: make the set again"
    with decoding(path, remedy=remedy):
        origin = json.loads(metadata[METADATA_KEY])
        return {key: origin[key] for key in ("source", "settings", "digest")}
