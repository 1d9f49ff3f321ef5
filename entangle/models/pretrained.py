"""Reading pretrained weights and tokenizers through transformers, safely and quietly.

Only safetensors and GGUF are read: no pickles, no code from a repository. Whatever a third party
raises over a broken folder or file becomes one clear line, chained from the original error.
"""

import contextlib
import importlib.util
import io
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers as hf
from huggingface_hub import errors as hub_errors

from entangle.checks import shown
from entangle.errors import EntangleError, InvalidInput, MemoryLimit, Unavailable, UnknownName
from entangle.models import hub
from entangle.models.cache import stored_dtype, stored_sizes, weight_files
from entangle.models.hub import ADAPTER_CONFIG, TOKENIZER_FILES, check_folder
from entangle.models.streaming import check_streamable, open_streamed
from entangle.packed import huggingface
from entangle.runs.progress import on_terminal, tell
from entangle.runs.reading import no_pickles, read_object, regular_files

Loaded = tuple[hf.PreTrainedModel, hf.PreTrainedTokenizerBase | None]
"""A model in the state that transformers leaves it in, and its tokenizer where there is one."""

FLAGS = ("add_bos_token", "add_eos_token")
"""Of a tokenizer: whether the model was trained with these tokens around a text."""

NO_ADAPTER = {"subfolder": "none"}
"""Where transformers looks for an adapter, or it would apply one in the folder unasked."""

hf_logging: Any = hf.utils.logging
hub_utils: Any = huggingface_hub.utils

ROOM = 2**28
"""Values that a model may have in any case; beyond, it is held against the weights that are stored.
"""
LABELS = 2**20
"""Labels that a config may ask for."""
_MOST = 8  # times the stored values: buffers, tied and missing weights
_PANIC = "PanicException"  # of a library in Rust, no subclass of Exception
_OWN = (OSError, ValueError)  # raised by a block of ours over what it reads


def fetch_snapshot(name: str, *, revision: str | None) -> tuple[Path, str | None]:
    """Download the hub model ``name`` and return its local folder and resolved commit hash.

    Raises
    ------
    UnknownName
        When the hub has no such model or revision, or ``name`` cannot be a hub id.
    Unavailable
        When the hub cannot be reached and the model is not in the local cache, or access is gated.
    """
    patterns = ["*.json", "*.safetensors", "*.jinja", *TOKENIZER_FILES]
    try:
        with quiet(), hub.caches_alone():
            folder = huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*", "consolidated*"],
            )
    except hub_errors.GatedRepoError as error:
        raise Unavailable(
            f"model {name!r} is gated: accept its terms on the hub and log in (`hf auth login`)."
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise UnknownName(
            f"model {name!r} has no revision {revision!r}; give a branch, tag or commit of it."
        ) from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        raise UnknownName(
            f"unknown model {name!r}: neither `demo`, nor a local folder or .gguf file, nor a "
            "model on the hub; a private one needs `hf auth login`."
        ) from error
    except (OSError, hub_errors.RevisionResolutionError) as error:
        reason = hub.silence() or _first_line(error)
        raise Unavailable(
            f"model {name!r} is no local folder or .gguf file, and it could not be had from the "
            f"hub ({reason}). {hub.OFFLINE}"
        ) from error
    commit = Path(folder).name
    return Path(folder), commit if re.fullmatch("[0-9a-f]{40}", commit) else None


def load_folder(
    folder: Path, *, dtype: torch.dtype | None, device_map: str | Mapping[str, Any] | None
) -> Loaded:
    """Load the model and, where there is one, the tokenizer of a Hugging Face folder.

    Parameters
    ----------
    folder
        Holds ``config.json``, safetensors weights and, usually, a tokenizer. An adapter (PEFT)
        beside them is left out, whether or not peft is installed, and that is said.
    dtype
        Of the parameters; None keeps the one they are stored in (`stored_dtype`).
    device_map
        Passed to transformers; needs accelerate.

    Raises
    ------
    InvalidInput
        When the folder is not a model that can be used, naming what is wrong with it.
    """
    check_folder(folder)
    regular_files(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        tell(
            f"{str(folder)!r} holds a model and an adapter ({ADAPTER_CONFIG}): the model is loaded "
            "without the adapter; to apply it, put its files into a folder of their own and name "
            "that."
        )
    return _load_model(folder, dtype=dtype, device_map=device_map), tokenizer_of(folder)


def open_folder(folder: Path, *, dtype: torch.dtype | None, device: torch.device) -> Loaded:
    """Load as `load_folder`, but leave the weights in their files: blocks come one at a time.

    Parameters
    ----------
    folder, dtype
        As in `load_folder`.
    device
        Where it runs.

    Raises
    ------
    InvalidInput
        As `load_folder`; if the model is no causal language model, or its experts are packed.
    """
    check_folder(folder)
    regular_files(folder)
    _check_labels(folder)
    with quiet():
        config = _config_of(folder)
        files = weight_files(folder)
        if is_packed(config) or not files:
            raise InvalidInput(
                f"only plain weights in safetensors files can be streamed; {str(folder)!r} has "
                f"{'packed experts' if files else 'none'}: leave --stream (stream) out."
            )
        auto = auto_class(config, folder)
        check_streamable(config, auto, folder)
        check_size(config, auto, [n for _, n in stored_sizes(folder)], folder)
        stored = dtype or stored_dtype(folder) or torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]), broken_as(f"model folder {str(folder)!r}"):
            model, report = open_streamed(
                auto, config, files, dtype=stored, device=device, folder=folder
            )
        check_complete(report, folder)
    return model, tokenizer_of(folder)


