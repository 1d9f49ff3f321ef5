"""``entangle report``: the neurons of a model on one page, to look at, keep and send."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entangle.cli import options
from entangle.cli.tables import print_json, say

if TYPE_CHECKING:
    from entangle.cli.trials import Counts, Job
    from entangle.models.loading import LanguageModel
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
    group = parser.add_argument_group("model")
    options.add_loading_options(group)
    options.add_dry_run_option(group)
    options.add_calibration_options(parser)
    options.add_run_options(parser, ending=".html", file=True)
    parser.set_defaults(run=run, show=show, csv=False, latex=False, wide=False)  # of a dry run


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


def dry_job(arguments: argparse.Namespace, model: "LanguageModel") -> "Job":
    """Return what ``--dry-run`` asks about: the passes of the text, and the neurons read there."""
    from entangle.cli.trials import Job
    from entangle.experiments.selection import check_scores_fit
    from entangle.memory import memory_for
    from entangle.report.content import check_neurons, chosen_rows
    from entangle.report.evidence import planned
    from entangle.report.report import check_new
    from entangle.report.runs import open_runs

    neurons = check_neurons(arguments.neurons)
    check_new(arguments.out, force=arguments.force)
    found = open_runs(arguments.runs)
    check_scores_fit(found.scores, model)
    text, rows = options.load_calibration(arguments, model), chosen_rows(found, neurons)
    memory = memory_for(None, model.module)
    passes = planned(found.scores, rows, model, text, memory)
    given = {
        "pages": len(rows), "rows": len(found.scores.frame), "passes": len(passes),
        "held": max((needed for _, needed in passes), default=0),
        "neurons": max(len(rows), 1) / len(found.scores.frame), "method": "sketch",
    }  # fmt: skip
    layers = tuple(layer for part, _ in passes for layer in part)
    return Job(model, layers, text, None, given)


def dry_ready(job: "Job", folder: Path) -> "Job":
    """Score the layers of a trial, whose page is made."""
    from entangle.scoring.score import score

    found = score(
        job.model, job.text, layers=[one.name for one in job.layers], proj=None, md=False,
        method="sketch", min_tokens=2, progress=False,
    )  # fmt: skip
    found.save(folder / "scores")
    return replace(job, given={**job.given, "scores": folder / "scores"})


def dry_run(job: "Job", out: Path) -> object:
    """Write the page of a trial."""
    from entangle.report import write_report

    return write_report(
        job.given["scores"], out.with_suffix(".html"), neurons=job.given["neurons"],
        model=job.model, calibration=job.text, progress=False,
    )  # fmt: skip


def dry_counts(job: "Job") -> "Counts":
    """Return what time, memory and disk of a page are linear in."""
    from entangle.cli.trials import Counts
    from entangle.report.evidence import PAIR_TOKENS

    assert job.text is not None  # noqa: S101
    own = job.given
    passes = own["passes"] * (1.0 if any(one.is_expert for one in job.layers) else job.reached)
    pages = own["pages"] or own["neurons"] * job.neurons
    rows = float(own["rows"] or job.neurons)
    near = float(min(job.tokens, PAIR_TOKENS)) ** 2
    batches = math.ceil(job.text.n_seq / job.text.per_pass)
    times = {
        "calls": float(batches * len(job.layers)), "forward": job.forward(passes),
        "outputs": job.tokens * pages, "pages": pages, "neurons": rows,
        "near": near * sum(one.in_features for one in job.inputs),
    }  # fmt: skip
    at_once = min(job.tokens, job.text.per_pass * job.text.seq_len)
    peak = {
        "pass": float(at_once * max((max(one.shape) for one in job.layers), default=1)),
        "pages": pages, "neurons": rows,
    }  # fmt: skip
    disk = {"pages": pages, "neurons": rows}
    return Counts(times, peak, disk, held=float(own["held"]), passes=(passes, 0))


def dry_sizes(job: "Job") -> list[dict[str, Any]]:
    """Vary the share of neurons that have a page."""
    trial: Mapping[str, Any] = {"pages": None, "rows": None, "passes": 1, "held": 0}
    share = job.given["neurons"]
    return [
        {**trial, "neurons": share, "shapes": 3},
        {**trial, "neurons": min(1.0, 4 * share), "shapes": 2},
    ]


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
