"""Where things go that nobody has named a place for: the cache, and the folder of results.

``ENTANGLE_HOME`` names one folder for both: ``cache`` and ``runs`` in it. Without it the cache is
the user's, as platformdirs knows it, and results go to ``runs`` in the current folder.
``ENTANGLE_CACHE`` names the cache folder alone, and wins.
"""

import os
import shutil
from pathlib import Path

import platformdirs

from entangle.checks import path_of
from entangle.errors import Unavailable


def home() -> Path | None:
    """Return the folder that ``ENTANGLE_HOME`` names, None where it is not set or empty.

    Raises
    ------
    InvalidInput
        If it is no path.
    """
    named = os.environ.get("ENTANGLE_HOME")
    return Path(os.path.expanduser(path_of("ENTANGLE_HOME", named))) if named else None  # noqa: PTH111


def cache_folder() -> Path:
    """Return the folder of what is fetched or derived once and kept.

    ``ENTANGLE_CACHE``, or ``cache`` in ``ENTANGLE_HOME``, or the user's cache.
    """
    named, own = os.environ.get("ENTANGLE_CACHE"), home()
    if named:
        return Path(named)
    return Path(platformdirs.user_cache_dir("entangle")) if own is None else own / "cache"


def check_room(place: str | os.PathLike[str], needed: int) -> None:
    """Refuse to write more than a disk has room for, before anything is made.

    Parameters
    ----------
    place
        What is to be written; the nearest folder above it that exists counts.
    needed
        Bytes.

    Raises
    ------
    Unavailable
        If fewer are free.
    """
    folder = Path(os.path.abspath(os.path.expanduser(place)))  # noqa: PTH100, PTH111
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise Unavailable(
            f"the result takes {needed / 2**20:,.1f} MiB and {free / 2**20:,.1f} are free on the "
            f"disk of {str(folder)!r}; name another place (--out), or make room there."
        )


def runs_folder() -> Path:
    """Return the folder of results without a name: ``runs`` in ``ENTANGLE_HOME``, or here."""
    return (home() or Path()) / "runs"