def load_converted_folder(folder: Path, *, dtype: torch.dtype | None) -> Loaded:
    """Load what a GGUF file was converted to: its tokenizer to the letter as it was converted.

    transformers builds some tokenizers anew from a folder's vocabulary, as their class in general
    does it, and not as the file said.
    """
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        with quiet(), unheard(), broken_as(f"tokenizer of {str(folder)!r}"):
            tokenizer = hf.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            written = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
            flags = {flag: written[flag] for flag in FLAGS if flag in written}
            tokenizer.init_kwargs.update(flags)  # of which transformers keeps none
            check_tokenizer(tokenizer)
    return _load_model(folder, dtype=dtype or torch.float32, device_map=None), tokenizer


def _load_model(
    folder: Path, *, dtype: torch.dtype | None, device_map: str | Mapping[str, Any] | None
) -> hf.PreTrainedModel:
    if device_map is not None:
        need_accelerate("`device_map`")
    _check_labels(folder)
    with quiet():
        config = _config_of(folder)
        stored = dtype or (None if is_packed(config) else stored_dtype(folder))
        auto = auto_class(config, folder)
        check_size(config, auto, [n for _, n in stored_sizes(folder)], folder)
        settings: dict[str, Any] = {"dtype": stored or "auto", "device_map": device_map}
        return _from_pretrained(auto, folder, settings)


def _config_of(folder: Path) -> hf.PreTrainedConfig:
    """Read a folder's configuration, which must be of plain or packed weights."""
    with broken_as(f"model folder {str(folder)!r}"):
        config: hf.PreTrainedConfig = hf.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    _refuse_quantised(config, folder)
    return config


