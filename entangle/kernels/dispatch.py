"""One door to the kernels: an operation is called, and the version that suits its tensors runs.

An operation is a plain function, right on every device. Other versions, a fused kernel or an
algorithm for one kind of device, are put before it, each with the condition under which it does the
same (to rounding)::

    @dispatch(kernels.sorted_statistics, where=kernels.fits_sorted)
    def statistics(ordered): ...

Callers name no device. What is tested against what is in `OPERATIONS`.

Compiles and launches the kernels of this folder.

The sources are CUDA C. NVRTC, which every CUDA build of torch brings along, compiles them for the
device at their first use (a few tenths of a second each), so that no compiler need be installed.
"""

import ctypes
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, wraps
from importlib import resources
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Names = tuple[tuple[str, str | int], ...]
P = ParamSpec("P")
Found = TypeVar("Found")

OPERATIONS: dict[str, list[Callable[..., object]]] = {}
"""All versions of every operation by its full name, the plain one first."""


def dispatch(
    version: Callable[..., Any], *, where: Callable[..., bool]
) -> Callable[[Callable[P, Found]], Callable[P, Found]]:
    """Put a version before a plain function; the decorator nearest to it is asked last.

    Parameters
    ----------
    version
        What runs where the condition holds, with the arguments of the plain function.
    where
        The condition, of the same arguments.
    """

    def before(plain: Callable[P, Found]) -> Callable[P, Found]:
        name = f"{plain.__module__}.{plain.__qualname__}"
        OPERATIONS.setdefault(name, [plain]).append(version)
        others: list[tuple[Callable[..., bool], Callable[..., Any]]] | None
        others = getattr(plain, "versions", None)
        if others is not None:  # an operation already, with one more version
            others.insert(0, (where, version))
            return plain
        versions = [(where, version)]

        @wraps(plain)
        def operation(*arguments: P.args, **settings: P.kwargs) -> Found:
            for suits, one in versions:
                if suits(*arguments, **settings):
                    found: Found = one(*arguments, **settings)
                    return found
            return plain(*arguments, **settings)

        operation.versions = versions  # type: ignore[attr-defined]
        return operation

    return before


def on_cpu(tensor: Tensor, *_others: object, **_settings: object) -> bool:
    """Tell whether the first argument of an operation is on the CPU."""
    return tensor.device.type == "cpu"


def on_gpu(tensor: Tensor, *_others: object, **_settings: object) -> bool:
    """Tell whether the first argument of an operation is on an NVIDIA GPU."""
    return tensor.is_cuda


_LOG = logging.getLogger(__name__)


def usable(tensor: Tensor) -> bool:
    """Tell whether kernels can work on this tensor: it is on an NVIDIA GPU, and NVRTC is there."""
    return tensor.is_cuda and _found()


def launch(
    source: str,
    function: str,
    *,
    grid: Sequence[int],
    threads: int,
    arguments: Sequence[Tensor | int],
    shared_bytes: int = 0,
    number: str = "float",
    defined: Mapping[str, int] | None = None,
    early: bool = False,
) -> None:
    """Run a kernel on the current stream of its first argument's device.

    Parameters
    ----------
    source
        Name of the file in this folder, without its ending.
    function
        Name of an ``extern "C"`` kernel in it.
    grid
        Up to three numbers of thread blocks.
    threads
        Threads per block.
    arguments
        Tensors, passed as pointers to their first element, and 32-bit integers.
    shared_bytes
        Dynamic shared memory of a block.
    number
        What ``NUMBER`` stands for in the source.
    defined
        What other names stand for in it; each set of values is compiled by itself.
    early
        Inside a CUDA graph, let the kernel begin before the one in front of it has ended
        (programmatic dependent launch, from compute capability 9.0 on). It waits itself, by
        ``griddepcontrol.wait``, but may read before that what no kernel of the graph writes.
    """
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    there = device.index == torch.cuda.current_device()
    with nullcontext() if there else torch.cuda.device(device):
        names = {"NUMBER": number, **(defined or {})}
        kernel = _kernel(source, function, tuple(names.items()), torch.cuda.current_device())
        if shared_bytes > kernel._max_shared_mem_bytes:
            kernel.set_shared_memory_config(shared_bytes)
        blocks = (*grid, 1, 1)[:3]
        stream = torch.cuda.current_stream()._as_parameter_
        _held, pointers = packed(arguments)
        captured = early and torch.cuda.is_current_stream_capturing()
        if captured and torch.cuda.get_device_capability(device) >= (9, 0):
            config = _Config(
                (ctypes.c_uint * 6)(*blocks, threads, 1, 1), shared_bytes, stream, _EARLY, 1
            )
            error = _driver().cuLaunchKernelEx(ctypes.byref(config), kernel.func, pointers, None)
        else:
            error = _driver().cuLaunchKernel(
                kernel.func, *blocks, threads, 1, 1, shared_bytes, stream, pointers, None
            )
        torch.cuda._utils._check_cuda(error)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of the driver."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig of the driver."""

    _fields_ = (
        ("grid_and_block", ctypes.c_uint * 6),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, allowed
_EARLY = ctypes.pointer(_Attribute(6, 0, (ctypes.c_int * 16)(1)))


def packed(
    arguments: Sequence[Tensor | int],
) -> tuple["ctypes.Array[ctypes.c_int64]", "ctypes.Array[ctypes.c_void_p]"]:
    """Return a kernel's arguments, each in 8 bytes, and a pointer to each of them.

    A 32-bit integer lies in the first half of its 8 bytes: CUDA's hosts are little-endian.
    """
    n = len(arguments)
    values = (ctypes.c_int64 * n)(
        *[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    )
    first = ctypes.addressof(values)
    return values, (ctypes.c_void_p * n)(*range(first, first + 8 * n, 8))


def shared_limit(device: torch.device) -> int:
    """Return how many bytes of shared memory a thread block may have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@cache
def _found() -> bool:
    """Tell whether this torch can compile kernels at run time."""
    if torch.version.cuda is None or not hasattr(torch.cuda, "_compile_kernel"):
        return False
    try:
        torch.cuda._utils._get_gpu_rtc_library()
    except OSError as error:
        _LOG.warning("kernels are not used, as NVRTC is missing: %s", error)
        return False
    return True


@cache
def _driver() -> ctypes.CDLL:
    return torch.cuda._utils._get_gpu_runtime_library()


def source_text(source: str) -> str:
    """Return the text of a file of kernels, with the headers of this folder that it includes."""
    folder = resources.files(__package__)

    def header(line: re.Match[str]) -> str:
        return folder.joinpath(line[1]).read_text("utf-8")

    text = folder.joinpath(f"{source}.cu").read_text("utf-8")
    return re.sub(r'^#include "(\w+\.cuh)"\n', header, text, flags=re.MULTILINE)


@cache
def _kernel(source: str, function: str, names: Names, device: int) -> Any:
    """Return one kernel for the current device; all of a file are compiled together."""
    key = source, names, device
    if key not in _MODULES:
        text = source_text(source)
        compile_kernel: Callable[..., Any] = torch.cuda._compile_kernel
        defines = "".join(f"#define {name} {value}\n" for name, value in names)
        compiled = compile_kernel(defines + text, function)
        _MODULES[key] = torch.cuda._utils._CudaModule(compiled.module)
    return getattr(_MODULES[key], function)


_MODULES: dict[tuple[str, Names, int], Any] = {}
