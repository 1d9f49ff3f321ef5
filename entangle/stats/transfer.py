"""Results from a GPU to the CPU, with one wait."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

First = TypeVar("First")
Second = TypeVar("Second")

_SMALL, _LARGE = 2**22, 2**26
_BEGINNING = Lock()


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of any devices on the CPU; those that are there are not copied.

    What comes from a GPU goes through pinned memory, beside the work that the GPU has, and is
    waited for once, for all of it. Until then other threads can give the GPU more work, which a
    copy to ordinary memory would not let them. That is how tensors of more than 64 MiB go, so that
    little memory is pinned. Tensors of more than 4 MiB are returned as they lie there: copy what is
    to be kept of them.
    """
    found = [
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        if _is_pinned(tensor)
        else tensor.cpu()
        for tensor in tensors
    ]
    pairs = list(zip(tensors, found, strict=True))
    devices = {tensor.device for tensor in tensors if _is_pinned(tensor)}
    events = [
        _copied([pair for pair in pairs if pair[0].device == device], device) for device in devices
    ]
    for event in events:
        event.synchronize()
    return [here.clone() if _is_pinned(there, _SMALL) else here for there, here in pairs]


def _copied(pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> torch.cuda.Event:
    """Begin to copy tensors of a GPU into pinned ones; return what happens when that is done."""
    stream, before = _copying(device), torch.cuda.current_stream(device)
    with _BEGINNING, torch.cuda.stream(stream):
        stream.wait_stream(before)
        for there, here in pairs:
            if _is_pinned(there):
                here.copy_(there, non_blocking=True)
        done: torch.cuda.Event = stream.record_event()
    return done


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a GPU that copies to the CPU, which several threads share."""
    return torch.cuda.Stream(device)


def _is_pinned(tensor: Tensor, most: int = _LARGE) -> bool:
    """Tell whether a tensor goes through pinned memory, and has at most so many bytes."""
    return tensor.is_cuda and tensor.numel() * tensor.element_size() <= most


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
