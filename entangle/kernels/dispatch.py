"""One door to the kernels: an operation is called, and the version that suits its tensors runs.

An operation is a plain function, right on every device. Other versions, a fused kernel or an
algorithm for one kind of device, are put before it, each with the condition under which it does the
same (to rounding)::

    @dispatch(kernels.sorted_statistics, where=kernels.fits_sorted)
    def statistics(ordered): ...

Callers name no device. What is tested against what is in `OPERATIONS`.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

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
        @wraps(plain)
        def operation(*arguments: P.args, **settings: P.kwargs) -> Found:
            chosen = version if where(*arguments, **settings) else plain
            return chosen(*arguments, **settings)

        name = f"{plain.__module__}.{plain.__qualname__}"
        OPERATIONS.setdefault(name, [plain]).append(version)
        return operation

    return before


def on_cpu(tensor: Tensor, *_others: object, **_settings: object) -> bool:
    """Tell whether the first argument of an operation is on the CPU."""
    return tensor.device.type == "cpu"


def on_gpu(tensor: Tensor, *_others: object, **_settings: object) -> bool:
    """Tell whether the first argument of an operation is on an NVIDIA GPU."""
    return tensor.is_cuda
