"""``entangle convert``: a checkpoint of an earlier version, or of another format, in today's."""

import argparse

from entangle.cli import options
from entangle.cli.tables import print_json, say


def add_parser(subparsers: options.Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "convert",
        help="write an older checkpoint of a Sparse Expansion in today's format",
        description="Write the folder of a Sparse Expansion (entangle expand --out) anew: packed, "
        "with the dense rest of the model, so that transformers loads it.",
    )
    parser.add_argument("expansion", metavar="DIR", help="folder of a Sparse Expansion")
    parser.add_argument(
        "--base", metavar="MODEL", help="its dense model, if it is not where the manifest says"
    )
    options.add_storage_options(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--out", metavar="DIR", required=True, help="the new folder")
    parser.add_argument("--force", action="store_true", help="replace an existing result")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Convert."""
    from entangle.experts.convert import convert
    from entangle.runs.provenance import check_output

    check_output(arguments.out, force=arguments.force)
    convert(
        arguments.expansion, arguments.out, base=arguments.base, format=arguments.format,
        values=arguments.values, device=arguments.device, force=arguments.force,
    )  # fmt: skip
    if arguments.json:
        print_json({"out": arguments.out})
    else:
        say(f"Saved to {arguments.out}.")
