"""Options that several commands share."""

import argparse
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from entangle.errors import InvalidInput
from entangle.runs.progress import tell
from entangle.runs.provenance import POLICIES
from entangle.texts import N_SEQ, SEQ_LEN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from entangle.allocation import Allocation
    from entangle.evaluation import EvaluationText
    from entangle.evaluation.perplexity import AffixEffect
    from entangle.models.loading import LanguageModel
    from entangle.texts.calibration_set import CalibrationSet


Number = TypeVar("Number", int, float)

Subparsers = Any
"""What ``ArgumentParser.add_subparsers`` returns, which has no public type."""

AUTO = "auto"
"""As a size of memory: half of what is free."""

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and how to load it."""
    parser.add_argument(
        "model",
        nargs="?",
        default="demo",
        metavar="MODEL",
        help="hub id, local folder, local .gguf file, or demo (default: demo)",
    )
    add_loading_options(parser.add_argument_group("model"))


def add_loading_options(group: argparse._ArgumentGroup) -> None:
    """Add how to load the model."""
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group.add_argument(
        "--dtype",
        default="auto",
        help="auto, float32, bfloat16 or float16 (default: auto, the dtype it is stored in)",
    )
    group.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
    )
    group.add_argument("--device-map", help="spread over devices, for example auto")
    group.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, default=None,
        help="bring a folder's or hub model's weights block by block from the disk, or hold them "
        "all; the results are the same (default: hold them if they fit into free memory)",
    )  # fmt: skip


def load_model(arguments: argparse.Namespace) -> "LanguageModel":
    """Load the model that the options name."""
    from entangle.models.loading import load_model

    return load_model(
        arguments.model,
        revision=arguments.revision,
        dtype=arguments.dtype,
        device=arguments.device,
        device_map=arguments.device_map,
        stream=arguments.stream,
        memory=parse_memory(getattr(arguments, "memory", AUTO)),
    )


def add_layer_options(parser: argparse.ArgumentParser) -> None:
    """Add which layers to take."""
    group = parser.add_argument_group("layers")
    group.add_argument(
        "--layer",
        action=_Several,
        metavar="LAYER",
        help="block index, full name, glob, or all; several may be joined by commas, or given one "
        "after the other (default: all)",
    )
    group.add_argument(
        "--proj",
        action=_Several,
        metavar="NAME",
        help="take only these projections: gate_proj, mlp.c_fc, mlp for the feed-forward part, or "
        "attn for the attention part; several as for --layer (default: mlp of blocks and of all; "
        "layers that are named are taken as they are)",
    )


class _Several(argparse.Action):
    """Gathers what an option is given, at once or several times, in one list."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        before = getattr(namespace, self.dest) or []
        parts = re.split(r",(?![^\[]*\])", str(values))  # a glob may hold [0,2]
        setattr(namespace, self.dest, [*before, *(part.strip() for part in parts)])


