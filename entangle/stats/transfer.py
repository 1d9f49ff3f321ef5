"""Results from a GPU to the CPU, with one wait."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

First = TypeVar("First")
Second = TypeVar("Second")


_LARGE = 2**26


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of any devices on the CPU; those that are there are not copied.

    What comes from a GPU goes through pinned memory and is waited for once, for all of it: until
    then other threads can give the GPU more work, which a copy to ordinary memory would not let
    them. That is how tensors of more than 64 MiB go, so that little memory is pinned.
    """
    found = [_copied(tensor) if _is_pinned(tensor) else tensor.cpu() for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        event.synchronize()
    pairs = zip(tensors, found, strict=True)
    return [here.clone() if _is_pinned(there) else here for there, here in pairs]


def _is_pinned(tensor: Tensor) -> bool:
    """Tell whether a tensor goes through pinned memory."""
    return tensor.is_cuda and tensor.numel() * tensor.element_size() <= _LARGE


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy in pinned memory that is complete when the current stream gets there."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def fetched(first: First, second: Second) -> tuple[First, Second]:
    """Return two dataclasses with all their tensors on the CPU, as `to_host` brings them.

    Parameters
    ----------
    first, second
        Frozen dataclasses, or None, which stays None.
    """
    held = [_tensors(first), _tensors(second)]
    here = iter(to_host([tensor for one in held for tensor in one.values()]))
    moved: list[dict[str, Any]] = [{name: next(here) for name in one} for one in held]
    return _with(first, moved[0]), _with(second, moved[1])


def _tensors(part: object) -> dict[str, Tensor]:
    """Return the fields of a dataclass that are tensors."""
    names = [f.name for f in fields(part)] if is_dataclass(part) else []
    return {name: getattr(part, name) for name in names if isinstance(getattr(part, name), Tensor)}


def _with(part: Any, tensors: dict[str, Any]) -> Any:
    """Return a dataclass with other tensors."""
    return replace(part, **tensors) if tensors else part
