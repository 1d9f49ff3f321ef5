"""``entangle expand``: routed sparse experts in place of a model's MLP linears."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entangle.cli import options
from entangle.cli.tables import Table, present, records
from entangle.doors import with_installed
from entangle.errors import InvalidInput
from entangle.ranks import current

if TYPE_CHECKING:
    import pandas as pd

    from entangle.allocation import Allocation
    from entangle.evaluation import EvaluationText, Perplexity
    from entangle.experts.expand import Expansion
    from entangle.models.loading import LanguageModel
    from entangle.results.expansion import ExpansionReport


LAYER_COLUMNS = ("layer", "sparsity", "relative_error", "damping", "smallest_cluster",
                 "effective_clusters", "shrunk")  # fmt: skip
MIXTURE_COLUMNS = ("layer", "sparsity", "experts", "experts_before", "neurons", "neurons_before",
                   "flops")  # fmt: skip
"""Of a mixture whose experts were pruned."""
TABLES = ("layers", "model")
OPTIONAL = ("peak MiB", "seconds", "shrunk", "damping", "effective_clusters", "smallest_cluster",
            "flops", "bytes", "nonzeros")  # fmt: skip
"""The least important columns first."""
PRUNING = ("pattern", "pruner", "bits", "group_size", "damping")
"""Options of `add_pruning_options` that a function takes as they are."""
FORMATS = {
    "sparsity": ".4f", "relative_error": ".4f", "damping": ".2g", "effective_clusters": ".1f",
    "perplexity": ".3f", "flops": ".3f", "nonzeros": ".3f", "bytes": ".3f", "seconds": ".0f",
    "peak MiB": ".0f",
}  # fmt: skip


def add_parser(subparsers: options.Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "expand",
        help="build a Sparse Expansion of a model",
        description="Replace linear layers by a router and sparse experts, block by block, and "
        "compare with plain pruning and the dense model.",
    )
    options.add_model_options(parser)
    options.add_layer_options(parser)
    options.add_calibration_options(parser, holds_back=True)
    group = parser.add_argument_group("expansion")
    group.add_argument("--experts", type=int, default=16, help="experts a layer (default: 16)")
    add_pruning_options(
        group,
        allocation="in place of --sparsity: zeros of every row from `entangle allocate`, and "
        "experts of every layer if it has them; the layers are the allocation's",
    )
    group.add_argument(
        "--router", default="kmeans", choices=with_installed("routers", ("kmeans", "random")),
        help="kmeans, or the control: clusters without meaning (default: kmeans)",
    )  # fmt: skip
    options.add_storage_options(group)
    options.add_memory_option(group)
    options.add_evaluation_options(group, default=None)
    group.add_argument(
        "--no-baseline", action="store_true", help="skip the plain pruning (one expert) beside it"
    )
    group.add_argument("--resume", action="store_true", help="go on with an unfinished build")
    options.add_run_options(parser, *TABLES)
    options.add_dry_run_option(parser)
    parser.set_defaults(run=run, show=show)


def add_pruning_options(group: argparse._ArgumentGroup, *, allocation: str) -> None:
    """Add what is pruned away and how; ``allocation`` says what one stands for."""
    group.add_argument("--sparsity", type=float, help="share of zeros (default: 0.7)")
    options.add_allocation_option(group, text=allocation)
    group.add_argument(
        "--pattern", default="row", help="row, layer, block, or n:m such as 2:4 (default: row)"
    )
    group.add_argument(
        "--pruner",
        default="sparsegpt",
        choices=with_installed("pruners", ("sparsegpt", "wanda", "magnitude", "random")),
        help="how weights are chosen (default: sparsegpt)",
    )
    group.add_argument("--bits", type=int, help="also quantise the weights to so many bits")
    group.add_argument(
        "--group-size", type=int,
        help="beside --bits 2 to 8: 128, so that every 128 columns have a grid of their own "
        "(default: one grid a row)",
    )  # fmt: skip
    group.add_argument("--damping", type=float, default=0.01, help="(default: 0.01)")


def pruning_settings(arguments: argparse.Namespace, *, allocated: bool) -> dict[str, Any]:
    """Return what `add_pruning_options` asked for, but the allocation."""
    settings = {name: getattr(arguments, name) for name in PRUNING}
    return settings | {"sparsity": None if allocated else _sparsity(arguments)}


def run(arguments: argparse.Namespace) -> None:
    """Expand, evaluate, print."""
    from entangle.evaluation import perplexity

    memory = options.parse_memory(arguments.memory)
    options.check_run(arguments)
    check_evaluated(arguments)
    allocation = allocation_of(arguments)
    model = options.load_model(arguments)
    calibration = options.load_calibration(arguments, model)
    text = evaluation_text(arguments, model)
    progress = False if arguments.quiet else None
    settings = {
        **pruning_settings(arguments, allocated=allocation is not None),
        **options.chosen_layers(arguments, allocation),
        "router": arguments.router,
        "format": arguments.format,
        "values": arguments.values,
        "seed": arguments.seed,
        "memory": memory,
        "evaluation": text,
        "keep": False,
        "progress": progress,
    }
    from entangle.experts.expand import expand
    from entangle.runs.provenance import expand_user

    k = _experts(arguments, allocation)
    summaries: list[pd.DataFrame] = []

    def evaluate(expanded: "Expansion", folder: Path | None) -> None:
        dense = None if text is None else perplexity(model, text, progress=progress)
        plain = None
        if text is not None and k != "1" and not arguments.no_baseline:
            one = None if allocation is None else replace(allocation, experts=None)
            plain = expand(model, calibration, experts=1, allocation=one, **settings)
        summaries.append(summarise(dense, plain, expanded, experts=k))
        if text is not None and folder is not None:
            keep_table(summaries[0], folder)

    expanded = expand(
        model,
        calibration,
        experts=arguments.experts,
        allocation=allocation,
        out=arguments.out,
        resume=arguments.resume,
        force=arguments.force,
        extra=evaluate,
        **settings,
    )
    if not summaries:  # the build was finished before
        evaluate(expanded, expand_user(arguments.out))
    print_built(summaries[0], expanded.layers, expanded.manifest, arguments)


def show(arguments: argparse.Namespace) -> None:
    """Print the expansion, or the pruned model, that was made before."""
    from entangle.results import load_result
    from entangle.results.expansion import ExpansionReport

    found = load_result(arguments.out)
    assert isinstance(found, ExpansionReport)  # noqa: S101  (its name says so)
    summary = summary_of(found, arguments.out, pruned=arguments.command == "prune")
    print_built(summary, found.layers, found.manifest, arguments)


def print_built(
    summary: "pd.DataFrame",
    layers: "pd.DataFrame",
    manifest: Mapping[str, object],
    arguments: argparse.Namespace,
) -> None:
    """Print the layers, the model beside the dense one, and where it is."""
    content = {
        "out": arguments.out,
        "model": records(summary),
        "layers": records(layers),
        "manifest": dict(manifest),
    }
    pruned = arguments.command == "prune"
    stored = "stored as bitmap and values" if pruned else "flops, nonzeros, bytes"
    how = getattr(arguments, "method", None)
    title = f"Model, pruned by {how or arguments.pruner} (multiples of dense, {stored})"
    wanted = [name for name in LAYER_COLUMNS if not (pruned and "cluster" in name)]
    if how is not None:
        title = f"Mixtures pruned by {how} (multiples of dense)"
        wanted = list(MIXTURE_COLUMNS)
    shown = layers[[name for name in wanted if name in layers]]
    settings: dict[str, Any] = {"formats": FORMATS, "optional": OPTIONAL}
    of_layers = "Pruned layers" if pruned else "Expanded layers"
    of_layers = of_layers if how is None else "Pruned mixtures"
    tables = [
        Table("layers", layers, of_layers, keys=("layer",), shown=shown, **settings),
        Table("model", summary, title, keys=("model", "perplexity"), **settings),
    ]
    present(arguments, tables, content, out=arguments.out)


def summary_of(report: "ExpansionReport", folder: str, *, pruned: bool) -> "pd.DataFrame":
    """Return the closing table of a finished model: as it was kept, or without a dense model."""
    import pandas as pd

    from entangle.runs.provenance import expand_user
    from entangle.runs.reading import decoding, regular_file

    kept = expand_user(folder) / "model.parquet"
    if kept.exists():
        with decoding(regular_file(kept), remedy="make the result anew"):
            table = pd.read_parquet(kept)
    else:
        counts = [str(report.layers["experts"].min()), str(report.layers["experts"].max())]
        label = f"expansion (k = {' to '.join(dict.fromkeys(counts))})"
        value = float("nan") if report.perplexity is None else report.perplexity
        row = {"model": "pruned" if pruned else label, "perplexity": value}
        table = pd.DataFrame([row | dict(report.costs)])
    seconds, peak = report.run.get("seconds"), report.run.get("peak_memory_bytes")
    for name, found, unit in (("seconds", seconds, 1), ("peak MiB", peak, 2**20)):
        known = found / unit if isinstance(found, int | float) else float("nan")
        table[name] = [*[float("nan")] * (len(table) - 1), known]  # of the last one's process
    return table


def summarise(
    dense: "Perplexity | None", plain: "Expansion | None", expanded: "Expansion", *, experts: str
) -> "pd.DataFrame":
    """Return one row for the dense model, for plain pruning and for the expansion."""
    import pandas as pd

    rows: list[dict[str, object]] = []
    if dense is not None:
        ones = {"flops": 1.0, "nonzeros": 1.0, "bytes": 1.0}
        rows.append({"model": "dense", "perplexity": dense.value, **ones})
    for name, one in (("plain pruning (k = 1)", plain), (f"expansion (k = {experts})", expanded)):
        if one is not None:
            value = float("nan") if one.perplexity is None else one.perplexity.value
            # of the whole process, so it says nothing about what ran after the expansion
            peak = None if one is plain else one.run["peak_memory_bytes"]
            rows.append(
                {
                    "model": name,
                    "perplexity": value,
                    **one.costs,
                    "seconds": one.run["seconds"],
                    "peak MiB": peak / 2**20 if isinstance(peak, int) else float("nan"),
                }
            )
    return pd.DataFrame(rows)


def keep_table(summary: "pd.DataFrame", folder: Path) -> None:
    """Write the closing table, of dense and plain pruning too, into a checkpoint without one.

    Seconds and memory, in which runs differ, are left out.
    """
    from entangle.runs.provenance import output_file

    path, summary = folder / "model.parquet", summary.drop(columns=["seconds", "peak MiB"])
    if current().leads and not path.exists():
        with output_file(path, remedy="name another folder") as temporary:
            summary.to_parquet(temporary, index=False)


def allocation_of(arguments: argparse.Namespace) -> "Allocation | None":
    """Load the allocation, which is given in place of a sparsity."""
    if arguments.allocation is not None and arguments.sparsity is not None:
        raise InvalidInput("give --sparsity or --allocation, which has its own; got both.")
    allocation = options.load_allocation(arguments)
    own = allocation is not None and allocation.experts is not None
    if own and "experts" in arguments.given:
        raise InvalidInput(
            f"--experts {arguments.experts} has no meaning beside an allocation that has its own "
            "numbers of experts; drop it."
        )
    return allocation


def _experts(arguments: argparse.Namespace, allocation: "Allocation | None") -> str:
    """Return the number of experts, or the range of an allocation's own."""
    if allocation is None or allocation.experts is None:
        return str(arguments.experts)
    numbers = allocation.experts.values()
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _sparsity(arguments: argparse.Namespace) -> float | None:
    if ":" in arguments.pattern:
        return None if arguments.sparsity is None else float(arguments.sparsity)
    return 0.7 if arguments.sparsity is None else float(arguments.sparsity)


def check_evaluated(arguments: argparse.Namespace) -> None:
    """Refuse options of the text to evaluate on where none is named."""
    given = (
        "evaluation_config", "evaluation_split", "evaluation_column", "eval_seq_len",
        "eval_windows",
    )  # fmt: skip
    for name in given if arguments.evaluation is None else ():
        if getattr(arguments, name) is not None:
            option = name.replace("_", "-")
            raise InvalidInput(
                f"--{option} needs --evaluation SOURCE; give it, or drop --{option}."
            )


def evaluation_text(
    arguments: argparse.Namespace, model: "LanguageModel"
) -> "EvaluationText | None":
    """Load the text to evaluate on, None where none is named."""
    if arguments.evaluation is None:
        return None
    return options.load_evaluation(arguments, model)
