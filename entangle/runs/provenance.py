"""Run folders and manifests: where every result came from.

A run writes one folder under a temporary name and renames it when it is complete, so that a
folder with the final name is never half-written.

What the settings of a text say of the special tokens around it; nothing heavy is imported here.

The setting ``special_tokens`` is made by `entangle.texts.special_tokens.affixes`.
"""

import errno
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import cache, partial, wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast
from uuid import uuid4

from entangle.checks import path_of
from entangle.errors import EntangleError, InvalidInput, Unavailable
from entangle.ranks import current
from entangle.runs.claims import beside, check_claimed, claim, insist
from entangle.runs.reading import decoding, read_json, regular_file
from entangle.runs.sealing import Schema, broken, check_table, sealed, unsealed

if TYPE_CHECKING:
    import pandas as pd
from typing import Any

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")

SCHEMA_VERSION = 1
_ANEW = "make the result anew"
_WRITING, _REPLACED = "writing-", "replaced"
_DISTRIBUTION = "neuron-entanglement"  # another project has the package's own name
PACKAGES = (
    "entangle", "torch", "transformers", "numpy", "scipy", "pandas", "datasets", "safetensors",
)  # fmt: skip


def package_versions() -> dict[str, str]:
    """Return the installed version of every package that results depend on."""
    installed = {name: _installed(name) for name in PACKAGES}
    found = {name: one for name, one in installed.items() if one is not None}
    return {"python": platform.python_version(), **found}


@cache
def _installed(name: str) -> str | None:
    try:
        return version(_DISTRIBUTION if name == "entangle" else name)
    except PackageNotFoundError:
        return None


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


RUN_KEYS = frozenset(
    (
        "seconds", "peak_memory_bytes", "peak_gpu_memory_bytes", "memory_bytes", "command",
        "threads", "ranks",
    )
)  # fmt: skip
"""What a manifest says about one run, and not about its result."""


def without_run(content: object) -> object:
    """Return a manifest, or a part of one, without what runs of one result differ in."""
    if isinstance(content, Mapping):
        return {key: without_run(one) for key, one in content.items() if key not in RUN_KEYS}
    if isinstance(content, list | tuple):
        return [without_run(one) for one in content]
    return content


class RunClock:
    """Measure a run: seconds since construction and the process's peak memory."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def read(self, memory: int | None = None) -> dict[str, object]:
        """Return ``seconds`` and ``peak_memory_bytes`` (also of the GPU where one was used).

        And ``threads``, how many torch computes with where it is imported, ``ranks``, how many
        processes shared the work if several did, and ``memory_bytes``, what the run was allowed to
        take, if ``memory`` is given.
        """
        reading: dict[str, object] = {
            "seconds": round(time.perf_counter() - self._start, 3),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        if current().size > 1:
            reading["ranks"] = current().size
        torch = sys.modules.get("torch")
        if torch is not None:
            reading["threads"] = int(torch.get_num_threads())
            if torch.cuda.is_available():
                reading["peak_gpu_memory_bytes"] = int(torch.cuda.max_memory_allocated())
        return reading if memory is None else reading | {"memory_bytes": memory}


_EFFECTIVE: ContextVar[Sequence[str] | None] = ContextVar("arguments of the command", default=None)


@contextmanager
def runs_as(arguments: Sequence[str]) -> Iterator[None]:
    """Let manifests of the block name these arguments, to which the given ones amount."""
    token = _EFFECTIVE.set(tuple(arguments))
    try:
        yield
    finally:
        _EFFECTIVE.reset(token)


def command_line() -> str | None:
    """Return the ``entangle`` command that this process runs, None if it is another program.

    Options that were read from a file stand in it as if they had been written (`runs_as`).
    """
    program = Path(sys.argv[0])
    if (program.parent.name if program.stem == "__main__" else program.stem) != "entangle":
        return None
    effective = _EFFECTIVE.get()
    return shlex.join(["entangle", *(sys.argv[1:] if effective is None else effective)])


def make_manifest(kind: str, **parts: object) -> dict[str, object]:
    """Return a manifest of a run of this ``kind``: command, the parts given, versions."""
    head: dict[str, object] = {"schema_version": SCHEMA_VERSION, "kind": kind}
    return head | {"command": command_line()} | parts | {"packages": package_versions()}


def check_output(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Check that a result folder can be written, before any work is done.

    Raises
    ------
    InvalidInput
        If it exists and ``force`` is off, or is a file, or is no folder of ours to replace.
    Unavailable
        If its parent cannot be written.
    """
    target = path_of("path", os.path.realpath(expand_user(path)))
    with disk_errors(target):
        if target.exists():
            _check_replaceable(target, str(path), force=force)
        _check_parent(target)
    return target


