"""What reading a file raises, and one line in its place.

Every file that a user names is read inside `decoding`, which knows what the decoders of JSON,
Parquet, safetensors, archives and text raise over a damaged file. Only the reading belongs inside:
what is worked out afterwards raises its own errors.

Which files a folder's own files may name: those that lie in it, by plain names.

A manifest or an index of weights comes with a folder that may be somebody else's. The names in it
must not lead anywhere else: no separators, no ``..``, no drive, and no link to a file outside. The
one exception is the layout of the Hugging Face Hub's cache, whose snapshots are links to blobs.

Other libraries read our files without unpickling any: their ways to do so are closed meanwhile.

What is loaded is checked before (`entangle.models.hub`). This is the second lock: a reader of a
format that nobody thought of, or of a later version, ends with a line and not with code being run.
"""

import contextlib
import errno
import json
import lzma
import os
import pickle
import re
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError

from entangle.errors import EntangleError, InvalidInput, Unavailable

READ_ERRORS: tuple[type[Exception], ...] = (
    OSError,  # also of pyarrow and bz2, over content
    ValueError,  # JSON, Unicode, numbers of too many digits, pandas
    TypeError,  # with the next two: another shape than was expected
    LookupError,
    AttributeError,
    ArithmeticError,  # sizes that no number of the machine holds
    MemoryError,  # sizes that no memory holds
    RuntimeError,  # nesting that is too deep, what is not implemented, an encrypted archive
    EOFError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    SafetensorError,
)
"""What reading raises, but for the classes of `FOREIGN`."""

FOREIGN = ("pyarrow", "datasets")
"""Libraries with errors of their own, told by name as importing them takes long."""

_LONGEST_REASON = 200  # characters of a reason
_CONTENT = (None, errno.EINVAL)  # numbers of an OSError that is about the content


@contextmanager
def decoding(path: str | os.PathLike[str], *, remedy: str) -> Iterator[None]:
    """Turn what goes wrong while ``path`` is read, or taken apart, into one line.

    Parameters
    ----------
    path
        The file or folder, for the message.
    remedy
        What to do about damaged content, without a full stop, such as ``"save it again"``.

    Raises
    ------
    InvalidInput
        If the content raises one of `READ_ERRORS`, or of the classes of `FOREIGN`.
    Unavailable
        If the operating system refuses: no such file, no right to read it, a disk that fails.
    EntangleError
        As the block raises it.
    """
    try:
        yield
    except EntangleError:
        raise
    except Exception as error:
        if is_damage(error):
            raise InvalidInput(
                f"{str(path)!r} cannot be read ({reason(error)}); {remedy}."
            ) from error
        if isinstance(error, OSError):
            raise Unavailable(
                f"{str(path)!r} cannot be read ({error.strerror or error}); check the path."
            ) from error
        raise


def is_damage(error: Exception) -> bool:
    """Tell whether an error is about content that was read.

    It is one of `READ_ERRORS`, or of the classes of `FOREIGN`, and not the refusal of the operating
    system, whose errors have a number.
    """
    foreign = type(error).__module__.partition(".")[0] in FOREIGN
    refused = isinstance(error, OSError) and error.errno not in _CONTENT
    return (foreign or isinstance(error, READ_ERRORS)) and not refused


def reason(error: BaseException) -> str:
    """Return what an error says, in one short line; with its class where it says little."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, LookupError | TypeError | AttributeError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 1]}…"


def regular_file(path: str | os.PathLike[str]) -> Path:
    """Return the path of a file that can be read to its end; refuse a folder, a pipe, a device.

    Raises
    ------
    Unavailable
        If there is none, or it may not be looked at.
    InvalidInput
        If it is something else than a file.
    """
    file = Path(path)
    with decoding(file, remedy="check the path"):
        mode = file.stat().st_mode
    if not stat.S_ISREG(mode):
        raise InvalidInput(f"{str(file)!r} must be a file; it is {_kind(mode)}: name another one.")
    return file


def regular_files(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder with a pipe, a socket or a device in it, whose reading might never end.

    Links that lead nowhere, and folders in it, are left to those who read it.

    Raises
    ------
    InvalidInput
        Naming what is no file.
    Unavailable
        If the folder may not be looked at.
    """
    with decoding(folder, remedy="check the path"):
        found = sorted(Path(folder).iterdir())
        modes = [(one, one.stat().st_mode) for one in found if one.exists()]
    for one, mode in modes:
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise InvalidInput(f"{str(one)!r} must be a file; it is {_kind(mode)}: remove it.")


