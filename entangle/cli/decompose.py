"""``entangle decompose``: what sparse experts make of a layer's neurons."""

import argparse
from typing import TYPE_CHECKING

from entangle.cli import options
from entangle.cli.tables import Table, present, records
from entangle.doors import with_installed
from entangle.errors import InvalidInput

if TYPE_CHECKING:
    from entangle.results.decomposition import Decomposition


TABLES = ("neurons", "modes", "separated")


def add_parser(subparsers: options.Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "decompose",
        help="decompose neurons into sparse experts; modes and separated tokens",
        description="Prune all neurons of a layer inside 1, 2, 4, ... routed experts, compare "
        "their outputs with the dense ones, and tell which tokens make up the modes of some.",
    )
    options.add_model_options(parser)
    options.add_layer_options(parser)
    options.add_calibration_options(parser)
    group = parser.add_argument_group("decomposition")
    group.add_argument(
        "--neurons",
        metavar="LIST",
        help="neurons to look at closely, for example 3,17 (default: the 3 of largest WD and the "
        "typical one of every layer)",
    )
    group.add_argument("--experts", default="1,2,4,8,16", help="(default: %(default)s)")
    group.add_argument("--sparsity", type=float, default=0.9, help="(default: %(default)s)")
    group.add_argument(
        "--pruner",
        default="sparsegpt",
        choices=with_installed("pruners", ("sparsegpt", "wanda", "magnitude", "random")),
        help="how experts are pruned (default: %(default)s)",
    )
    group.add_argument(
        "--router", default="kmeans", choices=with_installed("routers", ("kmeans", "random")),
        help="kmeans, or the control: clusters without meaning (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--contexts", type=int, default=8, help="examples of a mode (default: %(default)s)"
    )
    group.add_argument(
        "--token-pairs",
        type=int,
        default=2000,
        help="random pairs of tokens kept (default: %(default)s)",
    )
    group.add_argument(
        "--separated", type=int, default=20,
        help="pairs of tokens that a neuron separates most (default: %(default)s)",
    )  # fmt: skip
    options.add_memory_option(group)
    options.add_run_options(parser, *TABLES)
    options.add_dry_run_option(parser)
    parser.set_defaults(run=run, show=show)


def run(arguments: argparse.Namespace) -> None:
    """Decompose, save and print."""
    from entangle.checks import share
    from entangle.runs.provenance import check_output
    from entangle.seeding import check_seed

    check_seed(arguments.seed)
    if arguments.layer is None:
        raise InvalidInput(
            "`--layer` must name what to decompose, such as a block index with --proj; got none."
        )
    experts = options.numbers(arguments.experts, int)
    neurons = None if arguments.neurons is None else options.numbers(arguments.neurons, int)
    memory = options.parse_memory(arguments.memory)
    share("--sparsity", arguments.sparsity)
    check_output(arguments.out, force=arguments.force)
    from entangle.models.layers import find_layers
    from entangle.modes.decompose import decompose

    model = options.load_model(arguments)
    layers = options.chosen_layers(arguments, None)
    find_layers(model.module, layers["layers"], layers["proj"])
    found = decompose(
        model,
        options.load_calibration(arguments, model),
        **layers,
        neurons=neurons,
        experts=experts,
        sparsity=arguments.sparsity,
        pruner=arguments.pruner,
        router=arguments.router,
        contexts=arguments.contexts,
        token_pairs=arguments.token_pairs,
        separated=arguments.separated,
        seed=arguments.seed,
        memory=memory,
        progress=not arguments.quiet,
    )
    found.save(arguments.out, force=arguments.force)
    print_decomposition(found, arguments)


def show(arguments: argparse.Namespace) -> None:
    """Print the decomposition that was made before."""
    from entangle.results.decomposition import load_decomposition

    print_decomposition(load_decomposition(arguments.out), arguments)


def print_decomposition(found: "Decomposition", arguments: argparse.Namespace) -> None:
    """Print the chosen neurons, and where the result went."""
    table = found.summary()
    improvements = {f"ri_{k}": f"RI k={k}" for k in found.neurons["experts"].unique().tolist()}
    most = max(found.neurons["experts"])
    change = f"weighted WD, k={most}"
    shown = table.rename(columns={**improvements, "weighted_wd_change": change})
    sparsity = found.neurons["sparsity"].iloc[0]
    title = f"Neurons pruned to {sparsity:.0%} inside k experts (RI: RMSE of one expert / of k)"
    formats = {"wd": ".4f", change: "+.0%", **dict.fromkeys(improvements.values(), ".3f")}
    content = {
        "out": arguments.out,
        "manifest": dict(found.manifest),
        "neurons": records(table),
        "modes": records(found.modes),
        "separated": records(found.separated),
    }
    tables = [
        Table(
            "neurons", table, title, formats, keys=("layer", "neuron"), shown=shown,
            optional=(change, *improvements.values()),
        ),
        *_details(found, arguments),
    ]  # fmt: skip
    present(arguments, tables, content, out=arguments.out)


def _details(found: "Decomposition", arguments: argparse.Namespace) -> list[Table]:
    """Return the tables that are printed where they are asked for."""
    if not (arguments.csv or arguments.table):
        return []
    keys = ("layer", "neuron")
    return [
        Table("modes", found.modes, "Modes of the chosen neurons", keys=(*keys, "mode")),
        Table("separated", found.separated, "Near in the input, far in the output", keys=keys),
    ]