def _check_parent(target: Path) -> None:
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise Unavailable(
            f"{str(target)!r} cannot be written: {str(parent)!r} is no folder that you may write "
            "to; name another folder."
        )


def _check_replaceable(target: Path, named: str, *, force: bool) -> None:
    if not target.is_dir():
        raise InvalidInput(f"the output {named!r} is a file; name a folder.")
    if not force and any(target.iterdir()):
        raise InvalidInput(
            f"the output folder {named!r} exists; name another one or use --force "
            "(force=True) to replace it."
        )
    if any(target.iterdir()) and not (target / "manifest.json").is_file():
        raise InvalidInput(
            f"the output folder {named!r} holds no manifest.json, so it is not a result "
            "of entangle and will not be replaced; name another one."
        )


def expand_user(path: str | os.PathLike[str]) -> Path:
    """Return a path with ``~`` replaced by the home folder, or as it is if there is none.

    Raises
    ------
    InvalidInput
        If it is no path.
    """
    plain = path_of("path", path)
    try:
        return plain.expanduser()
    except RuntimeError:
        return plain


@contextmanager
def claimed(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Keep other processes from writing a result while the block runs (`entangle.runs.claims`).

    What processes that were killed have left beside it is removed or put back first (`tidy`). Of
    several ranks the first claims, which writes for all.

    Parameters
    ----------
    path
        Of the result; None for nothing.

    Raises
    ------
    InvalidInput
        If it is the root of the file system.
    Unavailable
        If another process is writing it, or its folder cannot be written.
    """
    with ExitStack() as stack:
        if path is not None and current().leads:
            target = Path(os.path.realpath(expand_user(path)))
            if not target.name:
                raise InvalidInput(f"a result must have a name of its own; got {str(path)!r}.")
            with disk_errors(target):
                _check_parent(target)
                if stack.enter_context(claim(target)):
                    tidy(target)
        yield


def agree_on(**parts: object) -> None:
    """Refuse ranks (`entangle.ranks`) that are to make other things, by parts of their manifests.

    The device may differ; the error names the first part and rank that do.
    """
    if current().size > 1:
        current().agree(
            {
                name: {key: one for key, one in part.items() if key not in ("device", "path")}
                if isinstance(part, Mapping)
                else part
                for name, part in parts.items()
            }
        )


def claims_out(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """Let a function run under a claim on the result that its argument ``out`` names."""

    @wraps(function)
    def under_claim(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        with claimed(cast("str | None", kwargs.get("out"))):
            return function(*args, **kwargs)

    return under_claim


def scratch(target: Path) -> Path:
    """Return a new hidden path beside ``target`` to write under; `tidy` removes what is left there.

    No two are alike, so that a process that has lost its claim never writes into another's.
    """
    return beside(target, f"{_WRITING}{uuid4().hex}")


def tidy(target: Path) -> None:
    """Remove what killed processes left beside a result, and put back what they had moved away.

    Only who has just claimed the result may do so. An old version that was to be replaced is whole
    until the new one has its name; then it is left over.
    """
    if not target.parent.is_dir():
        return
    start = beside(target, _WRITING).name
    for path in target.parent.iterdir():
        if path.name.startswith(start):
            _remove(path)
    replaced = beside(target, _REPLACED)
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    discard(replaced, target)


def discard(path: Path, target: Path) -> None:
    """Remove a folder that belongs to a result in one step, so that none is seen in part.

    Where the disk is too full to rename it, it is removed where it is.
    """
    aside = scratch(target)

    def clean() -> None:
        try:
            path.rename(aside)
        except FileNotFoundError:
            pass
        except OSError:
            _remove(path)
        _remove(aside)

    insist(clean)


def _remove(path: Path) -> None:
    """Remove a file or a folder as far as the disk lets, also if a signal comes between.

    What is left nevertheless, `tidy` removes.
    """
    if path.is_dir() and not path.is_symlink():
        insist(partial(shutil.rmtree, path, ignore_errors=True))
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def output_file(
    path: str | os.PathLike[str], *, remedy: str = "name another file"
) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` when the block ends without an error.

    Parameters
    ----------
    path
        The final file, which is replaced if it exists; folders above it are made.
    remedy
        What to do where the disk refuses.

    Raises
    ------
    InvalidInput
        If ``path`` is a folder, a device or a pipe.
    Unavailable
        If the disk refuses, or another process is writing the file.
    """
    target = Path(os.path.realpath(expand_user(path)))
    with disk_errors(target, remedy=remedy):
        if target.exists():
            regular_file(target)
    with claimed(path):
        temporary = scratch(target)
        try:
            with disk_errors(target, remedy=remedy):
                target.parent.mkdir(parents=True, exist_ok=True)
                yield temporary
                check_claimed(target)
                temporary.replace(target)
        finally:
            _remove(temporary)


@contextmanager
def output_folder(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block ends without an error.

    Whatever belongs to the result, its figures too, is written in the block.

    Parameters
    ----------
    path
        The final folder.
    force
        Replace an existing result.

    Raises
    ------
    InvalidInput, Unavailable
        As `check_output`; and `Unavailable` when the disk is full or turns read-only on the way, or
        another process is writing the folder.
    """
    with claimed(path):
        yield from _output_folder(path, force=force)


def _output_folder(path: str | os.PathLike[str], *, force: bool) -> Iterator[Path]:
    target = check_output(path, force=force)
    temporary = scratch(target)
    try:
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            _seal(temporary)
            check_claimed(target)
            check_output(path, force=force)  # by now there may be one
            _take_name(temporary, target)
    finally:
        _remove(temporary)


def _take_name(temporary: Path, target: Path) -> None:
    """Rename a whole folder to ``target``; an old version is whole until the new one is there."""
    replaced = beside(target, _REPLACED)
    try:
        if target.exists():
            target.rename(replaced)
        temporary.rename(target)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    discard(replaced, target)


def _seal(folder: Path) -> None:
    """Add the digests of all files of a folder to its manifest, where it has one."""
    path = folder / "manifest.json"
    if path.is_file():
        write_json(path, sealed(folder, json.loads(path.read_text(encoding="utf-8"))))


@contextmanager
def disk_errors(target: Path, *, remedy: str = "name another folder") -> Iterator[None]:
    """Turn what the operating system says against writing ``target`` into one clear line."""
    try:
        yield
    except EntangleError:
        raise
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full; free some space or",
            errno.EDQUOT: "the disk quota is used up; free some space or",
            errno.EROFS: "the disk is read-only;",
            errno.EACCES: "permission is denied;",
        }
        reason = reasons.get(error.errno or 0, f"{error.strerror or error};")
        raise Unavailable(f"{str(target)!r} cannot be written: {reason} {remedy}.") from error


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a mapping as UTF-8 JSON with a final newline; NaN is refused.

    Lone surrogates, which stand for the bytes of undecodable file names, are written as escapes.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def is_expansion(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder holds a Sparse Expansion, or a result that is not a model either.

    A folder with a manifest and an ordinary model is that model.
    """
    path = expand_user(folder)
    if not (path / "manifest.json").is_file():
        return False
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
        return "sparse-expansion" in str(config.get("quantization_config"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return not (path / "config.json").is_file()


def read_manifest(
    folder: str | os.PathLike[str], kind: str, files: Sequence[str] = ()
) -> dict[str, object]:
    """Read the manifest of a result folder; check its kind, its schema and every file's digest.

    Parameters
    ----------
    folder
        Of the result.
    kind
        Of the result.
    files
        Names of those that will be read, which must have a digest.

    Returns
    -------
    dict
        The manifest without its digests, as it was given to be written.

    Raises
    ------
    InvalidInput
        If the folder is missing, holds no readable manifest, is of another kind or schema, or was
        altered after it was written.
    """
    path = expand_user(folder) / "manifest.json"
    with decoding(path, remedy=_ANEW):
        there = path.exists()
    if not there:
        raise InvalidInput(
            f"{str(folder)!r} is no result folder: it has no manifest.json; name another one."
        )
    content = read_json(path, remedy=_ANEW)
    if not isinstance(content, dict) or content.get("kind") != kind:
        found = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise InvalidInput(f"{str(folder)!r} must hold a result of kind {kind!r}; got {found!r}.")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise InvalidInput(
            f"{str(folder)!r} has schema version {content.get('schema_version')!r}, this version "
            f"of entangle reads {SCHEMA_VERSION}; make the result anew."
        )
    return unsealed(path.parent, content, files)


def read_table(path: Path, schema: Schema) -> "pd.DataFrame":
    """Read a Parquet table of a result folder.

    Parameters
    ----------
    path
        Of the file.
    schema
        What its columns may hold; a table without rows may lack them.

    Raises
    ------
    InvalidInput
        If the file is missing or corrupt, or breaks the schema.
    """
    import pandas as pd

    if not path.exists():
        raise broken(path, "is missing")
    file = regular_file(path)
    with decoding(file, remedy=_ANEW):
        table = pd.read_parquet(file)
    if len(table):
        check_table(table, schema, path)
    return table


POLICIES = ("model", "none", "published")
"""Special tokens around every sequence as the model expects them, none, or once around the text."""


def recorded(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the settings of a text say of special tokens, None where they say nothing.

    Settings of earlier versions are read too.
    """
    found = settings.get("special_tokens")
    if found is None:
        return None
    if not isinstance(found, Mapping):
        found = {"before": found}
    before, after = list(found.get("before", [])), list(found.get("after", []))
    policy = "model" if before or after else "none"
    return {"policy": policy, **found, "before": before, "after": after}


def of_saved(origin: Mapping[str, Any] | None, *, whole: bool) -> dict[str, object]:
    """Return the setting ``special_tokens`` of a saved set's rows, nothing where it is unknown.

    Parameters
    ----------
    origin
        `CalibrationSet.describe` of the set.
    whole
        Whether the rows are taken to their end; else they have lost what stood there.
    """
    known = None if origin is None else recorded(origin.get("settings", {}))
    if known is None:
        return {}
    return {"special_tokens": known if whole else {**known, "after": [], "after_tokens": []}}


def around_each(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many special tokens stand before and after every sequence of a text."""
    known = recorded(settings)
    if known is None or known["policy"] == "published":
        return 0, 0
    return len(known["before"]), len(known["after"])


def special_tokens_of(manifest: Mapping[str, Any], *path: str) -> str:
    """Name the special tokens of the text that a manifest describes under some keys, as `shown`."""
    described: Any = manifest
    for key in (*path, "settings"):
        described = described.get(key) if isinstance(described, Mapping) else None
    return shown(described if isinstance(described, Mapping) else {})


def shown(settings: Mapping[str, Any]) -> str:
    """Name the special tokens of a text in a few words: ``<s> …``, ``none``, ``unknown``."""
    known = recorded(settings)
    if known is None:
        return "unknown"
    before, after = (
        [str(token) for token in known.get(f"{side}_tokens", known[side])]
        for side in ("before", "after")
    )
    if not before and not after:
        return "none"
    once = " once" if known["policy"] == "published" else ""
    return " ".join([*before, "…", *after]) + once
