"""``entangle anchor``: whether high scores mean many features, by a dictionary of inputs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entangle.cli import options
from entangle.cli.tables import Table, present, records
from entangle.errors import InvalidInput

if TYPE_CHECKING:
    from entangle.cli.trials import Counts, Job, Number
    from entangle.models.loading import LanguageModel
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
    options.add_dry_run_option(group)
    options.add_run_options(parser, *TABLES)
    parser.set_defaults(run=run, show=show)


def run(arguments: argparse.Namespace) -> None:
    """Fit, measure, save and print."""
    from entangle.runs.provenance import check_output
    from entangle.seeding import check_seed

    check_seed(arguments.seed)
    _check_layer(arguments)
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
        **_settings(arguments),
        seed=arguments.seed,
        memory=memory,
        progress=not arguments.quiet,
    )
    found.save(arguments.out, force=arguments.force)
    print_anchor(found, arguments)


def _check_layer(arguments: argparse.Namespace) -> None:
    if arguments.layer is None:
        raise InvalidInput(
            "`--layer` must name what to anchor, such as a block index with --proj; got none."
        )


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("dictionary", "atoms", "active", "threshold")
    controls = options.names(arguments.controls)
    return {name: getattr(arguments, name) for name in names} | {"controls": controls}


def dry_job(arguments: argparse.Namespace, model: "LanguageModel") -> "Job":
    """Return what ``--dry-run`` asks about."""
    from entangle.cli.trials import Job
    from entangle.experiments.sae import load_sae
    from entangle.models.layers import find_layers
    from entangle.scoring.score import _resolve_method

    _check_layer(arguments)
    spec, settings = options.chosen_layers(arguments, None), _settings(arguments)
    layers = find_layers(model.module, spec["layers"], spec["proj"])
    text, memory = (
        options.load_calibration(arguments, model),
        options.parse_memory(arguments.memory),
    )
    brought = settings["dictionary"]
    given = {
        "settings": settings, "memory": memory, "batch_size": None, "md": True,
        "method": _resolve_method("auto", model, layers, text, memory),
        "n_boot": 500,  # of `entangle.experiments.anchor.anchor`, which a trial lowers
        "brought": None if brought is None else len(load_sae(brought).atoms),
    }  # fmt: skip
    return Job(model, tuple(layers), text, None, given)


def dry_run(job: "Job", out: Path) -> object:
    """Anchor a job's layers."""
    from entangle.experiments.anchor import anchor

    own = job.given
    found = anchor(
        job.model, job.text, layers=[one.name for one in job.layers], proj=None,
        n_boot=own["n_boot"], memory=own["memory"], progress=False, **own["settings"],
    )  # fmt: skip
    found.save(out)
    return found


def dry_counts(job: "Job") -> "Counts":
    """Return what the time, memory and disk of an anchor are linear in.

    Every token that comes is taken to become an atom until the dictionary is full.
    """
    from entangle.cli.counts import SCORE
    from entangle.cli.trials import Counts

    scored, own, half = SCORE.counts(job), job.given["settings"], job.tokens // 2
    steps: dict[str, Number] = dict.fromkeys(("pursuit", "products", "grams", "read", "solve"), 0.0)
    largest = 0.0
    for one in job.inputs:
        width = one.in_features
        atoms = job.given["brought"] or min(own["atoms"] or 2 * width, half)
        fits = 0 if job.given["brought"] else min(atoms, half) / 2
        pursued = (3 - (job.given["brought"] is not None)) * half + fits
        steps["pursuit"] += pursued * atoms * own["active"]
        steps["products"] += (pursued + half) * atoms * width + half * width**2
        steps["grams"] += float(atoms) ** 2 * width
        steps["solve"] += float(width) ** 3
        rows = sum(o.out_features for o in job.layers if o.block == one.block
                   and o.in_features == width)  # fmt: skip
        steps["read"] += 3.0 * rows * atoms * width
        largest = max(largest, 8.0 * rows * atoms, 4.0 * (half * width * 3 + atoms**2))
    kept = sum(one.in_features for one in job.inputs) * job.tokens * job.model.dtype.itemsize
    times = {**scored.time, **steps, "forward": job.forward(2), "layers": float(len(job.layers)),
             "drawn": float(job.given["n_boot"] * job.neurons)}  # fmt: skip
    peak = {**scored.peak, "largest": largest}
    disk = {"neurons": float(3 * job.neurons), "layers": float(len(job.layers))}
    held = max(scored.held, min(job.budget, kept))
    return Counts(times, peak, disk, held=held, passes=(2, 0))


def dry_sizes(job: "Job") -> list[dict[str, Any]]:
    """Vary the resamples, and the atoms, unless they are brought."""
    own = job.given["settings"]
    found: list[dict[str, Any]] = [
        {"n_boot": 10, "shapes": 3, "tokens": 0.5},
        {"n_boot": 50, "shapes": 1, "tokens": 0.25},
    ]
    if job.given["brought"]:
        return found
    few = {**own, "atoms": min(64, own["atoms"] or 64)}
    return [*found, {"n_boot": 10, "settings": few, "shapes": 1, "tokens": 0.5}]


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
