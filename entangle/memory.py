"""How much memory a run may take: what was asked for, or half of what is free.

Rows that were recorded fill it as they come. What is computed piece by piece has a fixed size,
`WORK_BYTES`, so that the pieces, and with them the last bits of a result, are the same on every
machine that has twice as much to give.
"""

import ctypes
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from numbers import Real
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

import psutil

from entangle.errors import InvalidInput, MemoryLimit
from entangle.ranks import current

if TYPE_CHECKING:
    import torch


_LOG = logging.getLogger(__name__)
Part = TypeVar("Part")

SHARE = 2
"""One part in so many of what is free is taken where nothing was asked for."""

LEAST_BYTES = 2**20
"""Least memory that can be asked for: less is a size whose unit was forgotten."""

WORK_BYTES = 2**30
"""Most memory for what is computed piece by piece."""

_MMAP_THRESHOLD = -3  # its number in malloc.h
_LEAST_MAPPED, _MOST_MAPPED = 2**17, 2**25
_MOST_BYTES = 2**62
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit, use, and the part of the use that gives way, in the files of cgroups 2 and 1."""


def check_memory(memory: object) -> int | None:
    """Return a budget in bytes, None where it is to be half of what is free.

    Raises
    ------
    InvalidInput
        If it is no number, or below 1 MiB.
    """
    if memory is None:
        return None
    if isinstance(memory, bool) or not isinstance(memory, Real):
        raise InvalidInput(
            f"`memory` must be a number of bytes; got {memory!r}: leave it out (None) for half of "
            "what is free."
        )
    if not float(memory) >= LEAST_BYTES:
        raise InvalidInput(
            f"`memory` must be at least 1 MiB in bytes; got {memory!r}: name more, or leave it out "
            "for half of what is free."
        )
    return int(min(_MOST_BYTES, float(memory)))


def memory_for(memory: object, module: "torch.nn.Module") -> int:
    """Return the bytes that work on a model may take, beside the model.

    Parameters
    ----------
    memory
        Bytes; None for half of what is free: on the GPU that has least of those that hold the
        model, else in RAM, of which the ranks of one machine take equal shares.
    module
        The model, where it is to run.

    Raises
    ------
    InvalidInput
        If ``memory`` is no number, or below 1 MiB.
    """
    asked = check_memory(memory)
    if asked is not None:
        return asked
    gpus = set(gpus_among(parameter.device for parameter in module.parameters()))
    free = min(map(free_on_gpu, gpus)) if gpus else free_ram() // current().beside
    return max(LEAST_BYTES, free // SHARE)


def ran_out(error: BaseException) -> bool:
    """Tell whether memory ran out; torch has no class of its own for that on the CPU."""
    import torch

    named = isinstance(error, torch.OutOfMemoryError | MemoryError)
    said = ("you tried to allocate", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return named or (isinstance(error, RuntimeError) and any(one in str(error) for one in said))


def free_on(device: "torch.device") -> int:
    """Return the free bytes of a GPU, or of RAM: an equal share for each rank of a machine."""
    return free_on_gpu(device) if device.type == "cuda" else free_ram() // current().beside


def refuse_beyond(needed: int, device: "torch.device", *, what: str, remedy: str) -> None:
    """Refuse, before it begins, what takes more memory than is free.

    Parameters
    ----------
    needed
        Bytes that are certain; what comes on top is not known yet.
    device
        Where they are to lie.
    what, remedy
        What takes them, and what to ask for instead.

    Raises
    ------
    MemoryLimit
        On all ranks, if there are several.
    """
    free = free_on(device)
    if not any(current().exchange(bool(needed > free))):
        return
    raise MemoryLimit(
        f"{what} takes at least {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free on "
        f"{device}; {remedy}."
    )


def by_device(device: "torch.device", *, cpu: int, gpu: int) -> int:
    """Return how much to work on at once: what a CPU's cache holds, or what keeps a GPU busy."""
    return cpu if device.type == "cpu" else gpu


def gpus_among(devices: "Iterable[torch.device]") -> "list[torch.device]":
    """Return the NVIDIA GPUs among devices."""
    return [device for device in devices if device.type == "cuda"]


