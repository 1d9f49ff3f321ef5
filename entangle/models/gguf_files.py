"""GGUF files: parsed once, dequantised to float32, and kept as a Hugging Face folder.

transformers parses the file for the config, for the weights and for the tokenizer; with a
vocabulary of 262,144 tokens each time takes a quarter of a minute. Here the parsed file is shared,
and the model is converted once into the cache folder: the digest of the file names the folder, and
the folder is checked by the digests of its own files whenever it is opened.
"""

import contextlib
import copy
import functools
import importlib.metadata
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import psutil
import torch
import transformers as hf
from transformers import modeling_gguf_pytorch_utils as hf_gguf

from entangle.errors import Unavailable
from entangle.models import cache, pretrained
from entangle.models.pretrained import FLAGS, Loaded
from entangle.runs.places import cache_folder
from entangle.runs.progress import tell

VERSION = 2
"""Of what a converted folder holds; 2 has the tokenizer's flags."""
_patched = threading.Lock()


class _Parsed(gguf.GGUFReader):
    """A parsed file whose bytes are a plain array: slicing a memory map is several times slower."""

    @property
    def data(self) -> Any:
        return self._bytes

    @data.setter
    def data(self, mapped: Any) -> None:
        self._bytes = mapped.view(np.ndarray)


def open_gguf(file: Path, *, dtype: torch.dtype | None) -> Loaded:
    """Load the model and tokenizer of a GGUF file, converted once into the cache folder.

    Parameters
    ----------
    file
        The file. Its digest names the converted folder, so that a copy elsewhere shares it.
    dtype
        Of the parameters; None gives float32, in which they are dequantised and stored.

    Raises
    ------
    InvalidInput
        When the file is not a GGUF model that transformers can read.
    """
    with pretrained.broken_as(f"GGUF file {str(file)!r}"):
        key = cache.digest_of(file)
    model, tokenizer = load_converted(lambda: file, key, what=f"{file.name!r}", dtype=dtype)
    model.name_or_path = model.config.name_or_path = str(file)
    if tokenizer is not None:
        tokenizer.name_or_path = str(file)
    return model, tokenizer


def load_converted(
    find: Callable[[], Path], key: str, *, what: str, dtype: torch.dtype | None
) -> Loaded:
    """Load what a GGUF file was converted to; convert it first where that is not there intact.

    Where the cache folder cannot hold it, the file is loaded without it, and that is said.

    Parameters
    ----------
    find
        Returns the file; called only when it has to be converted.
    key
        Digest of the file.
    what
        What is converted, for the user to read.
    dtype
        As in `open_gguf`.
    """
    version = importlib.metadata.version("transformers")
    name = f"gguf-{key[:24]}-{VERSION}-transformers-{version}"
    asked = False
    file: Path | None = None
    made: list[Loaded] = []

    def make(folder: Path) -> None:
        nonlocal asked, file
        asked = True
        file = find()
        changed = (cache_folder() / name).exists()
        again = f"the conversion of {what} has changed since it was made: converting it again"
        once = f"converting {what} (once, into {str(cache_folder())!r})"
        made.append(_convert(file, folder, dtype=dtype, line=again if changed else once))

    try:
        folder = cache.sealed_folder(name, make)
    except Unavailable as error:
        if asked and file is None:  # it is the file that cannot be had
            raise
        tell(f"loading {what} without the cache: {error}")
        if made and dtype in (None, torch.float32):
            return made[0]
        return load_gguf(file or find(), dtype=dtype)
    made.clear()
    return pretrained.load_converted_folder(folder, dtype=dtype)


def load_gguf(file: Path, *, dtype: torch.dtype | None) -> Loaded:
    """Load the model and tokenizer of a GGUF file, dequantised to ``dtype`` (None: float32).

    The result is a plain model: it can be saved, and nothing in it stays quantised. The
    tokenizer's ``init_kwargs`` hold the flags of the metadata.

    Raises
    ------
    InvalidInput
        When the file is not a GGUF model that transformers can read.
    """
    with _parsed_once() as parsed:
        return _load(file, dtype, parsed)