class _Joined(argparse.Action):
    """Joins what an option is given several times by commas."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is None else f"{before},{values}")


def add_allocation_option(group: argparse._ActionsContainer, *, text: str) -> None:
    """Add the file of an allocation, or of several, joined by commas."""
    group.add_argument("--allocation", action=_Joined, metavar="FILE", help=text)


def load_allocations(arguments: argparse.Namespace) -> "list[tuple[str, Allocation]]":
    """Load the allocations of a comma-separated option, each ``FILE`` or ``NAME=FILE``.

    Without a name they are called as their files.
    """
    if arguments.allocation is None:
        return []
    from pathlib import Path

    from entangle.allocation import load_allocation

    found = []
    for part in names(arguments.allocation):
        name, separator, path = (piece.strip() for piece in part.partition("="))
        if not separator:
            name, path = Path(part).stem, part
        found.append((name, load_allocation(path)))
    return found


def load_allocation(arguments: argparse.Namespace) -> "Allocation | None":
    """Load the one allocation that the option names, None without it."""
    found = load_allocations(arguments)
    if len(found) > 1:
        raise InvalidInput(f"--allocation must name one file here; got {arguments.allocation!r}.")
    return found[0][1] if found else None


def chosen_layers(arguments: argparse.Namespace, allocation: "Allocation | None") -> dict[str, Any]:
    """Return ``layers`` and ``proj``: by default the allocation's, or without one all of the MLP.

    An allocation's layers are narrowed by neither option alone.
    """
    from entangle.models.layers import DEFAULT_PROJ

    if allocation is not None and arguments.layer is None and arguments.proj is None:
        return {"layers": list(allocation.zeros), "proj": None}
    return {"layers": arguments.layer or "all", "proj": arguments.proj or DEFAULT_PROJ}


def add_calibration_options(parser: argparse.ArgumentParser, *, holds_back: bool = False) -> None:
    """Add where the text comes from and how it is cut.

    A command that fits weights ``holds_back`` the demo's ``test`` articles for evaluation.
    """
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        default="demo",
        metavar="SOURCE",
        help="demo, wikitext2, c4, a data set's hub id, or a path: .txt, .jsonl, .parquet, a "
        "folder of them, or token ids in .safetensors (default: demo)",
    )
    group.add_argument("--calibration-config", help="configuration of a hub data set")
    articles = "train, which leaves the test articles out," if holds_back else "all articles"
    group.add_argument(
        "--split", help=f"split of a hub data set, or of demo: train or test (default: {articles} "
        "of demo)"
    )  # fmt: skip
    group.add_argument("--column", help="column that holds the text")
    group.add_argument(
        "--n-seq",
        type=int,
        help=f"number of sequences (default: {N_SEQ}, or all of a table of token ids)",
    )
    group.add_argument(
        "--seq-len",
        type=int,
        help=f"tokens in a sequence (default: {SEQ_LEN}, or the model's context if shorter, or all "
        "columns of a table of token ids)",
    )
    group.add_argument(
        "--sampling",
        default="random",
        choices=("random", "contiguous"),
        help="random: windows drawn with the seed; contiguous: the first tokens of the text "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--join", default="\\n\\n", help="put between documents; \\n, \\t and \\\\ are understood "
        "(default: %(default)s)"
    )  # fmt: skip
    add_special_tokens_option(group)
    parser.set_defaults(demo_split="train" if holds_back else None)


def add_special_tokens_option(group: argparse._ActionsContainer) -> None:
    """Add which special tokens stand around sequences and windows."""
    group.add_argument(
        "--special-tokens",
        nargs="?",
        const="model",
        choices=POLICIES,
        help="around every sequence and window: model, as the model's tokenizer puts them around "
        "a text; none; or published, once around the whole text, as the SparseGPT code "
        "(default: model)",
    )


def special_tokens(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the policy of special tokens if one was asked for."""
    asked = arguments.special_tokens
    return {} if asked is None else {"special_tokens": asked}


RENAMED: "Mapping[str, Mapping[str, str]]" = {
    "": {
        "--data": "--evaluation", "--data-config": "--evaluation-config",
        "--data-split": "--evaluation-split", "--data-column": "--evaluation-column",
    },
    "evaluate": {
        "--split": "--evaluation-split",
        "--column": "--evaluation-column", "--seq-len": "--eval-seq-len",
        "--n-windows": "--eval-windows",
    },
    "expand": {"--evaluate": "--evaluation"},
    "decompose": {"--pairs": "--token-pairs"},
    "allocate": {"--strength": "--spread"},
    "figures": {"--column": "--width"},
}  # fmt: skip
"""Names of options in the version before, and today's; by command, "" of all."""


def spell_out(argv: "Sequence[str]") -> list[str]:
    """Return the arguments by today's names, ``--special-tokens`` alone as ``…=model``.

    What follows ``--special-tokens`` may be MODEL, which is no policy. Old names are told of.
    """
    flag, shortest = "--special-tokens", len("--spe")
    old = {**RENAMED[""], **RENAMED.get(argv[0] if argv else "", {})}
    found = []
    for one, after in pairwise([*argv, ""]):
        option, separator, value = one.partition("=")
        if option in old:
            tell(f"note: {option} is now {old[option]}; the old name goes with the next release")
            one = f"{old[option]}{separator}{value}"
        elif flag.startswith(one) and len(one) >= shortest and after not in POLICIES:
            one = f"{flag}=model"
        found.append(one)
    return found


