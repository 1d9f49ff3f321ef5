"""``entangle score``: rank the neurons of some layers."""

import argparse
from typing import TYPE_CHECKING, Any

from entangle.cli import options
from entangle.cli.tables import Table, present, records
from entangle.ranks import current

if TYPE_CHECKING:
    import pandas as pd

    from entangle.results.scores import NeuronScores


TOP_COLUMNS = ("layer", "neuron", "wd", "wd_se", "ks", "mean", "std", "skewness",
               "excess_kurtosis", "weight_norm", "md", "flag")  # fmt: skip
FORMATS = {
    "wd": ".4f", "wd_se": ".4f", "ks": ".4f", "mean": ".3f", "std": ".3f", "skewness": ".2f",
    "excess_kurtosis": ".2f", "weight_norm": ".3f", "md": ".3f", "median wd": ".4f",
    "97 % wd": ".4f", "max wd": ".4f", "null floor": ".4f", "split-half ρ": ".3f",
    "flagged": "d", "block": "d",
}  # fmt: skip
OPTIONAL = ("flagged", "neurons", "97 % wd", "split-half ρ", "mean", "weight_norm", "std",
            "excess_kurtosis", "skewness", "ks", "null floor", "WD–MD ρ [95 %]", "md")  # fmt: skip
TABLES = ("layers", "neurons", "routing")


def add_parser(subparsers: options.Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "score",
        help="rank neurons by their Wasserstein distance from a Gaussian",
        description="Score every neuron of some layers and print the ranking by WD.",
    )
    options.add_model_options(parser)
    options.add_layer_options(parser)
    options.add_calibration_options(parser)
    group = parser.add_argument_group("method")
    group.add_argument(
        "--method",
        default="auto",
        choices=("auto", "exact", "sketch"),
        help="exact: sort all outputs; sketch: all layers in one pass, bounded memory; auto: "
        "exact if the recorded inputs take at most 1 GiB, or half of a --memory that is given "
        "(default: auto)",
    )
    group.add_argument(
        "--routing",
        action="store_true",
        help="compare the neurons of a mixture's experts with themselves on as many tokens of the "
        "whole text: does the model's own router disentangle them?",
    )
    group.add_argument("--no-md", action="store_true", help="skip the mapping difficulty")
    group.add_argument(
        "--columns", default="", metavar="NAMES",
        help="comma-separated columns of installed packages to compute too (`entangle list "
        "columns`)",
    )  # fmt: skip
    options.add_memory_option(group)
    group.add_argument("--batch-size", type=int, help="sequences in one forward pass")
    group.add_argument(
        "--min-tokens",
        type=int,
        default=512,
        help="tokens that an expert of a mixture must see for its neurons to be scored "
        "(default: 512)",
    )
    parser.add_argument("--top", type=int, default=20, help="rows to print (default: 20)")
    options.add_run_options(parser, *TABLES)
    options.add_dry_run_option(parser)
    parser.set_defaults(run=run, show=show)


def run(arguments: argparse.Namespace) -> None:
    """Score, print and save."""
    from entangle.runs.provenance import check_output
    from entangle.seeding import check_seed

    check_seed(arguments.seed)
    memory = options.parse_memory(arguments.memory)
    check_output(arguments.out, force=arguments.force)
    from entangle.models.layers import find_layers
    from entangle.scoring.score import score

    model = options.load_model(arguments)
    layers = options.chosen_layers(arguments, None)
    find_layers(model.module, layers["layers"], layers["proj"])
    calibration = options.load_calibration(arguments, model)
    effect = options.tell_special_tokens(arguments, model, calibration)
    scores = score(
        model,
        calibration,
        **layers,
        method=arguments.method,
        md=not arguments.no_md,
        seed=arguments.seed,
        memory=memory,
        batch_size=arguments.batch_size,
        columns=options.names(arguments.columns) if arguments.columns else (),
        min_tokens=arguments.min_tokens,
        routing=arguments.routing,
        progress=not arguments.quiet,
    )
    if effect is not None:
        scores = scores.with_settings(special_tokens_effect=effect.describe())
    if current().leads:
        scores.save(arguments.out, force=arguments.force)
    print_scores(scores, arguments)


def show(arguments: argparse.Namespace) -> None:
    """Print the scores that were made before."""
    from entangle.results.scores import load_scores

    print_scores(load_scores(arguments.out), arguments)


