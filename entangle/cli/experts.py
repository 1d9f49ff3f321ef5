"""``entangle experts``: what every expert of a mixture does, and which are super experts."""

import argparse

from entangle.cli import options
from entangle.cli.tables import Table, present, records

SHOWN = 10
"""Experts in the table, unless it is asked for alone."""


def add_parser(subparsers: options.Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "experts",
        help="what every expert of a mixture does on a text, and which are super experts",
        description="Run a text once and tell of every expert of a mixture how often it is chosen, "
        "how large its outputs are, and the numbers by which methods prune experts; with --scores, "
        "whether neurons of high WD lie in super experts.",
    )
    options.add_model_options(parser)
    options.add_calibration_options(parser)
    group = parser.add_argument_group("overlap")
    group.add_argument(
        "--scores", metavar="DIR", help="scores of the model's experts, from entangle score"
    )
    group.add_argument(
        "--fraction", type=float, default=0.03,
        help="share of the neurons that are top ones by WD above its floor (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the text's sample (default: 0)")
    options.add_table_options(parser, "super", "overlap", "experts")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Gather, and print."""
    from entangle.checks import share
    from entangle.experiments.selection import check_scores_fit
    from entangle.mixtures import gather
    from entangle.mixtures.super_experts import expert_table, super_overlap
    from entangle.results.scores import load_scores

    top = share("--fraction", arguments.fraction)
    scores = None if arguments.scores is None else load_scores(arguments.scores)
    model = options.load_model(arguments)
    if scores is not None:
        check_scores_fit(scores, model)
    found = expert_table(gather(model, options.load_calibration(arguments, model)))
    formats = {"gate": ".3f", "peak": ".4g", **dict.fromkeys(found.columns[6:], ".3g")}
    optional = (*found.columns[:5:-1], "block", "gate")
    whole = arguments.table == "experts"
    title = "Experts (of a method's numbers the lowest go first)"
    title += "" if whole else f": the {SHOWN} of the largest peaks (all: --table experts)"
    tables = [
        Table("super", found[found["super"]], "Super experts", formats, keys=("mixture", "expert"),
              optional=optional),
        Table("experts", found, title, formats, keys=("mixture", "expert"), optional=optional,
              shown=found if whole else found.nlargest(SHOWN, "peak")),
    ]  # fmt: skip
    content = {"experts": records(found), "super": records(found[found["super"]])}
    if scores is not None:
        overlap = super_overlap(found, scores, top=top)
        content["overlap"] = records(overlap)
        shares = dict.fromkeys(("top_share", "chance", "others"), ".1%")
        title = f"Neurons of super experts among the top {top:.0%} by WD above its floor"
        tables.insert(
            1, Table("overlap", overlap, title, shares, keys=("mixture", "expert", "projection"))
        )
    present(arguments, tables, content)