def tell_special_tokens(
    arguments: argparse.Namespace, model: "LanguageModel", text: "CalibrationSet | EvaluationText"
) -> "AffixEffect | None":
    """Say so where special tokens matter much to the model; return how much."""
    from entangle.evaluation.perplexity import affix_effect, tell
    from entangle.models.streaming import comes_by_blocks
    from entangle.runs.progress import tell as tell_line

    if comes_by_blocks(model.module):
        if not arguments.quiet:  # it would take a pass over all shards of its own
            tell_line("how much special tokens matter is not measured of a streamed model")
        return None
    effect = affix_effect(model, text.rows.sequence(0), text.settings)
    if not arguments.quiet:
        tell(effect)
    return effect


def load_calibration(arguments: argparse.Namespace, model: "LanguageModel") -> "CalibrationSet":
    """Build the calibration set that the options describe, fitted to the model."""
    from entangle.texts.calibration import load_calibration
    from entangle.texts.documents import interpret_escapes

    if _is_table(arguments.calibration) and "sampling" in arguments.given:
        raise InvalidInput(
            "--sampling has no meaning for a table of token ids, whose first rows are taken; drop "
            "it."
        )
    unnamed = arguments.calibration == "demo" and arguments.split is None
    return load_calibration(
        arguments.calibration,
        model.tokenizer,
        n_seq=arguments.n_seq,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        sampling=arguments.sampling,
        join=interpret_escapes(arguments.join),
        split=arguments.demo_split if unnamed else arguments.split,
        config=arguments.calibration_config,
        column=arguments.column,
        **special_tokens(arguments),
        context_length=model.context_length,
        vocab_size=model.vocab_size,
    )


def add_evaluation_options(group: argparse._ActionsContainer, *, default: str | None) -> None:
    """Add the text to evaluate on, and how it is read and cut.

    Parameters
    ----------
    group
        Where the options go.
    default
        The source without the option, in words; "" if it must be given, None if nothing is
        evaluated without it.
    """
    said = {"": "", None: " (default: nothing is evaluated)"}.get(default, f" (default: {default})")
    group.add_argument(
        "--evaluation", required=default == "", metavar="SOURCE",
        help=f"text to evaluate on: a name, an id or a path, as for --calibration{said}",
    )  # fmt: skip
    group.add_argument("--evaluation-config", help="configuration of a hub data set")
    group.add_argument(
        "--evaluation-split",
        help="split of a hub data set, or of demo (default: test; c4 has only validation)",
    )
    group.add_argument("--evaluation-column", help="column that holds the text")
    group.add_argument(
        "--eval-seq-len", type=int,
        help="tokens in a window (default: 2048, or the model's context if shorter, or all columns "
        "of a table of token ids)",
    )  # fmt: skip
    group.add_argument(
        "--eval-windows", type=int, help="take only the first windows (default: all of the text)"
    )


def load_evaluation(
    arguments: argparse.Namespace, model: "LanguageModel", *, join: str = "\n\n"
) -> "EvaluationText":
    """Load the text that the evaluation options say, fitted to the model; ``join`` as it is."""
    from entangle.evaluation import load_evaluation

    return load_evaluation(
        arguments.evaluation,
        model.tokenizer,
        seq_len=arguments.eval_seq_len,
        n_windows=arguments.eval_windows,
        split=arguments.evaluation_split,
        config=arguments.evaluation_config,
        column=arguments.evaluation_column,
        join=join,
        **special_tokens(arguments),
        context_length=model.context_length,
        vocab_size=model.vocab_size,
    )


def _is_table(source: str) -> bool:
    """Tell whether a source is a table of token ids, which has sizes of its own."""
    if not source.lower().endswith(".safetensors"):
        return False
    from pathlib import Path

    from entangle.texts.token_files import read_token_file

    path = Path(source).expanduser()
    return not path.is_file() or read_token_file(path).ids.ndim == 2


def add_storage_options(group: argparse._ActionsContainer) -> None:
    """Add how experts are stored."""
    group.add_argument(
        "--format", default="bitmap", choices=("bitmap", "delta", "n16"),
        help="how experts are stored: bitmap; delta, as exact and faster on GPUs, slow on CPUs; or "
        "n16 for a --pattern of n of 16 weights, such as 5:16, the fastest (default: bitmap)",
    )  # fmt: skip
    group.add_argument(
        "--values", choices=("bfloat16", "float16", "float32"),
        help="dtype of the stored values (default: the model's; with --bits up to 8 the codes of 4 "
        "or 8 bits)",
    )  # fmt: skip


