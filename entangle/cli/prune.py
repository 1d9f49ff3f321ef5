"""``entangle prune``: zeros in weights, or fewer experts, written as an ordinary model."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entangle.cli import options
from entangle.cli.expand import (
    TABLES,
    add_pruning_options,
    allocation_of,
    check_evaluated,
    evaluation_text,
    keep_table,
    print_built,
    pruning_settings,
    show,
)
from entangle.cli.meaning import MIXTURES
from entangle.doors import with_installed
from entangle.errors import InvalidInput

if TYPE_CHECKING:
    import pandas as pd

    from entangle.evaluation import Perplexity
    from entangle.experts.expand import Expansion
    from entangle.mixtures.written import WrittenMixtures


def add_parser(subparsers: options.Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "prune",
        help="prune a model and write it as an ordinary Hugging Face folder",
        description="Prune linear layers block by block, compare with the dense model, and write a "
        "folder as transformers writes it, which any tool reads that reads those.",
    )
    options.add_model_options(parser)
    options.add_layer_options(parser)
    options.add_calibration_options(parser, holds_back=True)
    group = parser.add_argument_group("pruning")
    add_pruning_options(
        group,
        allocation="in place of --sparsity: zeros of every row from `entangle allocate`; the "
        "layers are the allocation's",
    )
    group.add_argument(
        "--method", choices=with_installed("mixtures", MIXTURES),
        help="prune the experts of a mixture instead, or the neurons in them, by one of these "
        "methods; --sparsity is the share of the experts' weights that goes",
    )  # fmt: skip
    options.add_memory_option(group)
    options.add_evaluation_options(group, default=None)
    group.add_argument(
        "--packed", choices=("bitmap", "delta", "n16"),
        help="write the packed weights, which this package runs, instead of an ordinary model; n16 "
        "for a --pattern of n of 16 weights, such as 5:16",
    )  # fmt: skip
    group.add_argument("--resume", action="store_true", help="go on with an unfinished pruning")
    options.add_run_options(parser, *TABLES)
    options.add_dry_run_option(parser)
    parser.set_defaults(run=run, show=show)


def run(arguments: argparse.Namespace) -> None:
    """Prune, evaluate, print."""
    from entangle.evaluation import perplexity

    memory = options.parse_memory(arguments.memory)
    options.check_run(arguments)
    check_evaluated(arguments)
    if arguments.method is not None:
        run_on_mixtures(arguments)
        return
    allocation = allocation_of(arguments)
    model = options.load_model(arguments)
    calibration = options.load_calibration(arguments, model)
    text = evaluation_text(arguments, model)
    progress = False if arguments.quiet else None
    from entangle.experts.expand import expand
    from entangle.experts.prune import prune
    from entangle.runs.provenance import expand_user

    summaries: list[pd.DataFrame] = []

    def evaluate(pruned: "Expansion", folder: Path | None) -> None:
        dense = None if text is None else perplexity(model, text, progress=progress)
        summaries.append(summarise(dense, pruned))
        if text is not None and folder is not None:
            keep_table(summaries[0], folder)

    settings: dict[str, Any] = {
        **pruning_settings(arguments, allocated=allocation is not None),
        **options.chosen_layers(arguments, allocation),
        "allocation": None if allocation is None else replace(allocation, experts=None),
        "seed": arguments.seed,
        "memory": memory,
        "evaluation": text,
        "out": arguments.out,
        "resume": arguments.resume,
        "force": arguments.force,
        "extra": evaluate,
        "progress": progress,
    }
    pruned: Expansion
    if arguments.packed is None:
        pruned = prune(model, calibration, **settings)
    else:
        packed = {"experts": 1, "format": arguments.packed, "keep": False}
        pruned = expand(model, calibration, **settings, **packed)
    if not summaries:  # the pruning was finished before
        evaluate(pruned, expand_user(arguments.out))
    print_built(summaries[0], pruned.layers, pruned.manifest, arguments)


def run_on_mixtures(arguments: argparse.Namespace) -> None:
    """Prune the experts of a mixture, evaluate, print."""
    from entangle.mixtures import MIXTURE_METHODS, gather, prune_mixtures, write_mixtures
    from entangle.mixtures.written import WrittenMixtures
    from entangle.runs.provenance import check_output

    if arguments.sparsity is None:
        raise InvalidInput(
            f"--method {arguments.method} needs --sparsity, the share of the experts' weights that "
            "goes; give it."
        )
    method = MIXTURE_METHODS[arguments.method]
    check_output(arguments.out, force=arguments.force)
    model = options.load_model(arguments)
    calibration = options.load_calibration(arguments, model)
    text = evaluation_text(arguments, model)
    seen = gather(model, calibration, gradients=method.gradients)
    summaries: list[pd.DataFrame] = []

    def evaluate(found: WrittenMixtures, folder: Path) -> None:
        summaries.append(_summarised(found))
        if text is not None:
            keep_table(summaries[0], folder)

    found = write_mixtures(
        prune_mixtures(seen, method, sparsity=arguments.sparsity), arguments.out,
        evaluation=text, force=arguments.force, extra=evaluate,
    )  # fmt: skip
    print_built(summaries[0], found.report.layers, found.report.manifest, arguments)


def _summarised(found: "WrittenMixtures") -> "pd.DataFrame":
    """Return one row for the dense model, where it was evaluated, and one for the pruned one."""
    import pandas as pd

    rows: list[dict[str, object]] = []
    if found.dense is not None:
        ones = {"flops": 1.0, "nonzeros": 1.0, "bytes": 1.0}
        rows.append({"model": "dense", "perplexity": found.dense.value, **ones})
    peak, report = found.report.run["peak_memory_bytes"], found.report
    value = float("nan") if found.perplexity is None else found.perplexity.value
    rows.append(
        {
            "model": "pruned", "perplexity": value, **report.costs,
            "seconds": report.run["seconds"],
            "peak MiB": peak / 2**20 if isinstance(peak, int) else float("nan"),
        }
    )  # fmt: skip
    return pd.DataFrame(rows)


def summarise(dense: "Perplexity | None", pruned: "Expansion") -> "pd.DataFrame":
    """Return one row for the dense model, where it was evaluated, and one for the pruned one."""
    import pandas as pd

    rows: list[dict[str, object]] = []
    if dense is not None:
        ones = {"flops": 1.0, "nonzeros": 1.0, "bytes": 1.0}
        rows.append({"model": "dense", "perplexity": dense.value, **ones})
    peak = pruned.run["peak_memory_bytes"]
    rows.append(
        {
            "model": "pruned",
            "perplexity": float("nan") if pruned.perplexity is None else pruned.perplexity.value,
            **pruned.costs,
            "seconds": pruned.run["seconds"],
            "peak MiB": peak / 2**20 if isinstance(peak, int) else float("nan"),
        }
    )
    return pd.DataFrame(rows)
