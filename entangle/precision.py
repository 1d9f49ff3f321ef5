"""dtype and device policy, in one place.

The model runs in its own dtype; statistics are accumulated in the widest type the device has; no
TensorFloat-32 inside solvers.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from entangle.errors import InvalidInput

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


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Translate a device's name; ``"auto"`` prefers CUDA, then Apple's MPS, then the CPU."""
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
        raise InvalidInput(f"`device` must be auto, cpu, cuda, cuda:N or mps; got {str(device)!r}.")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(
            f"`device` {str(device)!r} was asked for, but torch sees no CUDA device; use cpu."
        )
    return resolved


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of running sums on ``device``: float64, or float32 where there is none."""
    return torch.float32 if device.type == "mps" else torch.float64


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
