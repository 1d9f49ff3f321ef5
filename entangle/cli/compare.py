"""``entangle compare``: pruning methods and expansions at several sparsities."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entangle.checks import share
from entangle.cli import options
from entangle.cli.tables import Table, present, records
from entangle.doors import with_installed
from entangle.errors import InvalidInput
from entangle.ranks import current
from entangle.runs.progress import tell
from entangle.runs.provenance import expand_user

if TYPE_CHECKING:
    import pandas as pd

    from entangle.experiments.compare import Comparison, Named


SPARSITIES = "0.5,0.6,0.7,0.8"
FORMATS = {
    "sparsity": ".2f", "perplexity": ",.3f", "ratio": ".3f", "ratio_low": ".3f",
    "ratio_high": ".3f", "flops": ".3f", "nonzeros": ".3f", "bytes": ".3f",
    "relative_error": ".4f", "seconds": ".0f", "competitor_perplexity": ",.3f",
    "uniform_ratio": ".3f", "uniform_low": ".3f", "uniform_high": ".3f", "density": ".3f",
    "token_bytes": ".3f",
    "increase": ".0%", "saved": ".3f", "within": ".2f", "doubling": ".2f", "step": ".2f",
    "low": ".3f", "high": ".3f",
}  # fmt: skip


TABLES = ("results", "flops-saved", "equal-nonzeros", "knees")
KEYS = ("method", "sparsity", "experts", "allocation")
OPTIONAL = (
    "seconds", "competitor_perplexity", "relative_error", "uniform_low", "uniform_high",
    "uniform_ratio", "flops", "bytes", "nonzeros", "token_bytes", "ratio_low", "ratio_high",
    "ratio",
)  # fmt: skip
"""The least important columns first."""


def add_parser(subparsers: options.Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "compare",
        help="compare pruning methods and expansions",
        description="Prune and expand a model's MLP linears at several sparsities and measure "
        "perplexity on another text than they were calibrated on.",
    )
    options.add_model_options(parser)
    options.add_calibration_options(parser, holds_back=True)
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--methods", default="magnitude,wanda,sparsegpt,expansion,expansion-random",
        help="comma-separated; `entangle list` names all (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--sparsity", help=f"(default: {SPARSITIES}, or those of the allocations)")
    group.add_argument("--density", help="1 − sparsity, in its place: for example 0.25,0.5,0.75")
    group.add_argument(
        "--scope",
        default="mlp",
        choices=("mlp", "all"),
        help="linears of the blocks whose activations may be masked, and whose multiply-adds "
        "densities count (default: %(default)s)",
    )
    group.add_argument(
        "--form",
        choices=("threshold", "topk"),
        help="how activations are masked (default: as published)",
    )
    group.add_argument(
        "--dense-prefix",
        type=int,
        default=0,
        metavar="N",
        help="first tokens of a window whose activations are not masked (default: 0)",
    )
    group.add_argument(
        "--prefix", type=int, default=0, metavar="N",
        help="first tokens of a window that are not scored; griffin and coreinfer choose their "
        "neurons from them (default: 0)",
    )  # fmt: skip
    options.add_allocation_option(
        group,
        text="comma-separated files from `entangle allocate`, or NAME=FILE: every method is also "
        "built with each of them, on their layers",
    )
    group.add_argument(
        "--experts",
        default="16",
        help="for example 1,2,4,8,16,32; one expert is plain pruning (default: 16)",
    )
    group.add_argument(
        "--router",
        default="kmeans",
        choices=with_installed("routers", ("kmeans", "random")),
        help="of the method expansion, which is then expansion:ROUTER (default: kmeans)",
    )
    group.add_argument(
        "--measure",
        default="perplexity",
        help="measures of installed packages beside perplexity, a column each (`entangle list "
        "measures`)",
    )
    options.add_evaluation_options(group, default="")
    options.add_memory_option(group)
    group.add_argument("--resume", action="store_true", help="go on with an unfinished comparison")
    options.add_run_options(parser, *TABLES)
    options.add_dry_run_option(parser)
    parser.set_defaults(run=run, show=show)


def run(arguments: argparse.Namespace) -> None:
    """Compare, print and save."""
    from entangle.experiments.compare import arms, compare

    options.check_run(arguments)
    allocations = options.load_allocations(arguments)
    methods, sparsity = options.names(arguments.methods), _sparsities(arguments, allocations)
    if arguments.router != "kmeans":
        methods = [_with_router(one, arguments.router) for one in methods]
    experts = options.numbers(arguments.experts, int)
    arms(methods, sparsity, experts, allocations=allocations)  # checked before anything is loaded
    memory = options.parse_memory(arguments.memory)
    model = options.load_model(arguments)
    calibration = options.load_calibration(arguments, model)
    text = options.load_evaluation(arguments, model)
    options.tell_special_tokens(arguments, model, text)
    drawn = []

    def add_figure(found: "Comparison", folder: Path) -> None:
        drawn.append(folder)
        draw(found, folder)

    found = compare(
        model, calibration, text, methods=methods, sparsity=sparsity, experts=experts,
        allocations=allocations, seed=arguments.seed, memory=memory, out=arguments.out,
        resume=arguments.resume, force=arguments.force, extra=add_figure,
        scope=arguments.scope, form=arguments.form, dense_prefix=arguments.dense_prefix,
        prefix=arguments.prefix,
        measures=[one for one in options.names(arguments.measure) if one != "perplexity"],
        progress=not arguments.quiet,
    )  # fmt: skip
    if not current().leads:  # the first rank draws and prints
        return
    if not drawn:  # read, for it was made before
        draw(found, expand_user(arguments.out))
    print_comparison(found, arguments)


def show(arguments: argparse.Namespace) -> None:
    """Print the comparison that was made before."""
    from entangle.results.comparison import load_comparison

    found = load_comparison(arguments.out)
    draw(found, expand_user(arguments.out))
    print_comparison(found, arguments)


def print_comparison(found: "Comparison", arguments: argparse.Namespace) -> None:
    """Print the tables, and say where the result is."""
    from entangle.results.comparison import at_equal_nonzeros, flops_saved, knees

    saved = flops_saved(found)
    equal, knee = at_equal_nonzeros(found.frame), knees(found.frame)
    content = {
        "out": arguments.out,
        "manifest": dict(found.manifest),
        "results": records(found.frame),
        "flops_saved": records(saved),
        "equal_nonzeros": records(equal),
        "knees": records(knee),
    }
    title = "At equal stored non-zeros (from 1 × dense on, dense itself is the competitor)"
    settings: dict[str, Any] = {"formats": FORMATS, "optional": OPTIONAL}
    tables = [
        Table(
            "results",
            found.frame,
            "Perplexity by method",
            keys=(*KEYS, "perplexity"),
            shown=_telling(found.frame),
            **settings,
        ),
        Table(
            "flops-saved",
            saved,
            "FLOPs saved at a higher perplexity (not reached: at least as much)",
            keys=("method", "increase", "saved"),
            shown=_telling(saved),
            **settings,
        ),
        Table(
            "equal-nonzeros",
            equal,
            title,
            keys=(*KEYS, "competitor", "ratio"),
            shown=_telling(equal),
            **settings,
        ),
    ]
    if not knee.empty:
        tables.append(Table("knees", knee, "Sparsity up to which perplexity hardly rises",
                            keys=("method", "within", "doubling"), shown=_telling(knee),
                            **settings))  # fmt: skip
    present(arguments, tables, content, out=arguments.out)


def _telling(table: "pd.DataFrame") -> "pd.DataFrame":
    """Leave out a column that says nothing."""
    return table.drop(columns="allocation") if table["allocation"].eq("uniform").all() else table


def _with_router(method: str, router: str) -> str:
    plain = method.split(":")[-1] == "expansion"
    return f"{method}:{router}" if plain else method


def _sparsities(arguments: argparse.Namespace, allocations: "Sequence[Named]") -> list[float]:
    """Return the sparsities asked for, or those of the allocations."""
    if arguments.density is not None:
        if arguments.sparsity is not None:
            raise InvalidInput("--density is 1 − --sparsity; give one of them.")
        return [1 - share("--density", one) for one in options.numbers(arguments.density, float)]
    if arguments.sparsity is None and allocations:
        from entangle.allocation.experts import nominal_sparsity

        return list(dict.fromkeys(nominal_sparsity(one) for _, one in allocations))
    asked = SPARSITIES if arguments.sparsity is None else arguments.sparsity
    return options.numbers(asked, float)


def draw(found: "Comparison", folder: Path) -> None:
    """Draw the figure into the result's folder, if it is missing and there is something to draw."""
    from entangle.plotting import figure_comparison, figure_density, save_figure
    from entangle.results.drawings import text_of

    stem = folder / "figures" / "perplexity"
    if stem.with_suffix(".csv").exists():  # written last
        return
    try:
        figure = figure_comparison(found.frame, text=text_of(found.manifest))
    except InvalidInput as error:  # no arm has a finite perplexity: the tables say so
        tell(f"no figure: {error}")
        return
    if found.masks:
        drawn = figure_density(found.frame, text=text_of(found.manifest))
        save_figure(drawn, folder / "figures" / "density", force=True)
    save_figure(figure, stem, force=True)
