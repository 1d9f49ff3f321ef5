"""The one table of checks: what a setting may be, with one sentence a rule, at every entrance.

Numbers of NumPy and torch (0-d) count as Python's. What is meant to be several values may also be
one of them, an array, a pandas column, a set or a generator. A string is one value, never letters.
"""

import functools
import math
import os
import warnings
from collections.abc import (
    Callable,
    Collection,
    ItemsView,
    Iterable,
    KeysView,
    Mapping,
    Sequence,
    Set,
    ValuesView,
)
from numbers import Integral, Number, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from entangle.errors import InvalidInput, unknown_name

if TYPE_CHECKING:
    from torch import Tensor, dtype


T = TypeVar("T")
S = TypeVar("S", bound=str)
P = ParamSpec("P")
R = TypeVar("R")

_LONGEST = 80  # characters of a value in a message


def whole(name: str, value: object, *, least: int, most: int | None = None) -> int:
    """Return an integer setting as an int.

    Parameters
    ----------
    name, value
        Of the setting, as in all checks here.
    least, most
        The smallest and the largest integer allowed.

    Raises
    ------
    InvalidInput
        If it is no integer (3.0 is none), below ``least`` or above ``most``.
    """
    number = _integer(value)
    if number is None or number < least or (most is not None and number > most):
        allowed = f"of at least {least}" if most is None else f"in [{least}, {most}]"
        raise InvalidInput(f"`{name}` must be an integer {allowed}; got {shown(value)}.")
    return number


def seed_of(value: object, name: str = "seed") -> int:
    """Return a seed, an integer in [0, 2**63), as an int.

    Raises
    ------
    InvalidInput
        If it is none.
    """
    number = _integer(value)
    if number is None or not 0 <= number < 2**63:
        raise InvalidInput(f"`{name}` must be an integer in [0, 2**63); got {shown(value)}.")
    return number


def real(name: str, value: object) -> float:
    """Return a setting that is a number as a float.

    A number of fewer digits than a float (float32, float16) is the decimal that it is written as:
    ``np.float32(0.95)`` is 0.95.

    Raises
    ------
    InvalidInput
        If it is no number.
    """
    number = _float(value)
    if number is None:
        raise InvalidInput(f"`{name}` must be a number; got {shown(value)}.")
    return number


def share(name: str, value: object, *, zero: bool = True, one: bool = True) -> float:
    """Return a share in [0, 1] as a float.

    Parameters
    ----------
    zero, one
        Whether these ends are allowed.

    Raises
    ------
    InvalidInput
        If it is no number, NaN, or outside.
    """
    number = _float(value)
    inside = number is not None and 0 <= number <= 1
    if number is None or not inside or (number == 0 and not zero) or (number == 1 and not one):
        ends = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise InvalidInput(f"`{name}` must be in {ends}; got {shown(value)}.")
    return number


def finite(
    name: str, value: object, *, least: float | int | None = None, above: float | int | None = None
) -> float:
    """Return a finite number as a float.

    Parameters
    ----------
    least, above
        The smallest number allowed, or one that it must exceed.

    Raises
    ------
    InvalidInput
        If it is no number, NaN, infinite or too small.
    """
    number = _float(value)
    if number is None or not math.isfinite(number) or not _exceeds(number, least, above):
        end = "" if least is None else f" and at least {least:g}"
        end += "" if above is None else f" and above {above:g}"
        raise InvalidInput(f"`{name}` must be finite{end}; got {shown(value)}.")
    return number


def several(name: str, value: object, *single: type, empty: bool = False) -> list[Any]:
    """Return a setting of one value or several of them as a list.

    Parameters
    ----------
    value
        A string, a number or an object of the classes in ``single`` is one value. Of a set, whose
        order means nothing, the values come sorted; of everything else in its own order.
    empty
        Whether there may be no value.

    Returns
    -------
    list
        Numbers and strings of NumPy and torch as Python's.

    Raises
    ------
    InvalidInput
        If it cannot be read as values in one order (a mapping, a table, None), or holds none.
    """
    plain = plain_value(value)
    if isinstance(plain, (str, Number, *single)):
        return [plain]
    one_row = getattr(plain, "ndim", 1) == 1 and not isinstance(plain, Mapping | bytes | bytearray)
    if not one_row or not isinstance(plain, Iterable):
        raise InvalidInput(f"`{name}` must be one value or a list of values; got {shown(value)}.")
    found = [plain_value(one) for one in plain]
    if isinstance(plain, Set) and not isinstance(plain, KeysView | ItemsView | ValuesView):
        found = _sorted(found)
    if not found and not empty:
        raise InvalidInput(f"`{name}` must hold at least one value; got {shown(value)}.")
    return found


def wholes(name: str, value: object, *, least: int) -> list[int]:
    """Return one integer, or several, as a list of ints (`several`, `whole`)."""
    return [whole(name, one, least=least) for one in several(name, value)]


def shares(name: str, value: object) -> list[float]:
    """Return one share in [0, 1], or several, as a list of floats (`several`, `share`)."""
    return [share(name, one) for one in several(name, value)]


def different(name: str, values: list[T]) -> list[T]:
    """Return values that must differ from one another, or raise `InvalidInput`."""
    for value in values:
        if values.count(value) > 1:
            raise InvalidInput(f"`{name}` must be different from one another; got {shown(values)}.")
    return values


