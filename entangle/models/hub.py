"""Whether the Hugging Face Hub answers, asked once and shortly before its libraries retry for long.

Their own retries take 18 to 47 seconds without a network. Here one request with one short timeout
decides; where nothing answers, the libraries are held to what lies in their caches.

What the name of a model means, and whether it can be one: told before torch is imported.
"""

import contextlib
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entangle.errors import InvalidInput, Unavailable, UnknownName
from entangle.runs.provenance import expand_user
from entangle.runs.reading import inside, read_object

SECONDS = 5.0
"""How long the Hub may take to answer, name look-up included."""
OFFLINE = (
    "Give a local folder or .gguf file, or set HF_HOME to a cache that holds the model "
    "(HF_HUB_OFFLINE=1 then skips the network)."
)
_KEPT = 60.0  # seconds that "no answer" holds
_asked: dict[str, tuple[bool, float]] = {}


def endpoint() -> str:
    """Return the address of the Hub, which ``HF_ENDPOINT`` may name."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def is_switched_off() -> bool:
    """Tell whether the user has forbidden the network (``HF_HUB_OFFLINE=1``)."""
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.strip().upper() in ("1", "ON", "YES", "TRUE") for value in values)


def answers() -> bool:
    """Tell whether anything answers at the Hub's address within `SECONDS`.

    Any answer counts, also one of an error: what it means is left to the libraries. A yes holds
    for the process, a no for a minute.
    """
    address = endpoint()
    known, when = _asked.get(address, (False, -_KEPT))
    if known or time.monotonic() - when < _KEPT:
        return known
    heard: queue.Queue[bool] = queue.Queue()
    asking = threading.Thread(target=lambda: heard.put(_ask(address)), daemon=True)
    asking.start()  # in a thread, as the look-up of a name knows no timeout
    try:
        found = heard.get(timeout=SECONDS)
    except queue.Empty:
        found = False
    _asked[address] = (found, time.monotonic())
    return found


def _ask(address: str) -> bool:
    import http.client
    import ssl
    import urllib.error
    import urllib.request

    request = urllib.request.Request(address, method="HEAD")  # noqa: S310 (the user's own setting)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS):  # noqa: S310
            return True
    except (urllib.error.HTTPError, http.client.HTTPException, ValueError):
        return True
    except urllib.error.URLError as error:  # only what is no connection is no answer
        return isinstance(error.reason, ssl.SSLError) or not isinstance(error.reason, OSError)
    except OSError:
        return False


def silence() -> str:
    """Return what to say if the Hub was asked and has not answered, else nothing."""
    known = _asked.get(endpoint())
    return f"{endpoint()} does not answer" if known is not None and not known[0] else ""


def check_model(name: str) -> None:
    """Raise `Unavailable` if a hub model is neither in the Hub's cache nor can be asked for."""
    if not (is_cached(name, "model") or is_switched_off() or answers()):
        raise Unavailable(
            f"model {name!r} is no local folder or .gguf file, and it could not be had from the "
            f"hub ({silence()}). {OFFLINE}"
        )


def check_data_set(name: str) -> None:
    """Raise `Unavailable` if a data set is neither in a cache nor can be asked for."""
    cached = Path(name).expanduser().exists() or is_cached(name, "dataset")
    if not (cached or is_switched_off() or answers()):
        raise Unavailable(
            f"data set {name!r} cannot be reached ({silence()}); check the network, or give a "
            "local file, a folder, or `demo`."
        )


@contextlib.contextmanager
def caches_alone() -> Iterator[None]:
    """Hold huggingface_hub and datasets to their caches inside the block, if nothing answers."""
    if is_switched_off() or answers():
        yield
        return
    from huggingface_hub import constants

    modules: list[Any] = [constants, getattr(sys.modules.get("datasets"), "config", None)]
    before = [(one, one.HF_HUB_OFFLINE) for one in modules if one is not None]
    try:
        for one, _ in before:
            one.HF_HUB_OFFLINE = True
        yield
    finally:
        for one, value in before:
            one.HF_HUB_OFFLINE = value


