"""What a run of the command line leaves behind."""

import re
from collections.abc import Callable
from typing import NamedTuple


class Ran(NamedTuple):
    """Exit status, standard output and standard error."""

    status: int
    out: str
    err: str


Run = Callable[..., Ran]
"""Called with the arguments of the command line."""


def holds(message: str, names: str) -> bool:
    """Tell whether a message holds names and values in this order; no one is part of a longer one.

    ``names`` is a text whose parts between blanks are looked for, so that a test names what an
    error is about and not its sentence.
    """
    parts = []
    for name in names.split():
        first = r"(?<![\w.-])" if name[0].isalnum() else ""
        last = r"(?!\w|\.\w)" if name[-1].isalnum() else ""
        parts.append(first + re.escape(name) + last)
    return re.search(".*".join(parts), message) is not None
