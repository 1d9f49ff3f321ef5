"""dtype and device policy, in one place.

The model runs in its own dtype; statistics are accumulated in the widest type the device has; no
TensorFloat-32 inside solvers.

Products and parts of rows whose last bits do not depend on how many rows are worked on at once.

A library multiplies matrices of another shape by other instructions, and sums the single row of a
tensor by all threads. On the CPU products are therefore made of tiles of one size, and no row is
left alone.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from entangle.errors import InvalidInput
from entangle.kernels.dispatch import dispatch, on_cpu

PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential", "disk")
"""What a ``device_map`` may say beside devices."""

_WITH_TF32 = 8  # compute capability

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: object) -> torch.dtype | None:
    """Translate a dtype's name; ``"auto"`` gives None (the dtype the model is stored in).

    A dtype of torch is taken as it is, one of NumPy (``np.float16``, ``np.dtype("float32")``) as
    torch's of the same name. It must be floating.
    """
    named = dtype if isinstance(dtype, str) else None
    if named == "auto":
        return None
    found = DTYPES.get(named) if named is not None else _as_torch(dtype)
    if found is None or not found.is_floating_point:
        raise InvalidInput(f"`dtype` must be auto, {', '.join(DTYPES)}; got {dtype!r}.")
    return found


def _as_torch(dtype: object) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:  # which NumPy takes for float64
        return None
    try:
        found = getattr(torch, np.dtype(dtype).name, None)  # type: ignore[call-overload]
    except TypeError:
        return None
    return found if isinstance(found, torch.dtype) else None


def resolve_device(device: str | torch.device = "auto", *, setting: str = "device") -> torch.device:
    """Translate a device's name; ``"auto"`` prefers CUDA, then Apple's MPS, then the CPU.

    Raises
    ------
    InvalidInput
        If it is no device, or one that is not there; ``setting`` is what the message calls it.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        known = resolved.type in ("cpu", "cuda", "mps")
    except RuntimeError:
        known = False
    if not known:
        raise InvalidInput(
            f"`{setting}` must be auto, cpu, cuda, cuda:N or mps; got {str(device)!r}."
        )
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if resolved.type == "cuda" and (resolved.index or 0) >= n_cuda:
        raise InvalidInput(
            f"`{setting}` {str(device)!r} was asked for, but torch sees {n_cuda or 'no'} CUDA "
            "device(s); use cpu, or a lower index."
        )
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise InvalidInput(
            f"`{setting}` {str(device)!r} was asked for, but torch sees no MPS device; use cpu."
        )
    return resolved


def check_device_map(device_map: str | Mapping[str, Any] | None) -> None:
    """Check that the devices exist which a ``device_map`` names.

    Raises
    ------
    InvalidInput
        If one does not.
    """
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    for place in places:
        if isinstance(place, str) and place not in PLACEMENTS:
            resolve_device(place, setting="device_map")


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of running sums on ``device``: float64, or float32 where there is none."""
    return torch.float32 if device.type == "mps" else torch.float64


def exact_in_half(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether 16-bit factors of a product are multiplied as they are.

    A product of two 16-bit numbers is a float32 number, and an NVIDIA GPU sums such products in
    float32: the result is that of float32 factors, many times as fast.
    """
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def has_tf32(values: torch.Tensor) -> bool:
    """Tell whether `tensor_cores` makes a difference to products of these numbers."""
    if not values.is_cuda or values.dtype != torch.float32:
        return False
    return torch.cuda.get_device_capability(values.device)[0] >= _WITH_TF32


@contextmanager
def full_precision() -> Iterator[None]:
    """Run float32 matrix products in full float32 (no TF32) inside the ``with`` block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Let float32 matrix products round their factors to TF32 inside the ``with`` block, on a GPU.

    For steps whose result is worked out again in full precision, or factors that are split so that
    nothing is lost.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


ROWS = 64
"""Rows of a tile."""

_TOKENS = 1024
_STEP = 16  # tokens of the last tile, padded, are a multiple of it


def row_parts(n_rows: int, at_once: int) -> Iterator[slice]:
    """Yield slices of about ``at_once`` rows, of whole tiles where these are fewer.

    Every part has two rows or more, but where there is only one.
    """
    size = max(2, at_once // ROWS * ROWS or at_once)
    starts = [*range(0, max(1, n_rows - 1), size), n_rows]
    return map(slice, starts[:-1], starts[1:])


def _in_tiles(rows: Tensor, tokens: Tensor, *, out: Tensor) -> None:
    filled = pad(rows, (0, 0, 0, -rows.shape[0] % ROWS))
    work = rows.new_empty(ROWS, _TOKENS)
    for start in range(0, tokens.shape[0], _TOKENS):
        some = tokens[start : start + _TOKENS]
        count = some.shape[0]
        some = pad(some, (0, 0, 0, -count % _STEP))
        product = work if some.shape[0] == _TOKENS else rows.new_empty(ROWS, some.shape[0])
        for first in range(0, rows.shape[0], ROWS):
            place = out[first : first + ROWS, start : start + count]
            torch.mm(filled[first : first + ROWS], some.T, out=product)
            place.copy_(product[: place.shape[0], :count])


@dispatch(_in_tiles, where=on_cpu)
def multiply(
    rows: Float[Tensor, "rows features"],
    tokens: Float[Tensor, "tokens features"],
    *,
    out: Float[Tensor, "rows tokens"],
) -> None:
    """Write ``rows @ tokens.T`` to ``out``, on the CPU in tiles of one size.

    Parameters
    ----------
    rows
        Weights, float32.
    tokens
        Inputs, float32, on the same device.
    out
        What is written.
    """
    torch.matmul(rows, tokens.T, out=out)
