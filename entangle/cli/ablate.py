"""``entangle ablate``: what happens when chosen neurons are changed."""

import argparse
from collections.abc import Sequence
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
    from entangle.evaluation import EvaluationText, MinimalPairs
    from entangle.experiments.selection import Selection
    from entangle.models.loading import LanguageModel
    from entangle.results.ablation import AblationResult
    from entangle.results.scores import NeuronScores


SELECTIONS, STRENGTHS = "top,bottom,random", "0.9,0.95,0.99"
MEASURES = ("perplexity", "divergence", "blimp")
DIFFERENCES = {"kl": "KL", "top1_agreement": "Top-1 agreement", "accuracy": "Accuracy"}
"""Measures whose arms are compared by their difference, and their names."""
MEASURED = ("perplexity", "perplexity_ratio", "kl", "top1_agreement", "accuracy",
            "accuracy_difference")  # fmt: skip
TABLES = (*MEASURED, *(f"{name}-contrasts" for name in ("perplexity", *DIFFERENCES)), "matched")
OPTIONAL = ("rows", "seeds", "top_gap", "router", "experts", "by", "layers")
FORMATS = {
    "strength": ".3g", "experts": "d", "seeds": "d", "value": ",.5g", "95 % low": ",.5g",
    "95 % high": ",.5g", "zeros": ".4f", "rows": ",d", "ratio": ",.4g", "difference": "+.4g",
    "low": ",.4g", "high": ",.4g", "matched": ".3f",
}  # fmt: skip


def add_parser(subparsers: options.Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "ablate",
        help="prune or edit chosen neurons and measure what that costs",
        description="Change the top neurons by a score, and controls, each from the dense weights, "
        "and measure perplexity, divergence from the dense model, or minimal pairs.",
    )
    options.add_model_options(parser)
    options.add_layer_options(parser)
    options.add_calibration_options(parser, holds_back=True)
    _add_selection_options(parser)
    _add_arm_options(parser)
    _add_measure_options(parser)
    parser.add_argument(
        "--resume", action="store_true",
        help="go on with an unfinished ablation; print a finished one again",
    )  # fmt: skip
    options.add_run_options(parser, *TABLES)
    options.add_dry_run_option(parser)
    parser.set_defaults(run=run, show=show)


def _add_selection_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("selection")
    group.add_argument(
        "--scores", metavar="DIR", help="scores of this model, from entangle score; by default the "
        "layers are scored on the calibration text"
    )  # fmt: skip
    group.add_argument(
        "--select",
        help="comma-separated: top, bottom, random, random-norm, random-variance, all, or a .csv "
        f"or .parquet file with columns layer and neuron (default: {SELECTIONS})",
    )  # fmt: skip
    group.add_argument(
        "--by", default="wd",
        help="columns of the scores that top and bottom rank: wd, md, mean, abs_mean, variance, "
        "skewness, abs_skewness, excess_kurtosis, ks, weight_norm (default: wd)",
    )  # fmt: skip
    group.add_argument("--fraction", type=float, help="share of the neurons (default: 0.03)")
    group.add_argument("--count", type=int, help="number of neurons, in place of --fraction")
    group.add_argument(
        "--scope", default="layer", choices=("layer", "model"),
        help="choose in every layer by itself, or over all layers (default: layer)",
    )  # fmt: skip
    group.add_argument("--seeds", type=int, default=5, help="draws of random arms (default: 5)")


def _add_arm_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("intervention")
    group.add_argument(
        "--intervention", default="prune",
        help="comma-separated: prune (SparseGPT), prune-wanda, prune-magnitude, prune-random, "
        "zero, mean, clamp-negative, clamp-positive, flip-negative (default: prune)",
    )  # fmt: skip
    group.add_argument("--strength", help=f"sparsities of pruned rows (default: {STRENGTHS})")
    options.add_allocation_option(
        group,
        text="in place of --select and --strength: prune all rows of its layers as it says, and "
        "beside that to the same number of zeros spread evenly",
    )
    group.add_argument(
        "--edit-strength", default="1", help="shares of an edit of outputs, 0 to 1 (default: 1)"
    )
    group.add_argument(
        "--experts",
        default="1",
        help="numbers of experts that hold pruned rows, for example 1,16 (default: 1)",
    )
    group.add_argument(
        "--router", default="kmeans",
        help="kmeans, the control random (clusters without meaning), or both: kmeans,random "
        "(default: kmeans)",
    )  # fmt: skip
    group.add_argument(
        "--match", action="store_true",
        help="also find the share of low-scoring neurons that costs as much perplexity",
    )  # fmt: skip
    group.add_argument("--damping", type=float, default=0.01, help="(default: 0.01)")
    group.add_argument("--no-md", action="store_true", help="skip the mapping difficulty")
    options.add_memory_option(group)


