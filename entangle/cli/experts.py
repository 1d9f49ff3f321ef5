"""``entangle experts``: what every expert of a mixture does, and which are super experts."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from entangle.cli import options
from entangle.cli.tables import Table, present, records

if TYPE_CHECKING:
    import pandas as pd

    from entangle.cli.trials import Counts, Job
    from entangle.models.loading import LanguageModel

KIND = "experts"
_EXPERTS, _OVERLAP = "experts.parquet", "overlap.parquet"
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
    options.add_dry_run_option(group)
    options.add_run_options(parser, "super", "overlap", "experts")
    parser.set_defaults(run=run, show=show)


def run(arguments: argparse.Namespace) -> None:
    """Gather, save and print."""
    from entangle.checks import share
    from entangle.experiments.selection import check_scores_fit
    from entangle.mixtures import gather
    from entangle.mixtures.statistics import find_mixtures
    from entangle.mixtures.super_experts import expert_table, scored_neurons, super_overlap
    from entangle.results.scores import load_scores
    from entangle.runs.provenance import RunClock, make_manifest, output_folder, write_json

    clock = RunClock()
    top = share("--fraction", arguments.fraction)
    scores = None if arguments.scores is None else load_scores(arguments.scores)
    model = options.load_model(arguments)
    settings: dict[str, object] = {"fraction": top, "seed": arguments.seed}
    if scores is not None:  # refused before the pass over the text
        check_scores_fit(scores, model)
        scored_neurons(scores, [one.name for one in find_mixtures(model.module)])
        settings["scores"] = {key: scores.manifest.get(key) for key in ("calibration", "settings")}
    text = options.load_calibration(arguments, model)
    found = expert_table(gather(model, text))
    overlap = None if scores is None else super_overlap(found, scores, top=top)
    manifest = make_manifest(
        KIND, model=model.describe(), calibration=text.describe(),
        settings=settings, **clock.read(),
    )  # fmt: skip
    with output_folder(arguments.out, force=arguments.force) as folder:
        write_json(folder / "manifest.json", manifest)
        found.to_parquet(folder / _EXPERTS, index=False)
        if overlap is not None:
            overlap.to_parquet(folder / _OVERLAP, index=False)
    print_experts(found, overlap, manifest, arguments)


def dry_job(arguments: argparse.Namespace, model: "LanguageModel") -> "Job":
    """Return what ``--dry-run`` asks about."""
    from entangle.cli.trials import Job
    from entangle.experiments.selection import check_scores_fit
    from entangle.mixtures.statistics import find_mixtures
    from entangle.models.layers import list_layers
    from entangle.results.scores import load_scores

    if arguments.scores is not None:
        check_scores_fit(load_scores(arguments.scores), model)
    starts = tuple(f"{one.name}." for one in find_mixtures(model.module))
    layers = tuple(one for one in list_layers(model.module) if one.name.startswith(starts))
    return Job(model, layers, options.load_calibration(arguments, model), None)


def dry_run(job: "Job", out: Path) -> object:
    """Tell of a job's experts."""
    from entangle.mixtures import gather
    from entangle.mixtures.super_experts import expert_table

    found = expert_table(gather(job.model, job.text))
    out.mkdir()
    found.to_parquet(out / _EXPERTS, index=False)
    return found


def dry_counts(job: "Job") -> "Counts":
    """Return what the time, memory and disk of such a pass are linear in."""
    import math

    from entangle.cli.trials import Counts
    from entangle.mixtures.statistics import find_mixtures

    assert job.text is not None  # noqa: S101
    mixtures = find_mixtures(job.model.module)
    experts = float(sum(one.n_experts for one in mixtures))
    batches = math.ceil(job.text.n_seq / job.text.per_pass)
    widths = float(job.tokens * len(mixtures) * job.width)
    times = {"forward": job.forward(1), "calls": experts * batches, "experts": experts,
             "outputs": widths}  # fmt: skip
    tokens = min(job.tokens, job.text.per_pass * job.text.seq_len)
    most = max((one.shape[0] for one in job.layers), default=1)
    peak = {"pass": float(tokens * most), "logits": float(tokens * job.model.vocab_size),
            "experts": experts * job.width}  # fmt: skip
    return Counts(times, peak, {"experts": experts}, passes=(1, 0))


def show(arguments: argparse.Namespace) -> None:
    """Print what was made before."""
    from entangle.runs.provenance import expand_user, read_manifest, read_table

    folder = expand_user(arguments.out)
    manifest = read_manifest(folder, KIND, [_EXPERTS])
    overlap = None if arguments.scores is None else read_table(folder / _OVERLAP, {})
    print_experts(read_table(folder / _EXPERTS, {}), overlap, manifest, arguments)


def print_experts(
    found: "pd.DataFrame",
    overlap: "pd.DataFrame | None",
    manifest: dict[str, object],
    arguments: argparse.Namespace,
) -> None:
    """Print super experts, whether neurons of high WD lie in them, and all experts."""
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
    content = {
        "out": arguments.out, "experts": records(found), "super": records(found[found["super"]]),
        "manifest": manifest,
    }  # fmt: skip
    if overlap is not None:
        content["overlap"] = records(overlap)
        shares = dict.fromkeys(("top_share", "chance", "others"), ".1%")
        title = f"Neurons of super experts among the top {arguments.fraction:.0%} by WD above its"
        tables.insert(
            1,
            Table(
                "overlap", overlap, f"{title} floor", shares,
                keys=("mixture", "expert", "projection"),
            ),
        )  # fmt: skip
    present(arguments, tables, content, out=arguments.out)