@contextlib.contextmanager
def quiet(*, catch_stderr: bool = False) -> Iterator[None]:
    """Silence transformers' warnings and, off a terminal, every progress bar; restore both after.

    With ``catch_stderr``, bars that ignore transformers' switch are caught as well.
    """
    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hub_bars = not hub_utils.are_progress_bars_disabled()
    terminal = on_terminal(sys.stderr)
    with contextlib.ExitStack() as stack:
        stack.callback(_switch_bars, bars, hub_bars)
        stack.callback(hf_logging.set_verbosity, verbosity)
        hf_logging.set_verbosity(logging.CRITICAL)
        if not terminal:
            _switch_bars(False, False)
            if catch_stderr:
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Send to nowhere what is written past Python, as the tokenizers library does it.

    Both standard streams of the process, for the time of the block; closed ones stay closed.
    """
    kept: dict[int, int] = {}
    for number in (1, 2):
        with contextlib.suppress(OSError):
            kept[number] = os.dup(number)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in kept:
            os.dup2(nowhere, number)
        yield
    finally:
        for number, before in kept.items():
            os.dup2(before, number)
            os.close(before)
        os.close(nowhere)


def _switch_bars(bars: bool, hub_bars: bool) -> None:
    with warnings.catch_warnings():  # the hub warns where an environment variable fixed the choice
        warnings.simplefilter("ignore", UserWarning)
        (hf_logging.enable_progress_bar if bars else hf_logging.disable_progress_bar)()
        (hub_utils.enable_progress_bars if hub_bars else hub_utils.disable_progress_bars)()


@contextlib.contextmanager
def broken_as(what: str, *, verb: str = "loaded") -> Iterator[None]:
    """Turn whatever libraries raise over broken files into one line about ``what``.

    What the package raises that opened the block stays itself, but for errors about a file or its
    content. Nothing is unpickled inside the block.
    """
    try:
        with no_pickles(what):
            yield
    except EntangleError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise MemoryLimit(
            f"memory ran out: {what} cannot be {verb}; use dtype=bfloat16, a device_map, or a "
            "smaller model."
        ) from error
    except BaseException as error:
        if not isinstance(error, _OWN) and not _is_of_a_library(error):
            raise
        raise InvalidInput(f"{what} cannot be {verb}: {_first_line(error)}") from error


def _is_of_a_library(error: BaseException) -> bool:
    """Tell whether an error was raised by another package than the one whose block it left."""
    if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
        return False  # Ctrl-C, the end of the program
    packages = [
        str(frame.f_globals.get("__name__")).partition(".")[0]
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    block = packages[1:2]  # after the context manager's own
    return packages[-1:] != block


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])[:300] if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def need_accelerate(what: str) -> None:
    """Raise `InvalidInput` if accelerate, which ``what`` needs, is not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise InvalidInput(
            f"{what} needs the package accelerate; `pip install accelerate` adds it."
        )


def auto_class(config: hf.PreTrainedConfig, source: Path) -> Any:
    """Choose causal language model or plain encoder; refuse what token ids alone cannot run."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise InvalidInput(
            f"model {str(source)!r} must be a decoder or an encoder; {kind} is an encoder-decoder: "
            "load its encoder or decoder yourself and pass the module."
        )
    masked = type(config) in hf.MODEL_FOR_MASKED_LM_MAPPING
    decoder = not masked or getattr(config, "is_decoder", False)
    causal = decoder and type(config) in hf.MODEL_FOR_CAUSAL_LM_MAPPING
    return hf.AutoModelForCausalLM if causal else hf.AutoModel


def check_size(config: hf.PreTrainedConfig, auto: Any, stored: Sequence[int], source: Path) -> None:
    """Refuse a config that asks for far more than is stored, before memory is taken for it.

    Parameters
    ----------
    config
        Of the model.
    auto
        The class that builds it.
    stored
        Number of values of every stored tensor.
    source
        Folder or file, for the message.

    Raises
    ------
    InvalidInput
        If there are more layers than tensors, or many times as many values as stored.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(stored):
        raise InvalidInput(
            f"model {str(source)!r} must hold every weight its config asks for; it asks for "
            f"{layers:,} layers, and {len(stored):,} tensors are stored: check config.json."
        )
    with broken_as(f"model {str(source)!r}"), torch.device("meta"):
        empty = auto.from_config(config, trust_remote_code=False)
    asked = sum(one.numel() for one in (*empty.parameters(), *empty.buffers()))
    if asked > ROOM + _MOST * sum(stored):
        raise InvalidInput(
            f"model {str(source)!r} must hold every weight its config asks for; it asks for "
            f"{asked:,} values, and {sum(stored):,} are stored: check config.json."
        )