def _add_measure_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measures")
    group.add_argument(
        "--measure", default="perplexity",
        help="comma-separated: perplexity, divergence (KL and top-1 agreement with the dense "
        "model), blimp (minimal pairs) (default: perplexity)",
    )  # fmt: skip
    options.add_evaluation_options(group, default="demo, the articles that are not calibrated on")
    group.add_argument(
        "--pairs", default="blimp", metavar="SOURCE",
        help="minimal pairs: blimp, or a .jsonl file or a folder of them (default: blimp)",
    )  # fmt: skip
    group.add_argument("--pairs-per-paradigm", type=int, help="take a random subset of the pairs")


def run(arguments: argparse.Namespace) -> None:
    """Ablate, print and save."""
    from entangle.runs.provenance import check_output
    from entangle.seeding import check_seed

    check_seed(arguments.seed)
    memory = options.parse_memory(arguments.memory)
    measures = _measures(arguments)
    settings: dict[str, Any] = {
        "interventions": options.names(arguments.intervention),
        "strengths": options.numbers(
            STRENGTHS if arguments.strength is None else arguments.strength, float
        ),
        "edit_strengths": options.numbers(arguments.edit_strength, float),
        "experts": options.numbers(arguments.experts, int),
    }
    if not (arguments.resume and _is_result(arguments.out)):
        check_output(arguments.out, force=arguments.force)
    from entangle.experiments.ablate import ablate
    from entangle.experiments.arms import check_settings

    routers = options.names(arguments.router)
    check_settings(**settings, routers=routers)
    allocation = _allocation(arguments)
    scores = _scores(arguments)
    selections = _selections(arguments, scores)
    _default_data(arguments)
    model = options.load_model(arguments)
    text, pairs = _text(arguments, model, measures), _pairs(arguments, measures)
    result = ablate(
        model,
        options.load_calibration(arguments, model),
        evaluation=text,
        pairs=pairs,
        measures=["pairs" if name == "blimp" else name for name in measures],
        scores=scores,
        **options.chosen_layers(arguments, allocation),
        selections=selections,
        by=options.names(arguments.by),
        fraction=arguments.fraction,
        count=arguments.count,
        scope=arguments.scope,
        seeds=arguments.seeds,
        **settings,
        allocation=allocation,
        router=routers,
        damping=arguments.damping,
        match=arguments.match,
        md=not arguments.no_md,
        seed=arguments.seed,
        memory=memory,
        out=arguments.out,
        resume=arguments.resume,
        force=arguments.force,
        extra=save_figures,
        progress=False if arguments.quiet else None,
    )
    if not current().leads:  # the first rank draws and prints
        return
    print_result(result, arguments)


def show(arguments: argparse.Namespace) -> None:
    """Print the ablation that was made before."""
    from entangle.results.ablation import load_ablation

    print_result(load_ablation(arguments.out), arguments)


def _is_result(out: str) -> bool:
    """Tell whether a folder holds a finished result, which may be the one that is asked for."""
    from entangle.runs.provenance import expand_user

    return (expand_user(out) / "manifest.json").is_file()


def print_result(result: "AblationResult", arguments: argparse.Namespace) -> None:
    """Print the tables of a result (`ablation_tables`), its figures, and where it is."""
    from entangle.runs.provenance import expand_user

    figures = save_figures(result, expand_user(arguments.out))
    content = {
        "out": arguments.out,
        "manifest": dict(result.manifest),
        "results": records(result.frame),
        "contrasts": records(_contrasts(result)),
        "differences": _differences(result),
        "matched": records(result.matched),
        "figures": figures,
    }
    said = [*(f"Figure: {path}" for path in figures), *_few_pairs(result)]
    present(arguments, ablation_tables(result), content, said=said, out=arguments.out)


def _few_pairs(result: "AblationResult") -> list[str]:
    """Tell what few minimal pairs do to the intervals of differences of accuracies."""
    from entangle.stats.intervals import FEW, SPARSE

    pairs = result.pairs
    if "paradigm" not in pairs:
        return []
    sizes = pairs.drop_duplicates("pair")["paradigm"].value_counts()
    if sizes.sum() < FEW:
        return [
            f"{sizes.sum()} minimal pairs are too few for intervals of differences and of the mean "
            f"over paradigms: give {FEW} or more."
        ]
    if sizes.min() >= FEW:
        return []
    said = (
        f"Minimal pairs are resampled together, not within paradigms: {sizes.idxmin()!r} has "
        f"{sizes.min()}, fewer than {FEW}."
    )
    if sizes.min() < min(SPARSE, sizes.max()):
        said += " So few beside more leave the mean over paradigms without an interval."
    return [said]


