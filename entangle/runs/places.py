"""Where things go that nobody has named a place for: the cache, and the folder of results.

``ENTANGLE_HOME`` names one folder for both: ``cache`` and ``runs`` in it. Without it the cache is
the user's, as platformdirs knows it, and results go to ``runs`` in the current folder.
``ENTANGLE_CACHE`` names the cache folder alone, and wins.
"""

import os
from pathlib import Path

import platformdirs

from entangle.checks import path_of


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


def runs_folder() -> Path:
    """Return the folder of results without a name: ``runs`` in ``ENTANGLE_HOME``, or here."""
    return (home() or Path()) / "runs"
