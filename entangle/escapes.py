"""Text from outside as people may see it: what cannot be seen or acts on a terminal is spelled out.

Names of files, layers, columns and tensors, tokens, and what other libraries say may hold anything.
"""

import unicodedata
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
