"""What is wrong with a command's arguments, as far as it can be told before torch is imported.

Loading torch and transformers takes seconds; a mistyped path or number is told without them. The
sentences are those of the functions that take the settings, which check them again.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from entangle.calibration.texts import as_path, existing, interpret_escapes
from entangle.checks import choice, share, shares, whole, wholes
from entangle.cli.meaning import check_meaning
from entangle.cli.options import names, numbers, parse_memory
from entangle.errors import InvalidInput
from entangle.memory import check_memory
from entangle.models import hub
from entangle.models.sources import check_settings, model_source
from entangle.provenance import check_output, expanded, read_manifest
from entangle.seeding import check_seed

LEAST: Mapping[str, int] = {
    "batch_size": 1, "count": 1, "eval_seq_len": 2, "eval_windows": 1, "n_seq": 1, "n_windows": 1,
    "pairs_per_paradigm": 1, "seeds": 1, "seq_len": 1, "evaluations": 2,
}  # fmt: skip
"""Options that are whole numbers, and the least of each."""
NAMES: Mapping[str, tuple[str, Sequence[str]]] = {
    "intervention": ("intervention", (
        "prune", "prune-wanda", "prune-magnitude", "prune-random",
        "zero", "mean", "clamp-negative", "clamp-positive", "flip-negative",
    )),
    "methods": ("method", ("magnitude", "wanda", "sparsegpt", "expansion", "expansion-random")),
    "router": ("router", ("kmeans", "random")),
    "measure": ("measure", ("perplexity", "divergence", "blimp")),
}  # fmt: skip
"""Options that are lists of names: what one is called in a message, and those that exist."""
SELECTIONS = ("top", "bottom", "random", "random-norm", "random-variance", "all")
COLUMNS = (
    "block", "neuron", "wd", "wd_se", "wd_bound", "ks", "mean", "std", "skewness",
    "excess_kurtosis", "weight_norm", "md", "n_tokens", "variance", "abs_mean", "abs_skewness",
)  # fmt: skip
RULES = (
    "uniform", "layer", "protect", "linear", "rank", "owl", "alphapruning", "trim", "neuroal",
    "neuroal-blocks", "loss", "depth", "sensitivity", "search",
)  # fmt: skip


def check_arguments(arguments: argparse.Namespace) -> None:
    """Check model, texts, numbers and names of any command's arguments; import nothing heavy.

    Raises
    ------
    InvalidInput, UnknownName, Unavailable
        As the functions do that take them.
    """
    given = vars(arguments)
    _check_numbers(given)
    for name, (kind, known) in NAMES.items():
        for one in names(given[name]) if isinstance(given.get(name), str) else ():
            choice(name, one, known, kind=kind)
    _check_selections(given)
    check_meaning(arguments)
    _check_files(given)
    _check_models(given)
    _check_texts(given)
    if given.get("scores") is not None:
        read_manifest(given["scores"], "scores")
    for run in given.get("runs") or ():
        if not expanded(run).exists():
            read_manifest(run, "result")


def _check_numbers(given: Mapping[str, object]) -> None:
    for name, least in LEAST.items():
        if given.get(name) is not None:
            whole(name, given[name], least=least)
    if "seed" in given:
        check_seed(given["seed"])  # type: ignore[arg-type]
    fraction = given.get("fraction")
    if fraction is not None:
        share("fraction", fraction, zero=False)
    experts = given.get("experts")
    if experts is not None:
        wholes("experts", numbers(experts, int) if isinstance(experts, str) else experts, least=1)
    for option in ("sparsity", "strength", "edit_strength"):
        several = given.get(option)
        if isinstance(several, str):
            shares(option, numbers(several, float))
    sparsity = given.get("sparsity")
    if isinstance(sparsity, float):
        share("sparsity", sparsity)
    if isinstance(given.get("join"), str):
        interpret_escapes(str(given["join"]))
    memory = given.get("memory")
    if isinstance(memory, str):
        check_memory(parse_memory(memory))


def _check_selections(given: Mapping[str, object]) -> None:
    """Check what `ablate` and `allocate` choose by; files of neurons and of scores come later."""
    select, rule = given.get("select"), given.get("rule")
    for one in names(select) if isinstance(select, str) else ():
        if not one.lower().endswith((".csv", ".parquet")):
            choice("select", one, SELECTIONS, kind="selection")
    if given.get("command") == "ablate" and given.get("scores") is None:
        for one in names(str(given["by"])):
            choice("by", one, COLUMNS, kind="column")
    if isinstance(rule, str):
        choice("rule", rule, RULES, kind="allocation rule")


def _check_files(given: Mapping[str, object]) -> None:
    """Check that allocations exist, and that the result's folder does not."""
    allocation, out = given.get("allocation"), given.get("out")
    for one in names(allocation) if isinstance(allocation, str) else ():
        path = expanded(one.partition("=")[2].strip() if "=" in one else one)
        if not path.exists():
            raise InvalidInput(f"{str(path)!r} is no file; name one that allocate wrote.")
    folder = given.get("command") in ("ablate", "expand", "compare", "score", "decompose")
    if folder and isinstance(out, str) and not given.get("resume"):
        check_output(out, force=bool(given.get("force")))


def _check_models(given: Mapping[str, object]) -> None:
    for option in ("model", "base"):
        name = given.get(option)
        if not isinstance(name, str) or _is_result(name):
            continue
        source = model_source(name)
        loading = {key: given.get(key) for key in ("revision", "dtype", "device", "device_map")}
        if given.get("base") is None or option == "base":
            check_settings(source, name, **loading)  # type: ignore[arg-type]
        if source == "hub":
            hub.check_model(name)


def _is_result(name: str) -> bool:
    """Tell whether a folder is a Sparse Expansion, which stands for a model in some commands."""
    path = expanded(name)
    try:
        return (path / "manifest.json").is_file() and not (path / "config.json").is_file()
    except OSError:  # no name that the file system could hold: told with what a model may be
        return False


def _check_texts(given: Mapping[str, object]) -> None:
    for option in ("calibration", "data", "evaluate"):
        source = given.get(option)
        if not isinstance(source, str | os.PathLike):
            continue
        path = as_path(source if isinstance(source, str) else Path(source))
        if path is not None:
            existing(path)
        elif source != "demo":
            from entangle.calibration.hub import hub_request

            request = hub_request(str(source), split=None, config=None, column=None)
            hub.check_data_set(request.name)