def choice(
    name: str, value: object, known: Collection[S], *, kind: str = "", remedy: str = ""
) -> S:
    """Return a name that must be one of those that are known.

    Parameters
    ----------
    known
        The names that exist.
    kind
        What they are called in the message; the setting's name by default.
    remedy
        A closing sentence.

    Raises
    ------
    UnknownName
        If it is none of them; the closest are listed.
    InvalidInput
        If it is no name at all.
    """
    plain = plain_value(value)
    if not isinstance(plain, str):
        raise InvalidInput(f"`{name}` must be one of {', '.join(known)}; got {shown(value)}.")
    for one in known:
        if one == plain:
            return one
    raise unknown_name(kind or name, plain, known, remedy)


def choices(name: str, value: object, known: Collection[S], *, kind: str = "") -> list[S]:
    """Return one known name, or several, each once (`several`, `choice`)."""
    return list(dict.fromkeys(choice(name, one, known, kind=kind) for one in several(name, value)))


def named(name: str, value: object) -> str:
    """Return a setting that is a name of whatever kind as a str; refuse anything else.

    Raises
    ------
    InvalidInput
        If it is no string.
    """
    plain = plain_value(value)
    if not isinstance(plain, str):
        raise InvalidInput(f"`{name}` must be a name; got {shown(value)}.")
    return str(plain)


def names(name: str, value: object) -> list[str]:
    """Return one name, or several, each once, as a list (`several`, `named`)."""
    return list(dict.fromkeys(named(name, one) for one in several(name, value)))


def path_of(name: str, value: object) -> Path:
    """Return a path as a `Path`.

    Raises
    ------
    InvalidInput
        If it is neither a string nor a path, or an empty one, or UTF-8 has no bytes for it: files
        of other names cannot be opened by the libraries that read tables and tensors.
    """
    written = os.fspath(value) if isinstance(value, os.PathLike) else plain_value(value)
    if not isinstance(written, str) or not written or "\0" in written:
        raise InvalidInput(f"`{name}` must be a path; got {shown(value)}.")
    if any("\ud800" <= character <= "\udfff" for character in written):
        raise InvalidInput(f"`{name}` must be a path in UTF-8; got {shown(value)}: rename it.")
    return Path(written)


def check_seq_len(seq_len: int, context_length: int | None) -> None:
    """Raise `InvalidInput` if a sequence is longer than a model's context (None: no limit)."""
    if context_length is not None and seq_len > context_length:
        raise InvalidInput(
            f"`seq_len` must be at most the model's context, {context_length}; got {seq_len}."
        )


def bootstrap(n_boot: object, level: object) -> tuple[int, float]:
    """Return the number of resamples (at least 1) and the mass of an interval, in (0, 1)."""
    return whole("n_boot", n_boot, least=1), share("level", level, zero=False, one=False)


def tensor_of(name: str, value: object, dtype: "dtype | None" = None) -> "Tensor":
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
        raise InvalidInput(f"`{name}` must be numbers; got {shown(value)}.") from None


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take arguments by the names of the version before, with a note.

    Parameters
    ----------
    names
        Today's name of every old one.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*given: P.args, **options: P.kwargs) -> R:
            for old, new in names.items():
                if old in options:
                    if new in options:
                        raise InvalidInput(f"`{old}` is now `{new}`; give one of them.")
                    message = f"`{old}` of {function.__name__} is now `{new}`"
                    warnings.warn(message, DeprecationWarning, stacklevel=2)
                    options[new] = options.pop(old)
            return function(*given, **options)

        return call

    return decorate


def shown(value: object) -> str:
    """Return a value as messages show it: in one line, cut short, numbers plainly."""
    plain = plain_value(value)
    text = " ".join(repr(plain).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _integer(value: object) -> int | None:
    number = plain_value(value)
    if isinstance(number, bool) or not isinstance(number, int | Integral):
        return None
    return int(number)


def _float(value: object) -> float | None:
    number = plain_value(value)
    if isinstance(number, bool) or not isinstance(number, int | float | Real):
        return None
    try:
        return float(number)
    except OverflowError:
        return math.inf if str(number)[0] != "-" else -math.inf


def _exceeds(number: float, least: float | int | None, above: float | int | None) -> bool:
    return (least is None or number >= least) and (above is None or number > above)


def _sorted(values: Sequence[Any]) -> list[Any]:
    try:
        return sorted(values)
    except TypeError:
        return sorted(values, key=repr)


def plain_value(value: object) -> object:
    """Return a scalar of NumPy, pandas or torch as Python's, everything else as it is."""
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "dtype"):
        return value
    try:
        plain = value.item()  # type: ignore[attr-defined]
    except (RuntimeError, NotImplementedError):  # a tensor without data
        return value
    return _as_written(value, plain) if isinstance(plain, float) else plain


def _as_written(value: Any, plain: float) -> float:
    """Return the shortest decimal that rounds to a float32 or float16."""
    import numpy as np

    kind = {"float32": np.float32, "float16": np.float16}.get(str(value.dtype).split(".")[-1])
    return plain if kind is None else float(str(kind(plain)))
