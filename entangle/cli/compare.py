"""``entangle compare``: pruning methods and expansions at several sparsities."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from entangle.cli import options
from entangle.cli.tables import print_json, print_table, records, say
from entangle.errors import InvalidInput
from entangle.ranks import current
from entangle.runs.progress import tell

if TYPE_CHECKING:
    from entangle.experiments.compare import Comparison, Named


SPARSITIES = "0.5,0.6,0.7,0.8"
FORMATS = {
    "sparsity": ".2f", "perplexity": ",.3f", "ratio": ".3f", "ratio_low": ".3f",
    "ratio_high": ".3f", "flops": ".3f", "nonzeros": ".3f", "bytes": ".3f",
    "relative_error": ".4f", "seconds": ".0f", "competitor_perplexity": ",.3f",
    "uniform_ratio": ".3f", "uniform_low": ".3f", "uniform_high": ".3f",
}  # fmt: skip


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
        help="comma-separated (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--sparsity", help=f"(default: {SPARSITIES}, or those of the allocations)")
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
    options.add_evaluation_options(group, default="")
    options.add_memory_option(group)
    group.add_argument("--resume", action="store_true", help="go on with an unfinished comparison")
    options.add_run_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Compare, print and save."""
    from entangle.experiments.compare import arms, compare

    options.check_run(arguments)
    allocations = options.load_allocations(arguments)
    methods, sparsity = options.names(arguments.methods), _sparsities(arguments, allocations)
    experts = options.numbers(arguments.experts, int)
    arms(methods, sparsity, experts, allocations=allocations)  # checked before anything is loaded
    memory = options.parse_memory(arguments.memory)
    model = options.load_model(arguments)
    calibration = options.load_calibration(arguments, model)
    text = options.load_evaluation(arguments, model)
    options.tell_special_tokens(arguments, model, text)
    from entangle.results.comparison import at_equal_nonzeros
    from entangle.runs.provenance import expand_user

    evaluated = f"{text.source}, n = {text.n_windows} windows of {text.seq_len} tokens"
    drawn = []

    def add_figure(found: "Comparison", folder: Path) -> None:
        drawn.append(draw(found, folder, evaluated=evaluated))

    found = compare(
        model, calibration, text, methods=methods, sparsity=sparsity, experts=experts,
        allocations=allocations, seed=arguments.seed, memory=memory, out=arguments.out,
        resume=arguments.resume, force=arguments.force, extra=add_figure,
        progress=False if arguments.quiet else None,
    )  # fmt: skip
    if not current().leads:  # the first rank draws and prints
        return
    if arguments.out is not None and not drawn:  # read, for it was made before
        add_figure(found, expand_user(arguments.out))
    equal = at_equal_nonzeros(found.frame)
    if arguments.json:
        tables = {"results": records(found.frame), "equal_nonzeros": records(equal)}
        print_json({"out": arguments.out, "manifest": dict(found.manifest), **tables})
        return
    print_table(found.frame, title="Perplexity by method", formats=FORMATS)
    if not equal.empty:
        title = "At equal stored non-zeros (from 1 × dense on, dense itself is the competitor)"
        print_table(equal, title=title, formats=FORMATS)
    if arguments.out is not None:
        say(f"Saved to {arguments.out}.")


def _sparsities(arguments: argparse.Namespace, allocations: "Sequence[Named]") -> list[float]:
    """Return the sparsities asked for, or those of the allocations."""
    if arguments.sparsity is None and allocations:
        from entangle.allocation.experts import nominal_sparsity

        return list(dict.fromkeys(nominal_sparsity(one) for _, one in allocations))
    asked = SPARSITIES if arguments.sparsity is None else arguments.sparsity
    return options.numbers(asked, float)


def draw(found: "Comparison", folder: Path, *, evaluated: str) -> bool:
    """Draw the figure, which names the text ``evaluated``, into the result's folder, if missing.

    False is returned where there is nothing to draw.
    """
    from entangle.plotting import figure_comparison, save_figure

    stem = folder / "figures" / "perplexity"
    if stem.with_suffix(".csv").exists():  # written last
        return True
    try:
        figure = figure_comparison(found.frame, text=evaluated)
    except InvalidInput as error:  # no arm has a finite perplexity: the tables say so
        tell(f"no figure: {error}")
        return False
    save_figure(figure, stem, force=True)
    return True
