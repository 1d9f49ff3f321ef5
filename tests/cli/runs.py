"""What a run of the command line leaves behind."""

from collections.abc import Callable
from typing import NamedTuple


class Ran(NamedTuple):
    """Exit status, standard output and standard error."""

    status: int
    out: str
    err: str


Run = Callable[..., Ran]
"""Called with the arguments of the command line."""
