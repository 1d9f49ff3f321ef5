"""What a result folder holds is what was written: digests in its manifest, checked at loading.

A manifest carries, as ``digests``, the SHA-256 of its own canonical JSON (all of it but
``digests``) and that of every file beside it. Figures are listed apart and not needed to load a
result; what ``entangle figures`` adds later has a list of its own (`list_added`).

What a table of a result may hold: one declaration a column, checked when it is read.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from entangle.checks import shown
from entangle.errors import InvalidInput
from entangle.runs.reading import inside

if TYPE_CHECKING:
    import pandas as pd


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
    digests = check_digest(folder, manifest)
    if digests is None:
        return dict(manifest)
    files = digests.get("files")
    if not isinstance(files, Mapping):
        raise _altered(folder / "manifest.json")
    for name in needed:
        if name not in files:
            raise _altered(folder / name, "is not among the files that manifest.json lists")
    for name, digest in files.items():
        path = _inside(folder, str(name))
        if not path.is_file():
            raise _altered(path, "is missing")
        if file_digest(path) != digest:
            raise _altered(path)
    return {key: one for key, one in manifest.items() if key != DIGESTS}


def check_digest(
    place: str | os.PathLike[str], manifest: Mapping[str, object]
) -> Mapping[str, object] | None:
    """Check a manifest against its own digest; return all its digests, None if it has none.

    One without, as earlier versions wrote them, is told of.

    Parameters
    ----------
    place
        The folder or file that it belongs to.
    manifest
        As it was read.

    Raises
    ------
    InvalidInput
        If it was altered.
    """
    if DIGESTS not in manifest:
        _LOG.warning("%r was written without digests: damage to it cannot be seen", str(place))
        return None
    digests = manifest[DIGESTS]
    if not isinstance(digests, Mapping) or digests.get("manifest") != manifest_digest(manifest):
        path = Path(place)
        raise _altered(path / "manifest.json" if path.is_dir() else path)
    return digests


def list_added(folder: Path, files: Iterable[Path], digest: str) -> None:
    """Note in `ADDED` which files were added to a result's folder.

    Parameters
    ----------
    folder
        Of the result.
    files
        Their paths.
    digest
        Of the result's manifest when they were made.
    """
    place = folder / ADDED
    try:
        known = json.loads(place.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        known = {}
    listed = dict(known) if isinstance(known, Mapping) else {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        listed[name] = {"sha256": file_digest(path), "result": digest}
    text = json.dumps(dict(sorted(listed.items())), indent=2, ensure_ascii=False) + "\n"
    partial = place.with_suffix(".writing")
    partial.write_text(text, "utf-8")
    partial.replace(place)


def _inside(folder: Path, name: str) -> Path:
    """Return the path of a file of a folder, or of a folder in it."""
    path, what = folder, f"the manifest of {str(folder)!r}"
    for part in name.split("/"):
        path = inside(path, part, what=what)
    return path


def _altered(path: Path, what: str = "was altered after it was written") -> InvalidInput:
    return InvalidInput(f"{str(path)!r} {what}; make the result anew.")


@dataclass(frozen=True)
class Column:
    """What a column holds."""

    kind: Literal["text", "whole", "real"]
    """Strings, integers or floats; a column of floats may hold integers."""
    low: float | int = -inf
    """Smallest value allowed."""
    high: float | int = inf
    """Largest value allowed."""
    null: bool = False
    """Whether values may be missing or NaN."""
    among: Sequence[str] = ()
    """All values that a text may be; nothing for any."""
    optional: bool = False
    """Whether the table may lack it."""

    @property
    def dtype(self) -> str:
        """Type of the column in pandas."""
        whole = "Int64" if self.null else "int64"
        return {"text": "str", "whole": whole, "real": "float64"}[self.kind]

    def fault(self, values: "pd.Series") -> str | None:
        """Return what is wrong with a column's values, None if nothing is."""
        from pandas.api import types

        known = values.dropna()
        if len(known) < len(values) and not self.null:
            return "has a missing value"
        if self.kind == "text":
            typed = known.dtype == self.dtype
            wrong = [] if typed else [one for one in known if not isinstance(one, str)]
            if self.among and not wrong:
                wrong = [one for one in known.unique().tolist() if one not in self.among]
            return f"must hold {self._rule()}; got {shown(wrong[0])}" if wrong else None
        of_kind = types.is_integer_dtype if self.kind == "whole" else types.is_numeric_dtype
        if not of_kind(values.dtype) and (len(known) or self.kind == "whole"):
            return f"must hold {self._rule()}; got {values.dtype}"
        if len(known) == 0:
            return None
        outside = known[(known < self.low) | (known > self.high)]
        return f"must hold {self._rule()}; got {outside.iloc[0]:g}" if len(outside) else None

    def _rule(self) -> str:
        if self.kind == "text":
            return f"one of {', '.join(map(repr, self.among))}" if self.among else "text"
        kind = "integers" if self.kind == "whole" else "numbers"
        ends = f" in [{self.low:g}, {self.high:g}]"
        return kind if (self.low, self.high) == (-inf, inf) else kind + ends


def texts(*among: str, null: bool = False, optional: bool = False) -> Column:
    """Return a column of strings, any or one of some."""
    return Column("text", null=null, among=among, optional=optional)


def integers(
    low: float | int = 0, high: float | int = inf, *, null: bool = False, optional: bool = False
) -> Column:
    """Return a column of integers, by default of at least 0."""
    return Column("whole", low, high, null=null, optional=optional)


def reals(
    low: float | int = -inf, high: float | int = inf, *, null: bool = True, optional: bool = False
) -> Column:
    """Return a column of floats, which may be NaN."""
    return Column("real", low, high, null=null, optional=optional)


def shares(*, null: bool = True) -> Column:
    """Return a column of floats in [0, 1]."""
    return reals(0, 1, null=null)


Schema = Mapping[str, Column]
"""Columns by name. A table may have others besides."""


def check_table(table: "pd.DataFrame", schema: Schema, path: Path) -> None:
    """Check a table that was read against its schema.

    Raises
    ------
    InvalidInput
        If a column is missing, doubled, of another type or out of range.
    """
    names = list(table.columns)
    for name, column in schema.items():
        if name not in names:
            if column.optional:
                continue
            raise broken(path, f"must have the column {name!r}")
        if names.count(name) > 1:
            raise broken(path, f"must have the column {name!r} once")
        fault = column.fault(table[name])
        if fault is not None:
            raise broken(path, f"column {name!r} {fault}")


def broken(path: Path, why: str) -> InvalidInput:
    """Return the error of a file of a result that breaks a rule."""
    return InvalidInput(f"{str(path)!r}: {why}; make the result anew.")
