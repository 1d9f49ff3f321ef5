"""``entangle allocate``: from scores to zeros per neuron."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entangle.cli import options
from entangle.cli.tables import Table, present, records
from entangle.errors import InvalidInput

if TYPE_CHECKING:
    from entangle.allocation import Allocation
    from entangle.cli.trials import Counts, Job
    from entangle.models.loading import LanguageModel
    from entangle.results.scores import NeuronScores


TABLES = ("layers", "total", "search")
SEARCH, PROTECT = "search", "protect"
_FORMATS = {
    "rows": ",d", "zeros": ",d", "sparsity": ".4f", "lowest": ".4f", "highest": ".4f",
    "weights": ",d", "experts": ".4g", "perplexity": ",.4g", "strength": ".4g", "protect": ".4g",
}  # fmt: skip


def add_parser(subparsers: options.Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "allocate",
        help="turn scores into a sparsity for every neuron",
        description="Decide how many weights of every neuron are to be zero, under one budget that "
        "is met to the single weight.",
    )
    parser.add_argument("scores", metavar="SCORES", help="folder that `entangle score` wrote")
    _add_rule_options(parser)
    _add_search_options(parser)
    _add_expert_options(parser)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", help="the model that was scored, where it is elsewhere than it was then"
    )
    options.add_loading_options(group)
    options.add_layer_options(parser)
    options.add_calibration_options(parser, holds_back=True)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--export", action="append", default=[], metavar="FORMAT:FILE",
        help="also write it for another tool: llmcompressor:x.yaml, alphapruning:x.npy, "
        "evopress:x.txt, csv:x.csv or safetensors:x.safetensors; may be given several times",
    )  # fmt: skip
    group.add_argument(
        "--plot", metavar="FILE", help="draw it; FILE.pdf, FILE.png and FILE.csv are written"
    )
    options.add_run_options(parser, *TABLES, ending=".safetensors", file=True)
    options.add_dry_run_option(parser)
    parser.set_defaults(run=run, show=show)


def _add_rule_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rule")
    group.add_argument("--sparsity", type=float, required=True, help="share of zeros, over all")
    group.add_argument(
        "--rule", default=PROTECT,
        help="uniform, layer, protect, linear, rank, loss, sensitivity, depth, owl, alphapruning, "
        "trim, neuroal, neuroal-blocks, erk, magnitude-global, or search, which tunes another one "
        "(default: protect)",
    )  # fmt: skip
    group.add_argument(
        "--by", default="wd", help="column of the scores, or several joined by + (default: wd)"
    )
    group.add_argument(
        "--combine", default="zscore", choices=("zscore", "rank"),
        help="how several columns become one (default: zscore)",
    )  # fmt: skip
    group.add_argument(
        "--protect", type=float, help="share of the neurons that rule protect protects "
        "(default: 0.03)"
    )  # fmt: skip
    group.add_argument("--protect-sparsity", type=float, help="their sparsity (default: 0)")
    group.add_argument("--spread", type=float, help="how far from uniform (default: the rule's)")
    group.add_argument(
        "--across",
        help="rule of layers that a rule of neurons keeps to, or model: neurons of all layers "
        "compete (default: the rule's)",
    )
    group.add_argument(
        "--lowest", type=float, default=0.0, help="least sparsity of a neuron (default: 0)"
    )
    group.add_argument(
        "--highest", type=float, default=1.0, help="greatest sparsity of a neuron (default: 1)"
    )
    group.add_argument(
        "--pattern", default="row",
        help="row, or for example n:4: zeros in multiples of a quarter of the row, of which those "
        "who prune by the file put equally many into every 4 neighbours (default: row)",
    )  # fmt: skip
    options.add_memory_option(group)


def _add_search_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search (--rule search)")
    group.add_argument("--tune", help="the rule to tune (default: linear)")
    group.add_argument("--evaluations", type=int, help="candidates to build (default: 8)")
    group.add_argument(
        "--held-out", type=float,
        help="share of the calibration set's sequences, the last ones, that candidates are scored "
        "on (default: 0.25)",
    )  # fmt: skip


def _add_expert_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("experts")
    group.add_argument(
        "--experts", type=int, metavar="K",
        help="also share out experts by entangled neurons; equal stored non-zeros as K a layer",
    )  # fmt: skip
    group.add_argument(
        "--entangled", type=float,
        help="share of all neurons that count as entangled (default: 0.03)",
    )  # fmt: skip
    group.add_argument("--fewest", type=int, help="least number (default: 1)")
    group.add_argument("--most", type=int, help="greatest number (default: twice K)")


def run(arguments: argparse.Namespace) -> None:
    """Allocate, write, print."""
    exports = [_format_and_file(text) for text in arguments.export]
    _check_meaning(arguments)
    _check_outputs(arguments, exports)
    memory = options.parse_memory(arguments.memory)
    from entangle.results.scores import load_scores

    scores = load_scores(arguments.scores)
    model = _load_model(arguments, scores)
    allocation = _allocate(arguments, scores, model, memory)
    if arguments.experts is not None:
        allocation = _with_experts(arguments, allocation, scores, model)
    notes, figures = _export(arguments, allocation, exports, lambda: model)
    allocation.save(arguments.out, force=arguments.force)  # last: then all else is there
    print_allocation(allocation, arguments, notes=notes, figures=figures)


def show(arguments: argparse.Namespace) -> None:
    """Print the allocation that was made before; what is to be exported or drawn is written."""
    from entangle.allocation import load_allocation
    from entangle.results.scores import load_scores

    exports = [_format_and_file(text) for text in arguments.export]
    _check_outputs(arguments, exports, made=True)
    allocation = load_allocation(arguments.out)

    def model() -> "LanguageModel":
        return _load_model(arguments, load_scores(arguments.scores))

    notes, figures = _export(arguments, allocation, exports, model)
    print_allocation(allocation, arguments, notes=notes, figures=figures)


def _export(
    arguments: argparse.Namespace,
    allocation: "Allocation",
    exports: Sequence[tuple[str, str]],
    model: "Callable[[], LanguageModel]",
) -> tuple[dict[str, list[str]], list[str]]:
    """Write what ``--export`` and ``--plot`` ask for; return notes by file, and the figures."""
    from entangle.allocation import export
    from entangle.models.layers import find_layers

    notes = {}
    for name, path in exports:
        layers = find_layers(model().module, "all") if name == "alphapruning" else None
        notes[path] = export(allocation, path, name, layers=layers, force=arguments.force)
    return notes, [] if arguments.plot is None else save_plot(allocation, arguments)


def print_allocation(
    allocation: "Allocation",
    arguments: argparse.Namespace,
    *,
    notes: Mapping[str, Sequence[str]],
    figures: Sequence[str],
) -> None:
    """Print one row a layer, the total, what a search tried, and what was written."""
    import pandas as pd

    table = allocation.layers
    total = {
        "layers": len(table), "rows": int(table["rows"].sum()), "zeros": allocation.n_zeros,
        "weights": allocation.n_weights, "sparsity": allocation.overall,
    }  # fmt: skip
    tables = [
        Table(
            "layers", table, "Zeros of every layer, and the range of its rows", _FORMATS,
            keys=("layer", "sparsity"), optional=("projection", "block", "zeros"),
            shown=table.drop(columns=["in_features"]),
        ),
        Table("total", pd.DataFrame([total]), "Total", _FORMATS, keys=("layers", "sparsity")),
    ]  # fmt: skip
    tried: Any = allocation.manifest.get(SEARCH)
    if tried is not None:
        title = (
            f"Held-out perplexity by {tried['parameter']} of rule {tried['rule']} "
            f"({tried['evaluations']} candidates, {tried['seconds']:.0f} s)"
        )
        frame = pd.DataFrame(tried["tried"]).sort_values(str(tried["parameter"]))
        tables.append(Table("search", frame, title, _FORMATS))
    content = {
        "out": arguments.out,
        "overall": allocation.overall,
        "layers": records(table),
        "exports": dict(notes),
        "figures": list(figures),
        "manifest": dict(allocation.manifest),
    }
    said = []
    budget: Any = allocation.manifest.get("budget")
    if isinstance(budget, dict) and budget.get("remainder"):
        said.append(
            f"{budget['remainder']:+,d} zeros to the budget, which the pattern leaves over."
        )
    for path, lines in notes.items():
        said += [f"Exported to {path}.", *(f"  {line}" for line in lines)]
    said += [f"Figure: {path}" for path in figures]
    present(arguments, tables, content, said=said, out=arguments.out)


def save_plot(allocation: "Allocation", arguments: argparse.Namespace) -> list[str]:
    """Draw the allocation; return the files."""
    from entangle.plotting import save_figure
    from entangle.runs.sealing import manifest_digest

    figure = allocation.plot(digest=manifest_digest(allocation.manifest))
    files = save_figure(figure, _stem(arguments.plot), force=arguments.force)
    return [str(path) for path in files]


def _stem(plot: str) -> Path:
    """Return the path of a figure without its ending, if it was given with one."""
    path = Path(plot)
    if path.name in ("", ".."):
        raise InvalidInput(f"--plot must name a file, such as allocation.pdf; got {plot!r}.")
    return path.with_suffix("") if path.suffix in (".png", ".pdf", ".csv") else path


def _format_and_file(text: str) -> tuple[str, str]:
    name, separator, path = text.partition(":")
    if not separator or not path:
        raise InvalidInput(f"--export must look like llmcompressor:recipe.yaml; got {text!r}.")
    return name, path


def _check_meaning(arguments: argparse.Namespace) -> None:
    """Refuse options that the rule, or the lack of another option, leaves without a meaning."""
    searching = arguments.rule == SEARCH
    protecting = PROTECT in (arguments.rule, arguments.tune if searching else None)
    for needed, met, names in (
        (f"--rule {SEARCH}", searching, ("tune", "evaluations", "held_out")),
        (f"rule {PROTECT}", protecting, ("protect", "protect_sparsity")),
        ("--experts", arguments.experts is not None, ("entangled", "fewest", "most")),
    ):
        for name in names:
            if not met and getattr(arguments, name) is not None:
                option = name.replace("_", "-")
                raise InvalidInput(f"--{option} has no meaning without {needed}; drop it.")


def _check_outputs(
    arguments: argparse.Namespace, exports: Sequence[tuple[str, str]], *, made: bool = False
) -> None:
    """Check that everything can be written, each to a file of its own, before any work is done.

    The allocation itself is there already if it is ``made``.
    """
    from entangle.allocation.export import check_export
    from entangle.results.allocation import check_file
    from entangle.runs.provenance import expand_user

    for name, path in exports:
        check_export(path, name, force=arguments.force)
    if not made:
        check_file(arguments.out, force=arguments.force)
    figures = [] if arguments.plot is None else _figure_files(arguments.plot)
    for target in figures:
        if target.exists() and not arguments.force:
            raise InvalidInput(
                f"{str(target)!r} exists; name another --plot or use --force to replace it."
            )
    written = set()
    for path in (arguments.out, *(path for _, path in exports), *figures):
        place = expand_user(path).resolve()
        if place in written:
            raise InvalidInput(f"{str(path)!r} is to be written twice; name another file.")
        written.add(place)


def _figure_files(plot: str) -> list[Path]:
    stem = _stem(plot)
    return [stem.with_name(f"{stem.name}.{ending}") for ending in ("pdf", "png", "csv")]


def _load_model(arguments: argparse.Namespace, scores: "NeuronScores") -> "LanguageModel":
    """Load the model that the scores were made from."""
    name_model(arguments, scores)
    return options.load_model(arguments)


def name_model(arguments: argparse.Namespace, scores: "NeuronScores") -> None:
    """Put what the scores were made from into the arguments, where nothing else was named."""
    made_from = scores.manifest.get("model")
    if arguments.model is None:
        if not isinstance(made_from, dict) or made_from.get("source") == "memory":
            raise InvalidInput("the scores do not say where their model is; name it with --model.")
        arguments.model = made_from["name"]
        if arguments.revision is None:
            arguments.revision = made_from.get("revision")
    if arguments.dtype == "auto" and isinstance(made_from, dict):
        arguments.dtype = str(made_from.get("dtype") or "auto")


def _allocate(
    arguments: argparse.Namespace,
    scores: "NeuronScores",
    model: "LanguageModel",
    memory: int | None,
) -> "Allocation":
    from entangle.allocation import RULES, allocate, search
    from entangle.checks import choice

    choice("--rule", arguments.rule, (*RULES, SEARCH), kind="allocation rule")
    settings: dict[str, Any] = {
        **_rule(arguments),
        "layers": arguments.layer,
        "proj": arguments.proj,
        "model": model,
        "memory": memory,
        "progress": False if arguments.quiet else None,
    }
    if arguments.rule == SEARCH:
        text = options.load_calibration(arguments, model)
        own = _given(arguments, "tune", "evaluations", "held_out")
        return search(scores, calibration=text, **own, **settings)
    calibration = options.load_calibration(arguments, model) if _reads(arguments) else None
    return allocate(scores, rule=arguments.rule, calibration=calibration, **settings)


def _rule(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the rule is asked for."""
    return {
        "sparsity": arguments.sparsity,
        "by": arguments.by,
        "combine": arguments.combine,
        **_given(arguments, "protect", "protect_sparsity", "spread"),
        "across": arguments.across,
        "lowest": arguments.lowest,
        "highest": arguments.highest,
        "pattern": arguments.pattern,
    }


