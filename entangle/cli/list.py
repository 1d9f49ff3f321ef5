"""``entangle list``: what can be chosen by name, ours and what installed packages bring."""

import argparse

from entangle.cli.options import Subparsers, add_table_options
from entangle.cli.tables import Table, present, records
from entangle.doors import KINDS

DOORS = KINDS


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "list",
        help="list pruners, routers, rules, methods, columns and measures, with their sources",
        description="List what --pruner, --router, --rule, --methods, --by and --measure take: "
        "ours, and what installed packages bring by entry points of the groups entangle.KIND.",
    )
    parser.add_argument(
        "door",
        metavar="KIND",
        nargs="?",
        choices=DOORS,
        help=f"only these: {', '.join(DOORS[:-1])} or {DOORS[-1]} (default: all)",
    )
    add_table_options(parser, "plugins")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """List them."""
    import pandas as pd

    from entangle.activation import ACTIVATION_METHODS
    from entangle.allocation.rules import RULES
    from entangle.evaluation.measures import MEASURES
    from entangle.experts.router import ROUTERS
    from entangle.mixtures import MIXTURE_METHODS
    from entangle.pruning import PRUNERS
    from entangle.scoring.columns import COLUMNS

    doors = (PRUNERS, ROUTERS, RULES, ACTIVATION_METHODS, MIXTURE_METHODS, COLUMNS, MEASURES)
    rows = [
        (one.door, one.name, one.source)
        for door in doors
        if arguments.door in (None, door.kind)
        for one in door.listed()
    ]
    frame = pd.DataFrame(rows, columns=["kind", "name", "source"])
    table = Table("plugins", frame, "What can be chosen by name", keys=("kind", "name"))
    present(arguments, [table], records(frame))