def is_cached(name: str, kind: str) -> bool:
    """Tell whether the Hub's cache holds anything of a repository.

    Parameters
    ----------
    name
        Id of the repository.
    kind
        ``model`` or ``dataset``.
    """
    home = Path(os.environ.get("HF_HOME") or _below_cache("huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    places = [hub / f"{kind}s--{name.replace('/', '--')}"]
    if kind == "dataset":
        prepared = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
        places.append(prepared / name.replace("/", "___"))
    return any(Path(os.path.expandvars(place)).expanduser().is_dir() for place in places)


def _below_cache(name: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / name


ADAPTER_CONFIG = "adapter_config.json"
"""File that a folder of an adapter (PEFT) has."""
TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "tekken.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
SAFE = ".safetensors"
"""Ending of the only weight files that are read."""
INDEX = f"{SAFE}.index.json"
"""Ending of a file that tells which weight file holds which tensor."""
DTYPES = ("float32", "bfloat16", "float16")
"""Names that ``dtype`` may have, beside auto."""
_DEVICE = re.compile(r"auto|cpu(:0)?|mps(:0)?|cuda(:\d+)?")
_HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_CONVERT = (
    "is no safetensors file, and a pickle can run code and is never loaded: convert it once with "
    "transformers' `save_pretrained` where you trust it."
)
_AGAIN = "copy it again"
_LONGEST_ID = 96  # characters of a hub id
_LONGEST_NAME = 2000  # characters; no path or hub id is longer


def model_source(name: str | os.PathLike[str]) -> str:
    """Return what a name means: ``demo``, ``hub``, ``folder``, ``adapter`` or ``gguf``.

    Raises
    ------
    UnknownName
        When there is no such folder or file, and it cannot be a hub id.
    InvalidInput
        When a file is no .gguf file, or a folder holds no model.
    """
    if name == "demo":
        return "demo"
    path = _existing_path(os.fspath(name))
    if path is None:
        return "hub"
    if path.is_dir():
        return "adapter" if check_folder(path) else "folder"
    if path.suffix == ".gguf" and path.is_file():
        return "gguf"
    raise InvalidInput(
        f"a model file must end in .gguf; got {os.fspath(name)!r}: give its folder instead."
    )


def _existing_path(name: str) -> Path | None:
    """Return the path of a file or folder that is there; None for what can be a hub id."""
    if not name.strip() or "\0" in name:
        raise InvalidInput(
            f"`model` must be demo, a hub id, a folder or a .gguf file; got {name!r}."
        )
    if len(name) > _LONGEST_NAME:
        raise UnknownName(f"unknown model {name[:40]!r}…: a name of {len(name)} characters.")
    path = expand_user(name)
    try:
        found = path.exists()
    except OSError:  # no name that the file system could hold, or no right to look
        found = False
    if found:
        return path
    if path.suffix == ".gguf" or name.startswith((".", "~", "/", "\\")) or name.count("/") > 1:
        raise UnknownName(f"unknown model {name!r}: there is no such folder or file.")
    if not _HUB_ID.fullmatch(name) or len(name) > _LONGEST_ID or name.endswith((".", "-", ".git")):
        raise UnknownName(
            f"unknown model {name!r}: neither `demo`, nor a local folder or .gguf file, nor a name "
            "that a model on the hub could have."
        )
    return None


def check_settings(
    source: str,
    name: str | os.PathLike[str],
    *,
    revision: str | None,
    dtype: object,
    device: object,
    device_map: object,
) -> None:
    """Check how a model is to be loaded, as far as torch is not needed for it.

    Parameters
    ----------
    source
        What `model_source` returned for ``name``.
    """
    shown = os.fspath(name)
    if revision is not None and source != "hub":
        raise InvalidInput(
            f"`revision` applies to models from the hub; got {revision!r} for the {source} "
            f"model {shown!r}: leave it out."
        )
    if device_map is not None and (source in ("demo", "gguf", "adapter") or device != "auto"):
        raise InvalidInput(
            f"`device_map` applies to a hub model or folder, without `device`; got {device_map!r} "
            f"for the {source} model {shown!r} with device {str(device)!r}."
        )
    if isinstance(dtype, str) and dtype not in ("auto", *DTYPES):
        raise InvalidInput(f"`dtype` must be auto, {', '.join(DTYPES)}; got {dtype!r}.")
    if isinstance(device, str) and not _DEVICE.fullmatch(device):
        raise InvalidInput(f"`device` must be auto, cpu, cuda, cuda:N or mps; got {device!r}.")


def check_folder(folder: Path) -> bool:
    """Check that a folder holds a model or an adapter; return whether it is an adapter alone.

    Every weight file that the folder's config or indices name must be a safetensors file of the
    folder: transformers would also unpickle what an index names.

    Raises
    ------
    InvalidInput
        When it has no config or no safetensors weights, or names a file that is none of them.
    """
    weights = [path.name for path in folder.glob(f"*{SAFE}") if path.is_file()]
    indices = sorted(path for path in folder.glob(f"*{INDEX}") if path.is_file())
    whole = any(not name.startswith("adapter_") for name in weights)
    whole = whole or folder / f"model{INDEX}" in indices
    has_config = (folder / "config.json").is_file()
    if (folder / ADAPTER_CONFIG).is_file() and not (has_config and whole):
        if f"adapter_model{SAFE}" in weights:
            return True
        raise InvalidInput(
            f"adapter folder {str(folder)!r} must hold adapter_model.safetensors; "
            f"{_remedy(folder, 'save it again with peft')}"
        )
    if not has_config:
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; name the file itself, for example {ggufs[0]}" if ggufs else ""
        raise InvalidInput(f"a model folder must hold config.json; {str(folder)!r} has none{hint}.")
    if not whole:
        raise InvalidInput(
            f"model folder {str(folder)!r} must hold safetensors weights; "
            f"{_remedy(folder, 'copy model.safetensors next to config.json')}"
        )
    _check_named_weights(folder)
    for index in indices:
        indexed_files(index)
    return False


def _check_named_weights(folder: Path) -> None:
    """Check the weight file or index that a config names in place of the usual one."""
    path = folder / "config.json"
    try:
        named = read_object(path, remedy=_AGAIN).get("transformers_weights")
    except InvalidInput:  # what is wrong with a config, its loading tells
        return
    if named is not None:
        inside(folder, named, what=f"`transformers_weights` of {str(path)!r}")
        if not named.endswith((SAFE, INDEX)):
            raise InvalidInput(
                f"`transformers_weights` of {str(path)!r} must name a {SAFE} file or a {INDEX}; "
                f"{named!r} {_CONVERT}"
            )


def indexed_files(index: Path) -> list[Path]:
    """Return the weight files that an index names, each once, in the order of their names.

    Raises
    ------
    InvalidInput
        When it cannot be read, or names anything but safetensors files of its own folder.
    """
    what = f"the weight index {str(index)!r}"
    names = read_object(index, remedy=_AGAIN).get("weight_map")
    if not isinstance(names, dict):
        raise InvalidInput(
            f"{what} must hold an object `weight_map`; got {type(names).__name__}: copy it again."
        )
    files = {inside(index.parent, name, what=what) for name in names.values()}
    if wrong := sorted(path.name for path in files if path.suffix != SAFE):
        raise InvalidInput(f"{what} must name {SAFE} files only; {wrong[0]!r} {_CONVERT}")
    return sorted(files)


def _remedy(folder: Path, otherwise: str) -> str:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    return f"{pickles[0]} {_CONVERT}" if pickles else f"{otherwise}."