def _load(file: Path, dtype: torch.dtype | None, parsed: Callable[[Path], _Parsed]) -> Loaded:
    pretrained.need_accelerate("a .gguf file")
    where: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    with pretrained.quiet(catch_stderr=True), pretrained.broken_as(f"GGUF file {str(file)!r}"):
        config = hf.AutoConfig.from_pretrained(file.parent, **where)
        auto = pretrained.auto_class(config, file)
        sizes = [int(tensor.n_elements) for tensor in parsed(file).tensors]
        pretrained.check_size(config, auto, sizes, file)
        loose, report = auto.from_pretrained(
            file.parent,
            **where,
            config=config,
            dtype=dtype or torch.float32,
            quantization_config=hf.GgufConfig(dequantize=True),
            adapter_kwargs=pretrained.NO_ADAPTER,
            output_loading_info=True,
        )
        pretrained.check_complete(report, file)
        settings = loose.config.to_dict()
        settings.pop("quantization_config", None)
        plain = type(loose.config).from_dict(settings)
        model = type(loose).from_pretrained(
            None, config=plain, state_dict=loose.state_dict(), dtype=loose.dtype
        )
        tokenizer = hf.AutoTokenizer.from_pretrained(file.parent, **where)
        for flag in FLAGS:
            field = parsed(file).fields.get(f"tokenizer.ggml.{flag}")
            if field is not None:
                tokenizer.init_kwargs.setdefault(flag, bool(field.contents()))
        pretrained.check_tokenizer(tokenizer)
    return model, tokenizer


def _convert(file: Path, folder: Path, *, dtype: torch.dtype | None, line: str) -> Loaded:
    """Save a GGUF file's model and tokenizer as a Hugging Face folder in float32.

    ``line`` is told when the file can be read and there is room.

    Raises
    ------
    Unavailable
        When memory or the disk has no room for it, and loading in ``dtype`` could still work.
    """
    with _parsed_once() as parsed:
        with pretrained.broken_as(f"GGUF file {str(file)!r}"):
            if "general.architecture" not in parsed(file).fields:
                raise ValueError("its metadata names no architecture")
            n_bytes = 4 * sum(int(tensor.n_elements) for tensor in parsed(file).tensors)
        cache.check_room(n_bytes)
        free = psutil.virtual_memory().available
        if dtype not in (None, torch.float32) and free < 1.2 * n_bytes:
            raise Unavailable(
                f"float32 takes {n_bytes / 2**30:.1f} GiB of memory; {free / 2**30:.1f} are free."
            )
        tell(line)
        model, tokenizer = _load(file, None, parsed)
    with pretrained.quiet():
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            _write_flags(folder / "tokenizer_config.json", tokenizer)
    return model, tokenizer


def _write_flags(path: Path, tokenizer: hf.PreTrainedTokenizerBase) -> None:
    """Add the flags, which transformers leaves out of what it saves."""
    flags = {flag: tokenizer.init_kwargs[flag] for flag in FLAGS if flag in tokenizer.init_kwargs}
    settings = json.loads(path.read_text("utf-8")) | flags
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False), "utf-8")


@contextlib.contextmanager
def _parsed_once() -> Iterator[Callable[[Path], _Parsed]]:
    """Let transformers share one parsed file, and one reading of its config, inside the block."""
    original: Callable[..., dict[str, Any]] = hf_gguf.load_gguf_checkpoint
    configs: dict[str, dict[str, Any]] = {}

    @functools.cache
    def parsed(path: Path) -> _Parsed:
        return _Parsed(path)

    def checkpoint(path: str, return_tensors: bool = False, **settings: Any) -> dict[str, Any]:
        if return_tensors:
            return original(path, return_tensors=True, **settings)
        if path not in configs:
            configs[path] = original(path, **settings)
        return configs[path] | {"config": copy.deepcopy(configs[path]["config"])}

    def reader(path: str, *_: object) -> _Parsed:
        return parsed(Path(path))

    with (
        _patched,
        _replaced(gguf, "GGUFReader", reader),
        _replaced(hf_gguf, "load_gguf_checkpoint", checkpoint),
    ):
        yield parsed


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, function: object) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)