def _reads(arguments: argparse.Namespace) -> bool:
    """Tell whether the rule is measured on text."""
    from entangle.allocation import RULES

    asked = (arguments.rule, arguments.across)
    return any(name in RULES and RULES[name].calibrated for name in asked)


def dry_job(arguments: argparse.Namespace, model: "LanguageModel") -> "Job":
    """Return what ``--dry-run`` asks about."""
    from entangle.allocation import RULES
    from entangle.allocation.request import find_subject
    from entangle.checks import choice
    from entangle.cli.trials import Job
    from entangle.results.scores import load_scores

    choice("--rule", arguments.rule, (*RULES, SEARCH), kind="allocation rule")
    _check_meaning(arguments)
    scores, spec = load_scores(arguments.scores), (arguments.layer, arguments.proj)
    found = find_subject(scores, model=model, layers=spec[0], proj=spec[1], in_features=None)
    searching = arguments.rule == SEARCH
    reads = searching or _reads(arguments)
    given = {
        "settings": _rule(arguments), "rule": arguments.rule, "reads": reads,
        "search": _given(arguments, "tune", "evaluations", "held_out") if searching else {},
        "memory": options.parse_memory(arguments.memory),
    }  # fmt: skip
    text = options.load_calibration(arguments, model) if reads else None
    return Job(model, tuple(found.layers), text, None, given)


