"""``entangle evaluate``: perplexity of a model, or of a Sparse Expansion beside it, on a text."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from entangle.cli import options
from entangle.cli.tables import Table, present, records
from entangle.errors import InvalidInput, Unavailable
from entangle.ranks import current
from entangle.runs.progress import tell

if TYPE_CHECKING:
    import pandas as pd

    from entangle.evaluation import Perplexity
    from entangle.models.loading import LanguageModel


KIND = "evaluation"
TASKS = "tasks"
DENSE = "dense"
EXPANSION = "expansion"
CONFIG = "config.json"

FORMATS = {
    "perplexity": ",.5g", "× dense": ".4g", "word perplexity": ",.5g", "bits per byte": ".4f",
    "windows": ",d", "tokens": ",d",
}  # fmt: skip
OPTIONAL = ("tokens", "windows", "bits per byte", "word perplexity")


def add_parser(subparsers: options.Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure the perplexity of a model on a text",
        description="Measure perplexity by the usual protocol: documents joined, tokenised as one "
        "text, cut into windows that do not overlap. MODEL may also be the folder of a Sparse "
        "Expansion (entangle expand --out): its dense model is measured first, and the expansion "
        "beside it. Such a folder fixes --dtype and, without --base, --revision; --device-map does "
        "not apply to it.",
    )
    options.add_model_options(parser)
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="dense model of a Sparse Expansion, if it is not where its manifest says; --revision "
        "is then its revision",
    )
    group = parser.add_argument_group("text")
    options.add_evaluation_options(group, default="demo")
    group.add_argument(
        "--join", default="\\n\\n", help="put between documents; \\n, \\t and \\\\ are understood "
        "(default: %(default)s)"
    )  # fmt: skip
    options.add_special_tokens_option(group)
    parser.add_argument(
        "--tasks", metavar="NAMES",
        help="in place of the text: tasks of EleutherAI's harness (pip install "
        "'neuron-entanglement[harness]'), joined by commas",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, help="take only the first examples of every task")
    parser.add_argument("--batch-size", type=int, help="windows in one forward pass")
    options.add_run_options(parser, "results")
    options.add_dry_run_option(parser)
    parser.set_defaults(run=run, show=show, evaluation="demo")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print and save."""
    from entangle.runs.provenance import RunClock, check_output, make_manifest
    from entangle.seeding import check_seed

    clock = RunClock()
    check_seed(arguments.seed)
    check_output(arguments.out, force=arguments.force)
    from entangle.evaluation import evaluate_models, perplexity_table
    from entangle.texts.documents import interpret_escapes

    models = load_models(arguments)
    join = interpret_escapes(arguments.join)
    if arguments.tasks is not None and current().size > 1:
        raise InvalidInput(
            "tasks run in one process; start `entangle evaluate --tasks` without torchrun or srun."
        )
    if arguments.tasks is not None:
        _run_tasks(models, arguments)
        return
    text = options.load_evaluation(arguments, next(iter(models.values())), join=join)
    results = evaluate_models(
        models.items(),
        text,
        batch_size=arguments.batch_size,
        progress=not arguments.quiet,
    )
    table = perplexity_table(results, seed=arguments.seed)
    manifest = make_manifest(
        KIND,
        models={label: model.describe() for label, model in models.items()},
        evaluation=text.describe(),
        settings={
            "batch_size": arguments.batch_size,
            "seed": arguments.seed,
            "special_tokens_effect": _effect(next(iter(results.values()))),
        },
        **clock.read(),
    )
    if current().leads:
        save(arguments.out, table, results, manifest, force=arguments.force)
    bad = {label: one.n_bad_windows for label, one in results.items() if one.flag}
    print_results(table, manifest, arguments, bad=bad)


def show(arguments: argparse.Namespace) -> None:
    """Print the evaluation that was made before."""
    import numpy as np

    from entangle.runs.provenance import expand_user, read_manifest, read_table

    folder, kind = expand_user(arguments.out), KIND if arguments.tasks is None else TASKS
    name = "tasks.parquet" if kind == TASKS else "perplexity.parquet"
    manifest = read_manifest(folder, kind, [name])
    table = read_table(folder / name, {})
    if kind == TASKS:
        _print_tasks(table, manifest, arguments)
        return
    windows = read_table(folder / "windows.parquet", {})
    lost = windows.loc[~np.isfinite(windows["loss"]), "model"]
    print_results(table, manifest, arguments, bad=lost.value_counts().to_dict())


def _run_tasks(models: "Mapping[str, LanguageModel]", arguments: argparse.Namespace) -> None:
    """Run the harness's tasks on every model, print and save."""
    from entangle.evaluation.harness import task_results
    from entangle.runs.provenance import make_manifest, output_folder, write_json

    table = task_results(
        models, options.names(arguments.tasks), limit=arguments.limit, seed=arguments.seed,
        batch_size=arguments.batch_size or 1, **options.special_tokens(arguments),
    )  # fmt: skip
    manifest = make_manifest(
        TASKS,
        models={label: model.describe() for label, model in models.items()},
        settings={"tasks": arguments.tasks, "limit": arguments.limit, "seed": arguments.seed},
    )
    with output_folder(arguments.out, force=arguments.force) as folder:
        write_json(folder / "manifest.json", manifest)
        table.to_parquet(folder / "tasks.parquet", index=False)
    _print_tasks(table, manifest, arguments)


