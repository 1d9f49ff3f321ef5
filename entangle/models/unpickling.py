"""Other libraries read our files without unpickling any: their ways to do so are closed meanwhile.

What is loaded is checked before (`entangle.models.hub`). This is the second lock: a reader of a
format that nobody thought of, or of a later version, ends with a line and not with code being run.
"""

import contextlib
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

from entangle.errors import InvalidInput

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