def dry_run(job: "Job", out: Path) -> object:
    """Allocate to a job's layers, by scores that are drawn."""
    import pandas as pd

    from entangle.allocation import allocate, search
    from entangle.seeding import numpy_rng

    own, rng = job.given, numpy_rng(0, "allocation", "trial")
    parts = [
        pd.DataFrame({"layer": one.name, "neuron": range(one.out_features)}) for one in job.layers
    ]
    scores = pd.concat(parts, ignore_index=True)
    for column in own["settings"]["by"].split("+"):
        scores[column.strip()] = rng.gamma(4.0, size=len(scores))
    settings: dict[str, Any] = {
        **own["settings"], "model": job.model, "calibration": job.text, "memory": own["memory"],
        "layers": [one.name for one in job.layers], "progress": False,
    }  # fmt: skip
    if own["rule"] == SEARCH:
        found = search(scores, **settings, **own["search"])
    else:
        found = allocate(scores, rule=own["rule"], **settings)
    out.mkdir()
    found.save(out / "allocation.safetensors")
    return found


def dry_counts(job: "Job") -> "Counts":
    """Return what the time, memory and disk of an allocation are linear in."""
    import math

    from entangle.cli.trials import Counts, solving

    own = job.given
    builds = int(own["search"].get("evaluations", 8)) if own["rule"] == SEARCH else 0
    held_out = float(own["search"].get("held_out", 0.25)) if builds else 0.0
    reads = float(own["reads"])
    wide = float(sum(one.in_features**2 for one in job.inputs))
    weights = float(sum(math.prod(one.shape) for one in job.layers))
    time_of = {
        "neurons": float(job.neurons), "weights": weights, "gram": job.tokens * wide,
        "products": job.tokens * weights, "forward": job.forward(reads + builds * held_out),
        "head": builds * held_out * job.tokens * job.head,
        "solve": sum(map(solving, job.layers)) * max(reads, float(builds)),
    }  # fmt: skip
    peak = {"neurons": float(job.neurons), "weights": weights, "grams": reads * wide,
            "logits": builds * held_out * job.tokens * job.model.vocab_size}  # fmt: skip
    passes = (reads + builds * held_out, 0.0)
    return Counts(time_of, peak, {"neurons": float(job.neurons)}, passes=passes)


def dry_sizes(job: "Job") -> list[dict[str, Any]]:
    """Vary the candidates of a search: two and three in place of many."""
    if job.given["rule"] != SEARCH:
        return [{}]
    return [{"search": {**job.given["search"], "evaluations": few}} for few in (2, 3)]


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options that were given; the others keep the function's own defaults."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _with_experts(
    arguments: argparse.Namespace,
    allocation: "Allocation",
    scores: "NeuronScores",
    model: "LanguageModel",
) -> "Allocation":
    import torch

    from entangle.allocation import expert_budget
    from entangle.models.layers import find_layers
    from entangle.recording.groups import shared_inputs

    layers = find_layers(model.module, list(allocation.zeros))
    groups = shared_inputs(model.module, layers, torch.zeros(1, 4, dtype=torch.int64))
    renamed = {"entangled": "fraction", "fewest": "lowest", "most": "highest"}
    own = {renamed[name]: value for name, value in _given(arguments, *renamed).items()}
    return expert_budget(
        allocation, scores, experts=arguments.experts, by=arguments.by.split("+")[0],
        groups=[[layer.name for layer in members] for members in groups], **own,
    )  # fmt: skip
