"""``entangle demo``: the main job on the demo model, from download to figures."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from entangle.cli.options import Subparsers, add_table_options
from entangle.cli.tables import present, records, say
from entangle.runs.progress import tell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from entangle.models.loading import LanguageModel
    from entangle.results.ablation import AblationResult
    from entangle.results.scores import NeuronScores


PAGE = "report.html"
LAYER = "model.layers.1.mlp.gate_proj"
TOP = 10
TABLES = ("layers", "neurons", "perplexity", "perplexity_ratio", "perplexity-contrasts")
ABLATED = ("*.mlp.gate_proj", "*.mlp.up_proj")
STRENGTHS, SEEDS, EVAL_WINDOWS, EVAL_SEQ_LEN = (0.95, 0.99), 5, 10, 512


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "demo",
        help="score and ablate the neurons of the demo model, with figures",
        description="Fetch the demo model and text once, score a layer, print the ranking, prune "
        "the top neurons of every block against controls, and write figures and a page.",
    )
    parser.add_argument(
        "--out", default="entangle-demo", metavar="DIR", help="result folder (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing result")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_table_options(parser, *TABLES)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Fetch, score, ablate, print and draw."""
    from entangle.cli.ablate import ablation_tables
    from entangle.cli.score import layer_summary, score_tables
    from entangle.runs.provenance import check_output, output_folder

    check_output(arguments.out, force=arguments.force)
    from entangle.models.loading import load_model
    from entangle.plotting import save_figure
    from entangle.report import write_report
    from entangle.scoring.score import score
    from entangle.texts.calibration import load_calibration

    _say(arguments, "loading the demo model")
    model = load_model("demo")
    _say(arguments, "reading the demo text")
    calibration = load_calibration("demo", model.tokenizer)
    scores = score(model, calibration, layers=LAYER, method="exact", progress=not arguments.quiet)
    summary = layer_summary(scores, seed=0)
    tables = score_tables(scores, summary, top=TOP)
    early = not (arguments.json or arguments.csv or arguments.latex or arguments.table)
    if early:  # the rest takes minutes
        present(arguments, tables, {})
    with output_folder(arguments.out, force=arguments.force) as folder:
        scores.write(folder)
        for name, figure in first_figures(scores).items():
            save_figure(figure, folder / "figures" / name)
        ablated = _ablate(arguments, model, folder / "ablation")
        _say(arguments, "putting the neurons on a page")
        write_report(
            scores, folder / PAGE, runs=[ablated], model=model, calibration=calibration,
            progress=not arguments.quiet,
        )  # fmt: skip
    files = sorted(Path(arguments.out).rglob("*.png"))
    page = (Path(arguments.out) / PAGE).resolve().as_uri()
    content = {
        "out": arguments.out,
        "summary": records(summary),
        "top": records(scores.top(TOP)),
        "ablation": records(ablated.frame),
        "figures": list(map(str, files)),
        "page": page,
    }
    said = [f"Figure: {file} (also .pdf, .csv, captions)" for file in files]
    tables = ablation_tables(ablated) if early else [*tables, *ablation_tables(ablated)]
    present(arguments, tables, content, said=said, out=arguments.out)
    if not (arguments.json or arguments.csv or arguments.latex):
        say(f"The neurons on a page: {page}")


def _ablate(arguments: argparse.Namespace, model: "LanguageModel", out: Path) -> "AblationResult":
    """Prune the top 3 % of all gate and up rows against controls, on articles of their own."""
    from entangle.cli.ablate import save_figures
    from entangle.evaluation import load_evaluation
    from entangle.experiments.ablate import ablate
    from entangle.texts.calibration import load_calibration

    _say(arguments, "pruning the top 3 % of all gate and up rows, and controls")
    return ablate(
        model,
        load_calibration("demo", model.tokenizer, split="train"),
        evaluation=load_evaluation(
            "demo", model.tokenizer, split="test", seq_len=EVAL_SEQ_LEN, n_windows=EVAL_WINDOWS
        ),
        layers=ABLATED,
        proj=None,
        strengths=STRENGTHS,
        seeds=SEEDS,
        md=False,
        out=out,
        extra=save_figures,
        progress=not arguments.quiet,
    )


def first_figures(scores: "NeuronScores") -> dict[str, "Figure"]:
    """Draw the figures of one layer: WD, top and typical neuron, chosen neurons, WD against MD."""
    from entangle.plotting import (
        NeuronOutput,
        figure_output_distributions,
        figure_top_and_typical,
        figure_wd_against_md,
        figure_wd_distribution,
    )

    chosen = [
        NeuronOutput.of(
            row,
            scores.histogram(row["layer"], int(row["neuron"])),
            label=f"neuron {row['neuron']}",
            role="top",
        )
        for _, row in scores.top(6).iterrows()
    ]
    return {
        "wd_distribution": figure_wd_distribution(scores.frame, scores.layers, column="single"),
        "top_and_typical": figure_top_and_typical(scores.frame, scores.histogram),
        "top_outputs": figure_output_distributions(chosen),
        "wd_against_md": figure_wd_against_md(scores.frame, column="single"),
    }


def _say(arguments: argparse.Namespace, what: str) -> None:
    if not arguments.quiet:
        tell(what)
