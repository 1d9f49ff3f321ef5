"""Whether the Hugging Face Hub answers, asked once and shortly before its libraries retry for long.

Their own retries take 18 to 47 seconds without a network. Here one request with one short timeout
decides; where nothing answers, the libraries are held to what lies in their caches.
"""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entangle.errors import Unavailable

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
