"""What a result folder holds is what was written: digests in its manifest, checked at loading.

A manifest carries, as ``digests``, the SHA-256 of its own canonical JSON (all of it but
``digests``) and that of every file beside it. Figures are listed apart and not needed to load a
result; what ``entangle figures`` adds later has a list of its own (`list_added`).
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from entangle.errors import InvalidInput

_LOG = logging.getLogger(__name__)

DIGESTS = "digests"
"""Key of a manifest."""
ADDED = "added.json"
"""File that lists what was added to a folder later, with its SHA-256."""
_UNLISTED = {"manifest.json", "run.json", "plan.json", "digests.json", ADDED}
"""The manifest itself, what says how one run went, and what only unfinished work needs."""
_DATA = {".parquet", ".safetensors", ".json", ".csv"}


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_digest(manifest: Mapping[str, object]) -> str:
    """Return the SHA-256 of a manifest's canonical JSON, ``digests`` left out, in hexadecimal.

    Canonical are sorted keys, no spaces, UTF-8.
    """
    content = {key: one for key, one in manifest.items() if key != DIGESTS}
    text = json.dumps(
        content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=dict
    )
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _plain(manifest: Mapping[str, object]) -> dict[str, object]:
    """Return a manifest as it comes back from its file; NaN is a `ValueError`."""
    return dict(json.loads(json.dumps(dict(manifest), allow_nan=False)))


def sealed(folder: Path, manifest: Mapping[str, object]) -> dict[str, object]:
    """Return a manifest with the digests of itself and of the files of its folder.

    Parameters
    ----------
    folder
        Holds everything that belongs to the result. Files whose digest the manifest has under
        ``files``, as that of an expansion, are not read again.
    manifest
        Of JSON's types.
    """
    content = {key: one for key, one in _plain(manifest).items() if key != DIGESTS}
    known = content.get("files")
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in found]
    digests: dict[str, dict[str, str]] = {"files": {}, "figures": {}}
    for name, path in zip(names, found, strict=True):
        if name not in _UNLISTED and not (isinstance(known, Mapping) and name in known):
            drawn = name.startswith("figures/") or path.suffix not in _DATA
            digests["figures" if drawn else "files"][name] = file_digest(path)
    return {**content, DIGESTS: {"manifest": manifest_digest(content), **digests}}


def unsealed(
    folder: Path, manifest: Mapping[str, object], needed: Iterable[str] = ()
) -> dict[str, object]:
    """Check a folder against the digests of its manifest; return the manifest without them.

    A manifest without digests, as earlier versions wrote them, is told of and returned as it is.

    Parameters
    ----------
    folder, manifest
        The result's folder, and what its ``manifest.json`` holds.
    needed
        Files that must be among those that have digests.

    Raises
    ------
    InvalidInput
        If the manifest or a file was altered, or a file is missing or no plain name inside.
    """
    digests = manifest.get(DIGESTS)
    if digests is None:
        _LOG.warning("%r was written without digests: damage to it cannot be seen", str(folder))
        return dict(manifest)
    files = digests.get("files") if isinstance(digests, Mapping) else None
    own = digests.get("manifest") if isinstance(digests, Mapping) else None
    if not isinstance(files, Mapping) or own != manifest_digest(manifest):
        raise _altered(folder / "manifest.json")
    for name in needed:
        if name not in files:
            raise _altered(folder / name, "is not among the files that manifest.json lists")
    for name, digest in files.items():
        path = _inside(folder, name)
        if not path.is_file():
            raise _altered(path, "is missing")
        if file_digest(path) != digest:
            raise _altered(path)
    return {key: one for key, one in manifest.items() if key != DIGESTS}


def list_added(folder: Path, files: Iterable[Path], origin: Mapping[str, str]) -> None:
    """Note in `ADDED` which files were added to a folder, with the results that they came from.

    Parameters
    ----------
    folder
        Where the files lie.
    files
        Their paths.
    origin
        Digest of the result's manifest, by the file's name.
    """
    place = folder / ADDED
    try:
        known = json.loads(place.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        known = {}
    listed = dict(known) if isinstance(known, Mapping) else {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        listed[name] = {"sha256": file_digest(path), "result": origin[name]}
    text = json.dumps(dict(sorted(listed.items())), indent=2, ensure_ascii=False) + "\n"
    partial = place.with_suffix(".writing")
    partial.write_text(text, "utf-8")
    partial.replace(place)


def _inside(folder: Path, name: object) -> Path:
    """Return the path of a file of a folder, whose name must lead to no other place."""
    path = folder / str(name)
    real, root = os.path.realpath(path), os.path.realpath(folder)
    if (
        Path(str(name)).is_absolute()
        or ".." in Path(str(name)).parts
        or not (real.startswith(root + os.sep))
    ):
        raise InvalidInput(
            f"the manifest of {str(folder)!r} names {str(name)!r}, which lies outside its folder; "
            "make the result anew."
        )
    return path


def _altered(path: Path, what: str = "was altered after it was written") -> InvalidInput:
    return InvalidInput(f"{str(path)!r} {what}; make the result anew.")
