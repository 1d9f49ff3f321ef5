"""``entangle anchor``: whether high scores mean many features, by a dictionary of inputs."""

import argparse
from typing import TYPE_CHECKING

from entangle.cli import options
from entangle.cli.tables import Table, present, records
from entangle.errors import InvalidInput

if TYPE_CHECKING:
    from entangle.results.anchor import Anchor

TABLES = ("correlations", "dictionaries", "reads")


def add_parser(subparsers: options.Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "anchor",
        help="an outside anchor: how many atoms of a dictionary a neuron reads, against its scores",
        description="Fit a dictionary of real tokens to a layer's inputs, and two controls of "
        "equal size, and tell whether neurons of high scores read more of its atoms.",
    )
    options.add_model_options(parser)
    options.add_layer_options(parser)
    options.add_calibration_options(parser)
    group = parser.add_argument_group("dictionary")
    group.add_argument(
        "--dictionary", metavar="DIR",
        help="a sparse autoencoder of these inputs instead, in the layout of SAELens or sparsify",
    )  # fmt: skip
    group.add_argument(
        "--atoms", type=int, help="atoms of a dictionary (default: twice the input's features)"
    )
    group.add_argument(
        "--active", type=int, default=40, help="atoms of an input, at most (default: %(default)s)"
    )
    group.add_argument(
        "--threshold", type=float, default=0.3,
        help="share of its squared length that a token must lose to become an atom "
        "(default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--controls", default="weight_norm,variance", metavar="LIST",
        help="scores held fixed in the partial correlations (default: %(default)s)",
    )  # fmt: skip
    options.add_memory_option(group)
    options.add_run_options(parser, *TABLES)
    parser.set_defaults(run=run, show=show)


def run(arguments: argparse.Namespace) -> None:
    """Fit, measure, save and print."""
    from entangle.runs.provenance import check_output
    from entangle.seeding import check_seed

    check_seed(arguments.seed)
    if arguments.layer is None:
        raise InvalidInput(
            "`--layer` must name what to anchor, such as a block index with --proj; got none."
        )
    memory = options.parse_memory(arguments.memory)
    check_output(arguments.out, force=arguments.force)
    from entangle.experiments.anchor import anchor
    from entangle.models.layers import find_layers

    model = options.load_model(arguments)
    layers = options.chosen_layers(arguments, None)
    find_layers(model.module, layers["layers"], layers["proj"])
    found = anchor(
        model,
        options.load_calibration(arguments, model),
        **layers,
        dictionary=arguments.dictionary,
        atoms=arguments.atoms,
        active=arguments.active,
        threshold=arguments.threshold,
        controls=options.names(arguments.controls),
        seed=arguments.seed,
        memory=memory,
        progress=not arguments.quiet,
    )
    found.save(arguments.out, force=arguments.force)
    print_anchor(found, arguments)


def show(arguments: argparse.Namespace) -> None:
    """Print the anchor that was made before."""
    from entangle.results.anchor import load_anchor

    print_anchor(load_anchor(arguments.out), arguments)


def print_anchor(found: "Anchor", arguments: argparse.Namespace) -> None:
    """Print the correlations, and what dictionaries miss."""
    table = found.summary()
    content = {
        "out": arguments.out,
        "manifest": dict(found.manifest),
        "correlations": records(table),
        "dictionaries": records(found.dictionaries),
        "reads": records(found.reads),
    }
    ends = ("spearman", "partial")
    formats = {f"{name}{end}": "+.2f" for name in ends for end in ("", "_low", "_high")}
    tables = [
        Table(
            "correlations", table,
            "Rank correlation with the number of atoms read (95 % intervals)",
            {**formats, "unexplained": ".0%"}, keys=("dictionary", "predictor"),
        ),
        Table(
            "dictionaries", found.dictionaries, "Dictionaries",
            {"active": ".1f", "unexplained": ".1%"}, keys=("layer", "dictionary"),
        ),
        Table(
            "reads", found.reads, "What neurons of high WD read most", {"wd": ".3f",
            "share": ".1%"}, keys=("layer", "neuron", "rank"), optional=("before", "after", "atom"),
        ),
    ]  # fmt: skip
    present(arguments, tables, content, out=arguments.out)