def _check_labels(folder: Path) -> None:
    """Refuse a number of labels so large that transformers, naming each, would fill the memory."""
    try:
        config = read_object(folder / "config.json", remedy="copy it again")
    except (InvalidInput, Unavailable):  # what is wrong with a config, its loading tells
        return
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for asked in (part.get("num_labels") for part in parts):
        if isinstance(asked, int) and asked > LABELS:
            raise InvalidInput(
                f"`num_labels` of {str(folder / 'config.json')!r} must be at most {LABELS:,}; got "
                f"{shown(asked)}: check config.json."
            )


def is_packed(config: hf.PreTrainedConfig) -> bool:
    """Tell whether a config is of a model with packed experts (`entangle.packed`)."""
    settings: Any = getattr(config, "quantization_config", None)
    values = settings.to_dict() if hasattr(settings, "to_dict") else settings
    return isinstance(values, dict) and values.get("quant_method") == huggingface.METHOD


def _refuse_quantised(config: hf.PreTrainedConfig, folder: Path) -> None:
    settings = getattr(config, "quantization_config", None)
    if settings is not None and not is_packed(config):
        values = settings if isinstance(settings, dict) else settings.to_dict()
        raise InvalidInput(
            f"model {str(folder)!r} must hold plain weights; they are quantised with "
            f"{values.get('quant_method', 'an unknown method')}: use the unquantised model or a "
            ".gguf file."
        )


def _from_pretrained(auto: Any, folder: Path, settings: dict[str, Any]) -> hf.PreTrainedModel:
    settings = {
        **settings,
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # reported below, by name
        "adapter_kwargs": NO_ADAPTER,
    }
    with torch.random.fork_rng(devices=[]), broken_as(f"model folder {str(folder)!r}"):
        model, report = auto.from_pretrained(folder, **settings)
        missing = report["missing_keys"]
        if missing and all(name.startswith("pooler.") for name in missing):
            # an encoder stored without its pooler, which would be drawn at random
            model, report = auto.from_pretrained(folder, add_pooling_layer=False, **settings)
    check_complete(report, folder)
    loaded: hf.PreTrainedModel = model
    return loaded


def check_complete(report: Mapping[str, Any], source: Path) -> None:
    """Raise `InvalidInput` if transformers reports weights that are missing or of another shape."""
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise InvalidInput(
            f"model {str(source)!r} must hold weights of the shapes its config asks for; "
            f"{name!r} is {tuple(stored)}, not {tuple(wanted)}: check config.json."
        )
    if missing := sorted(report["missing_keys"]):
        raise InvalidInput(
            f"model {str(source)!r} must hold every weight its config asks for; {len(missing)} are "
            f"missing, for example {missing[0]!r}: check config.json and copy all weight files."
        )


def tokenizer_of(folder: Path) -> hf.PreTrainedTokenizerBase | None:
    """Return the tokenizer of a folder, None where it has none."""
    if not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        return None
    try:
        with quiet(), unheard(), no_pickles("it"):
            tokenizer: hf.PreTrainedTokenizerBase = hf.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            if not isinstance(tokenizer, hf.PreTrainedTokenizerBase):
                raise TypeError(f"{type(tokenizer).__name__} is none")
            check_tokenizer(tokenizer)
    except BaseException as error:  # the tokenizers library raises the bare class, and panics
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        raise InvalidInput(
            f"the tokenizer of model folder {str(folder)!r} cannot be loaded "
            f"({_first_line(error)}); copy its files again, or remove them all to work with "
            "token ids only."
        ) from error
    return tokenizer


def check_tokenizer(tokenizer: hf.PreTrainedTokenizerBase) -> None:
    """Use a tokenizer once, so that settings which it cannot use are told of at once.

    Raises
    ------
    Exception
        Whatever the libraries raise.
    """
    tokenizer("a", add_special_tokens=False)
    tokenizer(["", "a"])
    tokenizer.get_vocab()
    tokenizer.convert_ids_to_tokens(tokenizer.all_special_ids)