def in_fitting_parts(
    count: int, size: int, work: "Callable[[range], Part]", *, told: str
) -> "list[Part]":
    """Work on so many things, ``size`` at a time, or ever fewer where a GPU's memory runs out.

    Parameters
    ----------
    count, size
        How many there are, and to begin with.
    work
        Does some of them; what it leaves half done is done again.
    told
        What is being done, for the log.

    Raises
    ------
    torch.OutOfMemoryError
        If memory runs out with one of them.
    """
    import torch

    parts, start = [], 0
    while start < count:
        some, part = range(start, min(start + size, count)), None
        try:
            part = work(some)
        except torch.OutOfMemoryError:
            if len(some) == 1:
                raise
        if part is None:  # the error, which holds what was being worked on, is gone
            size = (len(some) + 1) // 2
            _LOG.warning("GPU memory ran out: %s %d of %d experts at a time", told, size, count)
            torch.cuda.empty_cache()
            continue
        parts.append(part)
        start = some.stop
    return parts


def free_on_gpu(device: "torch.device") -> int:
    """Return the free bytes of a GPU: the driver's, and what PyTorch holds without use.

    0 where the device is no NVIDIA GPU.
    """
    import torch

    if device.type != "cuda":
        return 0
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def free_ram() -> int:
    """Return the bytes of RAM that this process can get: of the machine's, and of its cgroups'."""
    return max(0, min(int(psutil.virtual_memory().available), *_free_in_cgroups()))


def _free_in_cgroups() -> Iterator[int]:
    """Yield what is left in each cgroup of this process that has a limit; first no limit."""
    yield _MOST_BYTES
    for folder in _cgroups():
        for limit, use, yielding in _LIMITS:
            with suppress(OSError, ValueError):  # "max" is no number
                most = int((folder / limit).read_text())
                used = int((folder / use).read_text())
                yield most - used + _statistic(folder, yielding)


def _cgroups() -> Iterator[Path]:
    """Yield the folders of this process's cgroups, and of those that these lie in."""
    roots = {_CGROUPS, _CGROUPS / "memory"}
    yield from roots
    with suppress(OSError):
        for line in _OWN_CGROUP.read_text().splitlines():
            _, controllers, path = (*line.split(":", 2), "", "")[:3]
            root = _CGROUPS / "memory" if "memory" in controllers.split(",") else _CGROUPS
            if controllers and root == _CGROUPS:
                continue
            own = root / path.lstrip("/")
            yield from (one for one in (own, *own.parents) if root in one.parents)


def _statistic(folder: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        for line in (folder / "memory.stat").read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def work_bytes(memory: int, most: int = WORK_BYTES) -> int:
    """Return the bytes for what is computed piece by piece: up to half of a budget."""
    return min(most, memory // 2)


def give_back() -> None:
    """Return the pages that the C library keeps without use, where it is glibc."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def keep_little(memory: int) -> None:
    """Let this process keep no free block larger than a 64th of a budget, where glibc lets it.

    By default glibc keeps free blocks of up to 32 MiB for those to come, and what is smaller and
    lives longer is put into them, so that they fit no more: with a small budget the process takes
    some times of it. Blocks above the limit are mapped, which costs time, and unmapped when freed.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_THRESHOLD, max(_LEAST_MAPPED, min(_MOST_MAPPED, memory // 64)))


@cache
def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc: not on macOS, Windows, or with musl."""
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None


class SpareRam:
    """RAM for rows that a GPU has no room for: half of what would be free without them."""

    def __init__(self) -> None:
        self.held = 0
        """Bytes taken."""
        self._taking = Lock()

    def take(self, n_bytes: int) -> bool:
        """Reserve RAM; False, and nothing reserved, if there is not enough."""
        with self._taking:
            if self.held + n_bytes > (free_ram() + self.held) // SHARE:
                return False
            self.held += n_bytes
            return True

    def give(self, n_bytes: int) -> None:
        """Give RAM back."""
        with self._taking:
            self.held -= n_bytes


SPARE_RAM = SpareRam()
"""Of this process."""