def _print_tasks(
    table: "pd.DataFrame", manifest: Mapping[str, object], arguments: argparse.Namespace
) -> None:
    content = {"out": arguments.out, "manifest": manifest, "results": records(table)}
    formats = {"value": ".4g", "standard error": ".2g"}
    keys = ("model", "task", "metric", "value")
    printed = Table("results", table, "Tasks", formats, keys=keys)
    present(arguments, [printed], content, out=arguments.out)


def _effect(result: "Perplexity") -> dict[str, object] | None:
    effect = result.special_tokens_effect
    return None if effect is None else effect.describe()


def load_models(arguments: argparse.Namespace) -> dict[str, "LanguageModel"]:
    """Load the model, or the dense model of a Sparse Expansion and the expansion, by label."""
    from entangle.runs.provenance import is_expansion

    if arguments.model != "demo" and is_expansion(arguments.model):
        return _load_expansion(arguments)
    if arguments.base is not None:
        raise InvalidInput(
            f"`--base` applies to the folder of a Sparse Expansion; {arguments.model!r} is none: "
            "leave it out."
        )
    return {DENSE: options.load_model(arguments)}


def _load_expansion(arguments: argparse.Namespace) -> dict[str, "LanguageModel"]:
    from entangle.experts.checkpoint import load_base, load_expanded
    from entangle.runs.provenance import expand_user

    fixed = {
        "--stream": bool(arguments.stream),
        "--dtype": arguments.dtype != "auto",
        "--device-map": arguments.device_map is not None,
    }
    fixed["--revision"] = arguments.revision is not None and arguments.base is None
    for option, given in fixed.items():
        if given:
            raise InvalidInput(
                f"`{option}` cannot be chosen for the Sparse Expansion {arguments.model!r}, which "
                "runs as its dense model was expanded: leave it out."
            )
    try:
        dense = load_base(
            arguments.model, arguments.base, revision=arguments.revision, device=arguments.device
        )
    except Unavailable as error:
        if arguments.base is not None or not (expand_user(arguments.model) / CONFIG).is_file():
            raise
        tell(f"note: without its dense model beside it: {error}")
        return {EXPANSION: load_expanded(arguments.model, device=arguments.device)}
    packed = (expand_user(arguments.model) / CONFIG).is_file() and arguments.base is None
    given = None if packed else dense
    expanded = load_expanded(arguments.model, base=given, device=arguments.device)
    return {DENSE: dense, EXPANSION: expanded}


def save(
    out: str,
    table: "pd.DataFrame",
    results: Mapping[str, "Perplexity"],
    manifest: Mapping[str, object],
    *,
    force: bool,
) -> None:
    """Write the manifest, the table, and every window's loss (``windows.parquet``)."""
    import pandas as pd

    from entangle.runs.provenance import output_folder, write_json

    windows = pd.concat(
        pd.DataFrame({"model": label, "loss": result.window_losses}).rename_axis("window")
        for label, result in results.items()
    )
    with output_folder(out, force=force) as folder:
        write_json(folder / "manifest.json", manifest)
        table.to_parquet(folder / "perplexity.parquet", index=False)
        windows.reset_index().to_parquet(folder / "windows.parquet", index=False)


def print_results(
    table: "pd.DataFrame",
    manifest: Mapping[str, Any],
    arguments: argparse.Namespace,
    *,
    bad: Mapping[Any, int],
) -> None:
    """Print the table, what is wrong with a result, and where it was written.

    ``bad`` is the number of windows without a finite loss, of models that have some.
    """
    from entangle.runs.provenance import special_tokens_of

    shown = table.drop(columns=["ratio_low", "ratio_high", "special_tokens", "flag"])
    shown.columns = shown.columns.str.replace("_", " ")
    interval = [
        f"[{low:.4g}, {high:.4g}]" for low, high in zip(table["ratio_low"], table["ratio_high"],
                                                         strict=True)
    ]  # fmt: skip
    shown = shown.rename(columns={"ratio": "× dense"})
    if len(shown) > 1:
        shown.insert(3, "95 %", interval)
    else:
        shown = shown.drop(columns="× dense")
    text = manifest["evaluation"]
    said = [
        f"The perplexity of {row['model']} is {row['flag']}: {bad.get(row['model'], 0)} of "
        f"{row['windows']} windows have no finite loss."
        for row in records(table)
        if row["flag"]
    ]
    title = (
        f"Perplexity on {text['source']} (windows of {text['seq_len']:,} tokens, no overlap, "
        f"special tokens: {special_tokens_of(manifest, 'evaluation')})"
    )
    printed = Table(
        "results", table, title, FORMATS, keys=("model", "perplexity"), optional=OPTIONAL,
        shown=shown,
    )  # fmt: skip
    content = {"out": arguments.out, "manifest": manifest, "results": records(table)}
    present(arguments, [printed], content, said=said, out=arguments.out)
