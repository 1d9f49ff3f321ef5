"""What is fetched or derived once and kept: sealed folders inside the cache folder.

A sealed folder records the digest of every file that was written to it. It is checked whenever it
is opened: one changed byte, and it is made again.

In which dtype a folder's weights are stored, read from the headers of its safetensors files.
"""

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import filelock
import torch
from safetensors import SafetensorError, safe_open

from entangle.errors import InvalidInput, Unavailable
from entangle.models.hub import indexed_files
from entangle.runs.places import cache_folder
from entangle.runs.progress import tell
from entangle.runs.reading import decoding, regular_file

SEAL = "entangle-digests.json"
"""File of a sealed folder with the size and digest of all others."""
PIECE = 1 << 26  # bytes that one thread hashes at a time


def digest_of(path: Path) -> str:
    """Return a file's digest: SHA-256 over the SHA-256 of its pieces of 64 MiB, in hexadecimal.

    The pieces are hashed side by side, so that several cores share a large file.
    """
    size = path.stat().st_size
    if size == 0:
        return hashlib.sha256().hexdigest()
    with (
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
        ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool,
    ):
        pieces = list(pool.map(lambda start: _sha256(view, start), range(0, size, PIECE)))
    return hashlib.sha256(b"".join(pieces)).hexdigest()


def _sha256(view: memoryview, start: int) -> bytes:
    with view[start : start + PIECE] as piece:
        return hashlib.sha256(piece).digest()


def sealed_folder(name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder ``name`` of the cache, made by ``make`` if it is not there intact.

    Two processes that want it at once make it once: the second waits.

    Parameters
    ----------
    name
        Of the folder in the cache folder; it must name everything that its content depends on.
    make
        Writes the folder of the path it is given, which does not exist yet.

    Raises
    ------
    Unavailable
        When the cache folder cannot be written or has no room.
    """
    target = cache_folder() / name
    if is_intact(target):
        return target
    with only_one_process(target):
        if is_intact(target):  # another process has made it meanwhile
            return target

        def write(folder: Path) -> None:
            make(folder)
            seal(folder)

        write_atomically(target, write)
    return target


def seal(folder: Path) -> None:
    """Record size and digest of all files of a folder beside them."""
    content = {name: _facts(folder / name) for name in _names(folder)}
    (folder / SEAL).write_text(json.dumps(content, indent=1), "utf-8")


def is_intact(folder: Path) -> bool:
    """Tell whether a folder is sealed and holds exactly what it held then: files, and no links."""
    try:
        if not all(_is_plain(path) for path in folder.rglob("*")):
            return False
        recorded = json.loads((folder / SEAL).read_text("utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in _names(folder)}
        same_sizes = sizes == {name: facts["bytes"] for name, facts in recorded.items()}
        return same_sizes and all(_facts(folder / name) == recorded[name] for name in sizes)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def _is_plain(path: Path) -> bool:
    return not path.is_symlink() and (path.is_file() or path.is_dir())


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if not path.is_dir() and path != folder / SEAL)
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _facts(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "digest": digest_of(path)}


def check_room(n_bytes: int) -> None:
    """Raise `Unavailable` unless the cache folder's disk has room for so many bytes."""
    folder = cache_folder()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < n_bytes:
            raise OSError(f"{n_bytes / 2**30:.1f} GiB are needed, {free / 2**30:.1f} are free")


@contextlib.contextmanager
def only_one_process(target: Path) -> Iterator[None]:
    """Let one process at a time into the block for ``target``; where files cannot be locked, all.

    Without a lock the last one wins, which is harmless as `write_atomically` renames.
    """
    path = target.with_name(f".{target.name}.lock")
    lock = filelock.FileLock(path)
    with writing(target.parent), contextlib.ExitStack() as stack:
        stack.callback(_forget, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(lock.acquire(timeout=0))
        except filelock.Timeout:
            tell(f"waiting for another process to make {target.name}")
            stack.enter_context(lock)
        except NotImplementedError:  # a file system without locks
            pass
        yield


def _forget(lock: Path) -> None:
    with contextlib.suppress(OSError):  # gone, or another process waits for it
        lock.unlink()


def write_atomically(target: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file or folder under a temporary name, then rename it to ``target``.

    What is there already is replaced; a folder that another process made meanwhile is kept.

    Raises
    ------
    Unavailable
        When the cache folder cannot be written or has no room.
    """
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent) as temporary:
            made, stale = Path(temporary) / target.name, os.path.lexists(target)
            write(made)
            if stale and (made.is_dir() or target.is_dir()):  # which a file cannot replace
                target.rename(Path(temporary) / "replaced")
            try:
                made.replace(target)
            except OSError:
                if not (made.is_dir() and target.is_dir()):  # made by another process meanwhile
                    raise


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what stops the cache folder from being written into one clear line."""
    try:
        yield
    except Unavailable:
        raise
    except (OSError, SafetensorError) as error:
        raise Unavailable(
            f"the cache folder {str(folder)!r} must be writable and have room ({error}); "
            "set ENTANGLE_CACHE or ENTANGLE_HOME to another folder."
        ) from error


FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
}  # fmt: skip
_AGAIN = "copy it again"


def stored_sizes(folder: Path) -> list[tuple[str, int]]:
    """Return dtype and number of values of every tensor that transformers would load.

    Raises
    ------
    InvalidInput
        If a file of weights, or their index, is damaged.
    """
    return [found for file in weight_files(folder) for found in _tensors(file)]


def stored_dtype(folder: Path) -> torch.dtype | None:
    """Return the floating dtype that a folder's weights are stored in, None if they have none.

    transformers' own ``"auto"`` takes the dtype that ``config.json`` names, and casts the weights
    to it without a word where they are stored in another one. Of several dtypes the one that most
    values have is returned, as a model runs in one; what that rounds is told on standard error.

    Raises
    ------
    InvalidInput
        If weights are stored in 8 bits or less, whose values are nothing without their scales; and
        as `stored_sizes`.
    """
    counts: Counter[str] = Counter()
    for kind, n_values in stored_sizes(folder):
        counts[kind] += n_values
    packed = [kind for kind in counts if kind.startswith("F") and kind not in FLOATS]
    if packed:
        raise InvalidInput(
            f"model {str(folder)!r} must hold plain weights; some are stored as {packed[0]}: use "
            "the unquantised model or a .gguf file."
        )
    floats = Counter({kind: n for kind, n in counts.items() if kind in FLOATS})
    if not floats:
        return None
    chosen = FLOATS[floats.most_common(1)[0][0]]
    finer = [kind for kind in floats if torch.promote_types(FLOATS[kind], chosen) != chosen]
    rounded = sum(floats[kind] for kind in finer)
    if rounded:
        wide = max((FLOATS[kind] for kind in floats), key=lambda one: torch.finfo(one).bits)
        tell(
            f"{str(folder)!r} stores {rounded:,} of {floats.total():,} weights more "
            f"finely than the others: all are loaded as {_name(chosen)}; dtype={_name(wide)} "
            "keeps every one."
        )
    return chosen


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights that transformers would load, none if there is no index.

    Raises
    ------
    InvalidInput
        If one that the index names is missing.
    """
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    files = indexed_files(index)
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise InvalidInput(
            f"model folder {str(folder)!r} must hold {missing[0]!r}, which its index names; "
            f"{_AGAIN}."
        )
    return files


def _tensors(file: Path) -> Iterator[tuple[str, int]]:
    with decoding(regular_file(file), remedy=_AGAIN), safe_open(file, framework="np") as opened:
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            stored = opened.get_slice(name)
            yield stored.get_dtype(), prod(stored.get_shape())
