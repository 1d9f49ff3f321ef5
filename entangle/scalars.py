"""Settings that are numbers: NumPy's count as Python's, and everything else is refused."""

from numbers import Integral, Real
from typing import TYPE_CHECKING

from entangle.errors import InvalidInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def whole(name: str, value: object, *, least: int) -> int:
    """Return an integer setting as an int.

    Raises
    ------
    InvalidInput
        If it is no integer, or below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InvalidInput(f"`{name}` must be an integer of at least {least}; got {value!r}.")
    return int(value)


def real(name: str, value: object) -> float:
    """Return a setting that is a number as a float.

    Raises
    ------
    InvalidInput
        If it is no number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidInput(f"`{name}` must be a number; got {value!r}.")
    return float(value)


def tensor_of(name: str, value: object, dtype: "torch.dtype | None" = None) -> "Tensor":
    """Return a tensor as it is, and a number or a sequence of numbers as a tensor of ``dtype``.

    Raises
    ------
    InvalidInput
        If it holds anything but numbers.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return value
    try:
        return torch.as_tensor(value, dtype=dtype)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidInput(f"`{name}` must be numbers; got {value!r}.") from None