def layer_summary(scores: "NeuronScores", *, seed: int) -> "pd.DataFrame":
    """Return one row a layer with quantiles of WD and the rank correlation of WD and MD."""
    import pandas as pd

    rows = []
    for row in scores.layers.itertuples(index=False):
        part = scores.frame[scores.frame["layer"] == row.layer]
        rho, low, high = _wd_md(part, seed=seed)
        rows.append(
            {
                "layer": row.layer,
                "neurons": row.n_neurons,
                "median wd": part["wd"].median(),
                "97 % wd": part["wd"].quantile(0.97),
                "max wd": part["wd"].max(),
                "null floor": row.null_floor,
                "split-half ρ": row.split_half,
                "WD–MD ρ": rho,
                "low": low,
                "high": high,
                "flagged": int((part["flag"] != "").sum()),
            }
        )
    return pd.DataFrame(rows)


def _wd_md(rows: "pd.DataFrame", *, seed: int) -> tuple[float, float, float]:
    """Return Spearman's coefficient of WD and MD and its interval; NaN where it is undefined."""
    from entangle.errors import InvalidInput
    from entangle.stats.intervals import spearman_interval

    pairs = rows[["wd", "md"]].dropna().to_numpy(float)
    try:
        found = spearman_interval(pairs[:, 0], pairs[:, 1], seed=seed, n_boot=500)
    except InvalidInput:
        return float("nan"), float("nan"), float("nan")
    return found.value, found.low, found.high


def print_scores(scores: "NeuronScores", arguments: argparse.Namespace) -> None:
    """Print the summary of the layers, the ranking, and where the result went."""
    top, summary = arguments.top, layer_summary(scores, seed=arguments.seed)
    flagged = scores.frame[scores.frame["flag"] != ""]
    said = [
        f"{count} neuron(s) with {flag} outputs have no score."
        for flag, count in flagged["flag"].value_counts().items()
    ]
    if (flagged["flag"] == "coarse").any():
        said.append(
            "Coarse ones have a WD that may be wrong by more than 0.05 (see wd_bound): score them "
            "with --method exact, or a model in float32."
        )
    content = {
        "out": arguments.out,
        "manifest": dict(scores.manifest),
        "layers": records(scores.layers),
        "summary": records(summary),
        "top": records(scores.top(top)),
    }
    tables = score_tables(scores, summary, top=top)
    if "wd_inside" in scores.frame.columns:
        routing = scores.routing(seed=arguments.seed)
        content["routing"] = records(routing)
        tables.append(routing_table(routing))
    present(arguments, tables, content, said=said, out=arguments.out)


def routing_table(routing: "pd.DataFrame") -> Table:
    """Return the table of what the model's own routers do to WD."""
    shown = routing[["block", "projection", "experts", "neurons", "wd_inside", "wd_outside"]]
    for name, prefix in (("drop", ""), ("control", "control_")):
        shown = shown.assign(
            **{
                f"{name} [95 %]": [
                    f"{row[name]:.3f} [{row[prefix + 'low']:.3f}, {row[prefix + 'high']:.3f}]"
                    for _, row in routing.iterrows()
                ]
            }
        )
    title = "WD on as many tokens of the text ÷ WD on the expert's own (control: two random draws)"
    return Table(
        "routing", routing, title, {"wd_inside": ".4f", "wd_outside": ".4f"},
        keys=("block", "projection"), shown=shown,
    )  # fmt: skip


def score_tables(scores: "NeuronScores", summary: "pd.DataFrame", *, top: int) -> list[Table]:
    """Return the tables of the layers and of the ``top`` neurons."""
    shown = summary.drop(columns=["WD–MD ρ", "low", "high"])
    if summary["WD–MD ρ"].notna().any():
        shown["WD–MD ρ [95 %]"] = summary.apply(
            lambda row: f"{row['WD–MD ρ']:.3f} [{row['low']:.3f}, {row['high']:.3f}]", axis=1
        )
    first, ranking = scores.layers.iloc[0], scores.top(top)
    ranked = ranking[[name for name in TOP_COLUMNS if name != "flag"]]
    ranked.insert(0, "rank", range(1, len(ranked) + 1))
    few, most = scores.layers["n_tokens"].min(), scores.layers["n_tokens"].max()
    tokens = f"{most:,}" if few == most else f"{few:,} to {most:,}"  # each expert sees its own
    title = (
        f"Wasserstein distance by layer ({first['method']}, {tokens} tokens, "
        f"special tokens: {scores.special_tokens})"
    )
    settings: dict[str, Any] = {"formats": FORMATS, "optional": OPTIONAL}
    return [
        Table("layers", summary, title, keys=("layer",), shown=shown, **settings),
        Table(
            "neurons", ranking, f"The {len(ranking)} largest WD", shown=ranked,
            keys=("rank", "layer", "neuron", "wd"), **settings,
        ),
    ]  # fmt: skip