def add_table_options(parser: argparse.ArgumentParser, *tables: str) -> None:
    """Add in which format `entangle.cli.tables.present` prints the tables of these names."""
    group = parser.add_argument_group("printed")
    formats = group.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="print JSON instead of tables")
    formats.add_argument(
        "--csv", action="store_true", help="print one table as CSV, all columns, numbers in full"
    )
    formats.add_argument("--latex", action="store_true", help="print tables for LaTeX (booktabs)")
    group.add_argument(
        "--wide", action="store_true", help="print all columns, however narrow the terminal is"
    )
    several = f"{', '.join(tables)} (default: all; --csv: {tables[0]})"
    group.add_argument(
        "--table", metavar="NAME",
        help=f"print only this table: {several if len(tables) > 1 else tables[0]}",
    )  # fmt: skip
    parser.set_defaults(tables=tables)


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """Add the file that options may be read from (`entangle.cli.config`)."""
    parser.add_argument(
        "--config", metavar="FILE",
        help="YAML file of options, such as n_seq: 16; those of the command line win",
    )  # fmt: skip


def add_run_options(
    parser: argparse.ArgumentParser, *tables: str, ending: str = "", file: bool = False
) -> None:
    """Add seed, output folder and the like, and how tables of these names are printed.

    Without ``--out`` the result gets a name of its own (`entangle.cli.asked`), which ends in
    ``ending``. The result is a ``file``, or else a folder. Without tables, only
    ``--json`` is there.
    """
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws (default: 0)")
    kind, metavar = ("file", "FILE") if file else ("folder", "DIR")
    named = f"runs/{parser.prog.split()[-1]}-DIGEST{ending}"
    parser.add_argument(
        "--out", metavar=metavar, help=f"write the result to this {kind} (default: {named})"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing result")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    if tables:
        add_table_options(parser, *tables)
    else:
        parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(out_ending=ending)


def add_dry_run_option(parser: argparse._ActionsContainer) -> None:
    """Add the option that tells what a run would take (`entangle.cli.dry`)."""
    parser.add_argument(
        "--dry-run", action="store_true",
        help="print tokens, passes, memory, disk and time that this will take, from a few measured "
        "seconds, and write nothing",
    )  # fmt: skip


def check_run(arguments: argparse.Namespace) -> None:
    """Check seed, ``--out``, ``--resume`` and ``--force`` before anything is loaded.

    A finished result can be resumed too: whether it is the same is known later.
    """
    from entangle.runs.provenance import check_output
    from entangle.seeding import check_seed

    check_seed(arguments.seed)
    if arguments.out is not None and not arguments.resume:
        check_output(arguments.out, force=arguments.force)


def add_memory_option(group: argparse._ArgumentGroup) -> None:
    """Add the option that bounds memory."""
    group.add_argument(
        "--memory", default=AUTO, metavar="SIZE",
        help="work memory, such as 8G (default: auto, half of what is free)",
    )  # fmt: skip


def parse_memory(text: str) -> int | None:
    """Read a size as `parse_bytes` does; None for ``auto``."""
    return None if text.strip().lower() == AUTO else parse_bytes(text)


def parse_bytes(text: str) -> int:
    """Read a size such as ``2G``, ``512M`` or ``1048576``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise InvalidInput(f"a size must look like 512M or 2G; got {text!r}.")
    return int(float(match[1]) * _UNITS[match[2]])


def names(text: str) -> list[str]:
    """Read a comma-separated list; blanks around a name do not belong to it."""
    return [part.strip() for part in text.split(",")]


def numbers(text: str, kind: type[Number]) -> list[Number]:
    """Read a comma-separated list of numbers, each once."""
    try:
        found = [kind(part) for part in names(text)]
    except ValueError:
        example = "1,16" if kind is int else "0.5,0.7"
        raise InvalidInput(f"a list must look like {example}; got {text!r}.") from None
    return list(dict.fromkeys(found))
