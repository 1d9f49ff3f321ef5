"""``entangle trace``: WD, MD, top rows and their damage over a model's revisions."""

import argparse
from typing import TYPE_CHECKING

from entangle.cli import options
from entangle.cli.study import SIZES, default_texts, loaded
from entangle.cli.tables import Table, present, records
from entangle.errors import InvalidInput

if TYPE_CHECKING:
    from entangle.results.study import Trace

TABLES = ("trace", "layers")
_NUMBERS = (
    "step", "perplexity", "wd_median", "wd_top", "wd_largest", "md_median", "wd_md", "overlap",
    "chance", "ratio", "ratio_low", "ratio_high", "damage", "damage_random", "null_floor",
)  # fmt: skip
FORMATS = dict.fromkeys(_NUMBERS, ".4g")


def add_parser(subparsers: options.Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "trace",
        help="follow WD, MD, top rows and their damage over a model's revisions",
        description="Score every revision of a model on the same tokens, compare its top rows with "
        "those of the last, and prune them beside random ones.",
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL",
        help="a hub id, or a folder of checkpoints; or several models, the last one compared with",
    )  # fmt: skip
    parser.add_argument(
        "--revisions", metavar="LIST",
        help="comma-separated revisions of the hub model, or subfolders of the folder, in order "
        "(default: all subfolders that hold a model, by the number in their names, others last)",
    )  # fmt: skip
    options.add_loading_options(parser.add_argument_group("model"))
    options.add_calibration_options(parser, holds_back=True)
    group = parser.add_argument_group("trace")
    group.add_argument(
        "--size", default="small", choices=SIZES,
        help="of the texts, as in `entangle study` (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--seeds", type=int, default=5, help="draws of random rows (default: 5)")
    options.add_evaluation_options(group, default="demo, the articles that are not calibrated on")
    options.add_memory_option(group)
    group.add_argument("--resume", action="store_true", help="go on with an unfinished trace")
    options.add_dry_run_option(group)
    options.add_run_options(parser, *TABLES)
    parser.set_defaults(run=run, show=show)


def run(arguments: argparse.Namespace) -> None:
    """Trace, print and save."""
    from entangle.studies.subject import SIZES as KNOWN
    from entangle.studies.trace import revisions_of, trace

    options.check_run(arguments)
    memory = options.parse_memory(arguments.memory)
    revisions = () if arguments.revisions is None else options.names(arguments.revisions)
    revisions_of(arguments.models, revisions)  # checked before anything is loaded
    default_texts(arguments, KNOWN[arguments.size])
    found = trace(
        arguments.models, out=arguments.out, revisions=revisions, size=arguments.size,
        calibration=arguments.calibration, evaluation=arguments.evaluation, seeds=arguments.seeds,
        seed=arguments.seed, memory=memory, resume=arguments.resume, force=arguments.force,
        progress=not arguments.quiet, loaded=loaded(arguments),
    )  # fmt: skip
    print_trace(found, arguments)


def show(arguments: argparse.Namespace) -> None:
    """Print the trace that was made before."""
    from entangle.results import load_result
    from entangle.results.study import Trace

    found = load_result(arguments.out)
    if not isinstance(found, Trace):
        raise InvalidInput(f"{arguments.out!r} holds no trace; got a {found.KIND}.")
    print_trace(found, arguments)


def print_trace(found: "Trace", arguments: argparse.Namespace) -> None:
    """Print a row a revision."""
    content = {"out": arguments.out, "manifest": dict(found.manifest),
               "trace": records(found.frame), "layers": records(found.layers)}  # fmt: skip
    tables = [Table("trace", found.frame, "Revisions", FORMATS, keys=("revision", "ratio"),
                    optional=("place", "chance", "wd_md", "ratio_low", "ratio_high"))]  # fmt: skip
    if arguments.csv or arguments.table:
        tables.append(Table("layers", found.layers, "Layers", FORMATS, keys=("revision", "layer")))
    present(arguments, tables, content, out=arguments.out)