def read_text(path: str | os.PathLike[str], *, remedy: str) -> str:
    """Return the text of a UTF-8 file.

    Raises
    ------
    InvalidInput, Unavailable
        As `regular_file` and `decoding`.
    """
    file = regular_file(path)
    with decoding(file, remedy=remedy):
        return file.read_text("utf-8")


def read_json(path: str | os.PathLike[str], *, remedy: str) -> Any:
    """Return what a UTF-8 JSON file holds, of whatever type.

    Raises
    ------
    InvalidInput
        If it is no regular file, no UTF-8 or no JSON, nested too deeply, or a number in it has too
        many digits.
    Unavailable
        If there is no such file, or it may not be read.
    """
    text = read_text(path, remedy=remedy)
    with decoding(path, remedy=remedy):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"it is not valid JSON: {error}") from error


def read_object(path: str | os.PathLike[str], *, remedy: str) -> dict[str, Any]:
    """Return the object that a UTF-8 JSON file holds.

    Raises
    ------
    InvalidInput, Unavailable
        As `read_json`; and if it holds something else.
    """
    found = read_json(path, remedy=remedy)
    if not isinstance(found, dict):
        raise InvalidInput(
            f"{str(path)!r} must hold a JSON object; got {type(found).__name__}: {remedy}."
        )
    return found


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "of another kind")


_LONGEST_NAME = 255  # bytes of a file's name
_SHOWN = 200  # characters of a refused name
_REPOSITORY = re.compile(r"(models|datasets|spaces|kernels)--.+")
_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")


def is_plain_name(name: object) -> bool:
    """Tell whether ``name`` is text that can only mean a file directly in a folder."""
    if not isinstance(name, str) or name in ("", ".", "..") or not name.isprintable():
        return False
    plain = PurePosixPath(name).name == name == PureWindowsPath(name).name
    return plain and len(name.encode()) <= _LONGEST_NAME


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


_here = threading.local()
_lock = threading.Lock()
_open_blocks = 0
_closed: list[tuple[Any, str, Callable[..., Any]]] = []  # owner, name, the function itself


@contextlib.contextmanager
def no_pickles(what: str) -> Iterator[None]:
    """Let `torch.load` and `pickle` raise while the block runs, for the thread that runs it.

    Other threads unpickle as before.

    Parameters
    ----------
    what
        What is read, for the message.

    Raises
    ------
    InvalidInput
        Inside the block, by whatever unpickles.
    """
    outer = getattr(_here, "what", None)
    _close()
    _here.what = what
    try:
        yield
    finally:
        _here.what = outer
        _reopen()


def _close() -> None:
    global _open_blocks
    import torch  # here, as the command line starts without it

    with _lock:
        _open_blocks += 1
        if _open_blocks > 1:
            return
        # `torch.load` unpickles with `weights_only` too; NumPy calls `pickle.load`, and where that
        # raises, pandas calls the Unpickler in Python
        python: Any = vars(pickle)["_Unpickler"]
        for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (python, "load")):
            _closed.append((owner, name, getattr(owner, name)))
            setattr(owner, name, _guarded(getattr(owner, name)))


def _reopen() -> None:
    global _open_blocks
    with _lock:
        _open_blocks -= 1
        while _open_blocks == 0 and _closed:
            setattr(*_closed.pop())


def _guarded(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(*args: Any, **settings: Any) -> Any:
        what = getattr(_here, "what", None)
        if what is None:
            return original(*args, **settings)
        file = getattr(args[0], "name", args[0]) if args else None
        named = f" {os.fspath(file)!r}" if isinstance(file, str | os.PathLike) else ""
        raise InvalidInput(
            f"{what} holds a pickle{named}, which can run code and is never loaded: convert it "
            "once to safetensors or Parquet where you trust it."
        )

    return load
