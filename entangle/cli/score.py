"""``entangle score``: rank the neurons of some layers."""

import argparse
from typing import TYPE_CHECKING

from entangle.cli import options
from entangle.cli.tables import print_json, print_table, records, say
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
    group.add_argument("--no-md", action="store_true", help="skip the mapping difficulty")
    options.add_memory_option(group)
    group.add_argument("--batch-size", type=int, help="sequences in one forward pass")
    parser.add_argument("--top", type=int, default=20, help="rows to print (default: 20)")
    options.add_run_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Score, print and save."""
    from entangle.checks import whole
    from entangle.runs.provenance import check_output
    from entangle.seeding import check_seed

    check_seed(arguments.seed)
    whole("--top", arguments.top, least=1)
    memory = options.parse_memory(arguments.memory)
    if arguments.out is not None:
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
        progress=not arguments.quiet,
    )
    if effect is not None:
        scores = scores.with_settings(special_tokens_effect=effect.describe())
    if arguments.out is not None and current().leads:
        scores.save(arguments.out, force=arguments.force)
    if arguments.json:
        print_json(as_json(scores, top=arguments.top, out=arguments.out, seed=arguments.seed))
    else:
        print_scores(scores, top=arguments.top, out=arguments.out, seed=arguments.seed)


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


def as_json(scores: "NeuronScores", *, top: int, out: str | None, seed: int) -> dict[str, object]:
    """Return what ``--json`` prints."""
    return {
        "out": out,
        "manifest": dict(scores.manifest),
        "layers": records(scores.layers),
        "summary": records(layer_summary(scores, seed=seed)),
        "top": records(scores.top(top)),
    }


def print_scores(scores: "NeuronScores", *, top: int, out: str | None, seed: int) -> None:
    """Print the summary of the layers, the ranking, and where the result went."""
    summary = layer_summary(scores, seed=seed)
    if summary["WD–MD ρ"].notna().any():
        interval = summary.apply(
            lambda row: f"{row['WD–MD ρ']:.3f} [{row['low']:.3f}, {row['high']:.3f}]", axis=1
        )
        summary["WD–MD ρ [95 %]"] = interval
    summary = summary.drop(columns=["WD–MD ρ", "low", "high"])
    first = scores.layers.iloc[0]
    print_table(
        summary,
        title=f"Wasserstein distance by layer ({first['method']}, {first['n_tokens']:,} tokens, "
        f"special tokens: {scores.special_tokens})",
        formats=FORMATS,
        optional=OPTIONAL,
    )
    ranking = scores.top(top)[list(TOP_COLUMNS)]
    ranking.insert(0, "rank", range(1, len(ranking) + 1))
    print_table(
        ranking.drop(columns="flag"),
        title=f"The {len(ranking)} largest WD",
        formats=FORMATS,
        optional=OPTIONAL,
    )
    flagged = scores.frame[scores.frame["flag"] != ""]
    for flag, count in flagged["flag"].value_counts().items():
        say(f"{count} neuron(s) with {flag} outputs have no score.")
    if (flagged["flag"] == "coarse").any():
        say(
            "Coarse ones have a WD that may be wrong by more than 0.05 (see wd_bound): score them "
            "with --method exact, or a model in float32."
        )
    if out is not None:
        say(f"Saved to {out}.")