def ablation_tables(result: "AblationResult") -> list[Table]:
    """Return a table for every measure over all pairs or windows, and the comparisons."""
    names = {"selection": "neurons", "value": "value", "low": "95 % low", "high": "95 % high",
             "n_rows": "rows", "realised_sparsity": "zeros"}  # fmt: skip
    gaps = ["top_gap", "top_gap_low", "top_gap_high"]
    keys = ("neurons", "intervention", "strength", "selection", "value", "ratio", "difference")
    settings: dict[str, Any] = {"formats": FORMATS, "optional": OPTIONAL, "keys": keys}
    measures = [name for name in result.frame["measure"].unique() if ":" not in name]
    found = []
    for measure in measures:
        table = result.summary(measure)
        shown = _without_router(table.drop(columns=["smallest", "largest", *gaps]))
        shown = shown.rename(columns=names)
        title = measure.replace("_", " ")
        found.append(Table(measure, table, title, shown=shown, **settings))
    allocated = result.frame["selection"].eq("allocation").any()
    first = "the allocation" if allocated else "the top neurons"
    for measure in ("perplexity", *DIFFERENCES):
        table = _without_router(_contrasts(result, measure))
        if measure in measures and len(table):
            name, sign = DIFFERENCES.get(measure, "Perplexity"), "÷" if "ratio" in table else "−"
            title = f"{name} after {first} {sign} after the others (paired bootstrap, 95 %)"
            found.append(Table(f"{measure}-contrasts", table, title, **settings))
    if len(result.matched):
        columns = ["intervention", "strength", "by", "matched", "low", "high"]
        table = result.matched[columns].drop_duplicates()
        title = "Share of low-scoring neurons that costs as much perplexity as the top ones"
        found.append(Table("matched", table, title, FORMATS, keys=("intervention", "strength")))
    return found


def save_figures(result: "AblationResult", folder: Path) -> list[str]:
    """Draw every measure against strength into a result's folder, if missing; return the files."""
    from entangle.plotting import save_figure

    wanted = ("perplexity_ratio", "kl", "accuracy")
    found = [name for name in wanted if name in set(result.frame["measure"])]
    stems = {name: folder / "figures" / f"ablation_{name}" for name in found}
    for name, stem in stems.items():
        if not stem.with_suffix(".csv").exists():  # written last
            save_figure(result.plot(name), stem, force=True)
    return [
        str(file) for stem in stems.values() for file in sorted(stem.parent.glob(f"{stem.name}.*"))
    ]


def _contrasts(result: "AblationResult", measure: str = "perplexity") -> "pd.DataFrame":
    if measure not in set(result.frame["measure"]):
        return result.frame.iloc[:0]
    return result.contrasts(measure)


def _differences(result: "AblationResult") -> list[dict[str, object]]:
    """Return the comparisons of all measures but perplexity, paradigms included."""
    found = [
        name
        for name in result.frame["measure"].unique()
        if name in DIFFERENCES or name.startswith("accuracy:")
    ]
    return [row | {"measure": m} for m in found for row in records(_contrasts(result, m))]


def _without_router(table: "pd.DataFrame") -> "pd.DataFrame":
    """Leave out a column that says nothing."""
    silent = "router" in table and table["router"].eq("").all()
    return table.drop(columns="router") if silent else table


def _measures(arguments: argparse.Namespace) -> list[str]:
    from entangle.checks import choices

    known = with_installed("measures", MEASURES)
    return choices("--measure", options.names(arguments.measure), known, kind="measure")


def _default_data(arguments: argparse.Namespace) -> None:
    """Evaluate on the demo's articles that are not calibrated on, unless told otherwise."""
    if arguments.evaluation is None:
        arguments.evaluation = "demo"
        arguments.evaluation_split = arguments.evaluation_split or "test"


def _allocation(arguments: argparse.Namespace) -> "Allocation | None":
    for name in ("select", "strength"):
        if arguments.allocation is not None and getattr(arguments, name) is not None:
            raise InvalidInput(f"--{name} has no meaning beside --allocation; drop one of them.")
    return options.load_allocation(arguments)


def _scores(arguments: argparse.Namespace) -> "NeuronScores | None":
    if arguments.scores is None:
        return None
    from entangle.results.scores import load_scores

    return load_scores(arguments.scores)


def _selections(
    arguments: argparse.Namespace, scores: "NeuronScores | None"
) -> "list[str | Selection]":
    """Return the rules by name and the lists of neurons that files hold."""
    found: list[str | Selection] = []
    for name in options.names(SELECTIONS if arguments.select is None else arguments.select):
        if not name.lower().endswith((".csv", ".parquet")):
            found.append(name)
            continue
        if scores is None:
            raise InvalidInput(
                f"the neurons in {name!r} are looked up in the scores; give --scores DIR."
            )
        from entangle.experiments.selection import read_selection

        found.append(read_selection(name, scores.frame))
    return found


def _text(
    arguments: argparse.Namespace, model: "LanguageModel", measures: Sequence[str]
) -> "EvaluationText | None":
    if set(measures) <= {"blimp"}:
        return None
    return options.load_evaluation(arguments, model)


def _pairs(arguments: argparse.Namespace, measures: Sequence[str]) -> "MinimalPairs | None":
    if "blimp" not in measures:
        return None
    from entangle.evaluation import load_minimal_pairs

    return load_minimal_pairs(
        arguments.pairs, n_per_paradigm=arguments.pairs_per_paradigm, seed=arguments.seed,
        **options.special_tokens(arguments),
    )  # fmt: skip
