"""``entangle diff``: what changed between two runs of scores."""

import argparse
from typing import TYPE_CHECKING

from entangle.cli import options
from entangle.cli.tables import Table, present, records

if TYPE_CHECKING:
    from entangle.results.difference import Difference

TABLES = ("agreement", "moved", "differs")
_OPTIONAL = ("kendall", "ceiling", "median_change", "compared", "neurons", "tested", "errors")
_MOVED = ["layer", "neuron", "a", "b", "change", "change_se", "p_adjusted", "rank_a", "rank_b"]


def add_parser(subparsers: options.Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "diff",
        help="compare two saved runs of scores: what differs, rank agreement, what moved",
        description="Compare two saved runs of scores, of two models, checkpoints, texts, dtypes "
        "or seeds, neuron by neuron.",
    )
    parser.add_argument("a", metavar="A", help="folder of scores")
    parser.add_argument("b", metavar="B", help="folder of scores to compare with them")
    parser.add_argument(
        "--by", default="wd", metavar="COLUMN",
        help="column to compare; only wd has standard errors to test by (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--fdr", type=float, default=0.05, metavar="SHARE",
        help="share of false ones allowed among the neurons that moved (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--tops", default="0.01,0.03,0.1", metavar="LIST",
        help="shares of the neurons whose sets are compared (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--top", type=int, default=20, help="rows to print (default: 20)")
    parser.add_argument("--html", metavar="FILE", help="write a page of its own to this file")
    options.add_run_options(parser, *TABLES)
    parser.set_defaults(run=run, show=show)


def run(arguments: argparse.Namespace) -> None:
    """Compare, print and save."""
    from entangle.checks import share, whole
    from entangle.errors import InvalidInput
    from entangle.results.diff import diff
    from entangle.runs.provenance import check_output, expand_user

    whole("--top", arguments.top, least=1)
    share("--fdr", arguments.fdr, zero=False, one=False)
    tops = options.numbers(arguments.tops, float)
    if arguments.out is not None:
        check_output(arguments.out, force=arguments.force)
    if arguments.html is not None and expand_user(arguments.html).exists() and not arguments.force:
        raise InvalidInput(f"{arguments.html!r} exists; name another file or use --force.")
    found = diff(
        arguments.a,
        arguments.b,
        by=arguments.by,
        fdr=arguments.fdr,
        tops=tops,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    if arguments.out is not None:
        found.save(arguments.out, force=arguments.force)
    if arguments.html is not None:
        found.save_html(arguments.html, force=arguments.force)
    print_difference(found, arguments)


def show(arguments: argparse.Namespace) -> None:
    """Print the comparison that was made before."""
    from entangle.results.difference import Difference

    found = Difference.load(arguments.out)
    if arguments.html is not None:
        found.save_html(arguments.html, force=arguments.force)
    print_difference(found, arguments)


def as_json(
    found: "Difference", *, top: int, out: str | None, html: str | None
) -> dict[str, object]:
    """Return what ``--json`` prints."""
    return {
        "out": out,
        "html": html,
        "causes": found.causes,
        "notes": found.notes,
        "differs": records(found.differs),
        "agreement": records(found.agreement),
        "moved": records(found.moved(top)),
        "manifest": dict(found.manifest),
    }


def print_difference(found: "Difference", arguments: argparse.Namespace) -> None:
    """Print what differs, the agreement of every layer, what moved, and where the result went."""
    from entangle.results.difference import with_intervals

    out, html = arguments.out, arguments.html
    moved = found.moved(arguments.top)
    agreement = found.summary().drop(columns=["block", "projection"])
    summary = with_intervals(agreement)
    tables = [
        Table(
            "agreement", agreement, f"Agreement of {found.by} by layer [95 %]",
            {"median_change": "+.4f", "ceiling": ".3f"}, keys=("layer",),
            optional=[*_OPTIONAL, *(str(name) for name in summary if str(name).startswith("top_"))],
            shown=summary,
        ),
        Table(
            "moved", moved[_MOVED],
            f"The {len(moved)} surest of {len(found.moved()):,} that moved beyond errors",
            {"a": ".4f", "b": ".4f", "change": "+.4f", "change_se": ".4f", "p_adjusted": ".1e",
             "rank_a": "d", "rank_b": "d"},
            keys=("layer", "neuron"), optional=("rank_a", "rank_b", "change_se", "p_adjusted"),
        ),
        Table("differs", found.shown_differs(), "What differs between the runs"),
    ]  # fmt: skip
    said = [*found._told()[0], *([] if html is None else [f"Page: {html}."])]
    content = as_json(found, top=arguments.top, out=out, html=html)
    present(arguments, tables, content, said=said, out=out)
