"""The family of errors that entangle raises on purpose.

Every message states the value received, the rule it breaks and the remedy. It is one line that any
terminal can show (`entangle.errors.visible`), whatever the names in it hold. The command line
writes it on standard error and ends with the exit status in ``exit_code``.

Text from outside as people may see it: what cannot be seen or acts on a terminal is spelled out.

Names of files, layers, columns and tensors, tokens, and what other libraries say may hold anything.
"""

import difflib
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # part of the spelling of some scripts and of emoji


def visible(text: str) -> str:
    r"""Return a text in which characters that cannot be seen, or reorder others, are spelled out.

    Control, formatting, broken and unassigned characters and line separators become escapes as in
    Python: ``\n``, ``\x1b``, ``\u202e``. Joiners stay: scripts need them.

    Returns
    -------
    str
        One line that acts on no terminal; `visible` leaves it as it is.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(spelled(char) if is_unseen(char) else char for char in text)


@lru_cache(maxsize=65_536)
def is_unseen(character: str) -> bool:
    """Tell whether a character cannot be seen, or reorders others."""
    return unicodedata.category(character) in _UNSAFE and character not in _JOINERS


def spelled(character: str) -> str:
    r"""Return a character as Python escapes it: ``\n``, ``\x1b``, ``\u202e``, ``\U000e0041``."""
    return character.encode("unicode_escape").decode("ascii")


class EntangleError(Exception):
    """Base of all errors raised by entangle.

    Parameters
    ----------
    message
        What cannot be seen in it is spelled out.
    """

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(visible(str(message)))


class InvalidInput(EntangleError, ValueError):
    """A value from the user breaks a rule (exit status 2)."""

    exit_code = 2


class UnknownName(InvalidInput, LookupError):
    """A name (model, layer, data set, column) does not exist; the message lists the closest."""


class Unavailable(EntangleError, OSError):
    """Something outside the program is missing or refuses: network, file, disk (exit status 2)."""

    exit_code = 2


class MemoryLimit(EntangleError, MemoryError):
    """Memory ran out; the message names the setting to lower (exit status 2)."""

    exit_code = 2


class NumericalError(EntangleError, ArithmeticError):
    """A computation has no trustworthy result (for example a matrix that cannot be factorised)."""


def unknown_name(kind: str, value: str, choices: Iterable[str], remedy: str = "") -> UnknownName:
    """Build the error for a name that does not exist.

    Parameters
    ----------
    kind
        What was looked for, for example ``"layer"``.
    value
        The name received.
    choices
        The names that do exist; the five closest are listed.
    remedy
        A closing sentence that tells what to do.

    Returns
    -------
    UnknownName
        To be raised by the caller.
    """
    names = list(dict.fromkeys(choices))
    closest = difflib.get_close_matches(str(value), names, n=5, cutoff=0.0)
    listing = f" Closest: {', '.join(closest)}." if closest else " There are none."
    return UnknownName(f"unknown {kind} {value!r}.{listing}{' ' + remedy if remedy else ''}")
