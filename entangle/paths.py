"""Which files a folder's own files may name: those that lie in it, by plain names.

A manifest or an index of weights comes with a folder that may be somebody else's. The names in it
must not lead anywhere else: no separators, no ``..``, no drive, and no link to a file outside. The
one exception is the layout of the Hugging Face Hub's cache, whose snapshots are links to blobs.
"""

import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from entangle.errors import InvalidInput

_LONGEST = 255  # bytes of a file's name
_SHOWN = 200  # characters of a refused name
_REPOSITORY = re.compile(r"(models|datasets|spaces|kernels)--.+")
_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")


def is_plain_name(name: object) -> bool:
    """Tell whether ``name`` is text that can only mean a file directly in a folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or not name.isprintable():
        return False
    plain = PurePosixPath(name).name == name == PureWindowsPath(name).name
    return plain and len(name.encode()) <= _LONGEST


def inside(folder: Path, name: object, *, what: str) -> Path:
    """Return the path of a file in a folder that one of the folder's files names.

    Whether the file exists is not asked.

    Parameters
    ----------
    folder
        The folder; it may itself be reached by a link.
    name
        As it was read.
    what
        What names the file, for messages, such as ``the manifest '/runs/x/manifest.json'``.

    Raises
    ------
    InvalidInput
        If the name is no plain name, or is a link to something outside the folder.
    """
    if not is_plain_name(name):
        shown = repr(name)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
        raise InvalidInput(
            f"{what} must name files of its own folder by plain names, without separators or '..'; "
            f"got {shown}: get or make the folder anew."
        )
    path = folder / str(name)
    home, target = (Path(os.path.realpath(one)) for one in (folder, path))
    if not target.is_relative_to(home) and not _is_blob(target, home):
        raise InvalidInput(
            f"{what} names {str(name)!r}, which is a link to {str(target)!r}, outside its folder: "
            "put a copy of the file there, if you trust it."
        )
    return path


def _is_blob(target: Path, snapshot: Path) -> bool:
    """Tell whether a file is where the Hub's cache keeps the content of a snapshot's files."""
    repository = snapshot.parent.parent
    if snapshot.parent.name != "snapshots" or not _REPOSITORY.fullmatch(repository.name):
        return False
    if target.parent == repository / "blobs":
        return True
    shared = repository.parent / "blobs"  # of all repositories of this cache
    return target.is_relative_to(shared) and bool(
        _SHARED_BLOB.fullmatch(target.relative_to(shared).as_posix())
    )
