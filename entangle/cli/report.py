"""``entangle report``: the neurons of a model on one page, to look at, keep and send."""

import argparse
from typing import TYPE_CHECKING, Any

from entangle.cli import options
from entangle.cli.tables import print_json, say

if TYPE_CHECKING:
    from entangle.report import Report

_MEGABYTE = 1e6


def add_parser(subparsers: options.Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "report",
        help="write a page about all neurons: one HTML file, no server, no network",
        description="Put scores, and decompositions, ablations and other runs of the same model, "
        "on one page that any browser opens. Without --model nothing is computed: what the runs "
        "do not hold, the page says.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN",
        help="result folder or file, or a folder that holds several; scores (or an ablation, which "
        "holds its own) among them",
    )  # fmt: skip
    parser.add_argument(
        "--neurons", default="3%", metavar="SHARE",
        help="neurons of each layer with a whole page, by WD: a share (0.03, 3%%), a number, or "
        "all (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="MODEL",
        help="the model of the scores: modes, contexts and pairs are read in a pass over the text",
    )  # fmt: skip
    options.add_loading_options(parser.add_argument_group("model"))
    options.add_calibration_options(parser)
    options.add_run_options(parser, ending=".html", file=True)
    parser.set_defaults(run=run, show=show)


def run(arguments: argparse.Namespace) -> None:
    """Read the runs, write the page, and say where it is."""
    from entangle.report import write_report
    from entangle.report.content import check_neurons
    from entangle.report.report import check_new
    from entangle.report.runs import open_runs

    neurons = check_neurons(arguments.neurons)
    check_new(arguments.out, force=arguments.force)
    read: dict[str, Any] = {}
    if arguments.model is not None:
        open_runs(arguments.runs)  # what is wrong with them is told before the model is loaded
        model = options.load_model(arguments)
        read = {"model": model, "calibration": options.load_calibration(arguments, model)}
    report = write_report(
        arguments.runs, arguments.out, neurons=neurons, **read, seed=arguments.seed,
        force=arguments.force, progress=not arguments.quiet,
    )  # fmt: skip
    if arguments.json:
        print_json(as_json(report))
    else:
        print_report(report)


def show(arguments: argparse.Namespace) -> None:
    """Say where the page is that was made before; of its content it tells the size alone."""
    from entangle.runs.provenance import expand_user

    path = expand_user(arguments.out).resolve()
    if arguments.json:
        told = {"path": str(path), "address": path.as_uri(), "bytes": path.stat().st_size}
        print_json(told)
    else:
        say(f"Report: {path.as_uri()}")


def as_json(report: "Report") -> dict[str, object]:
    """Return what ``--json`` prints."""
    return {
        "path": str(report.path), "address": report.address, "bytes": report.n_bytes,
        "neurons": report.n_neurons, "pages": report.n_pages, "notes": list(report.notes),
    }  # fmt: skip


def print_report(report: "Report") -> None:
    """Say what was written, and the address last."""
    for note in report.notes:
        say(f"Note: {note}")
    say(
        f"{report.n_neurons:,} neurons, {report.n_pages:,} of them with a whole page, in "
        f"{report.n_bytes / _MEGABYTE:.1f} MB.",
        f"Report: {report.address}",
    )
