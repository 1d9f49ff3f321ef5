"""``entangle figures``: the paper's figures from the folders that other commands wrote.

Which figures are drawn of each kind of result, and how.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict
from urllib.parse import quote

from entangle.cli.options import Subparsers
from entangle.cli.tables import say
from entangle.errors import InvalidInput

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from entangle.results.base import Result

Column = Literal["single", "double"]
Draw = Callable[[], "Figure"]
"""Raises `InvalidInput` where the result lacks something."""

ABLATION_MEASURES: dict[str, str] = {
    "perplexity_ratio": "perplexity",
    "kl": "divergence",
    "top1_agreement": "divergence",
    "accuracy": "blimp",
}
"""Measures that are drawn, and what ``entangle ablate --measure`` calls them."""

DECOMPOSED: dict[str, tuple[str, ...]] = {
    "sparse_outputs": ("outputs", "neurons"),
    "experts": ("outputs", "neurons"),
    "distances": ("pairs", "neurons"),
    "disentanglement": ("neurons",),
    "recovery": ("outputs", "neurons"),
    "predictors": ("neurons",),
    "components": ("components",),
    "router_map": ("router_map",),
}
"""Figures of a layer, and the tables of its decomposition that each takes."""

EMPTY: dict[str, str] = {
    "pairs": "--pairs 2000",
    "separated": "--separated 20 and more tokens",
    "contexts": "--contexts 8",
    "router_map": "--experts 1,4,16",
}
"""Options of ``entangle decompose`` that fill a table which may be empty."""

ONE_NEURON: dict[str, tuple[str, ...]] = {
    "separated_pairs": ("separated",),
    "modes": ("modes", "contexts"),
}
"""Figures of one neuron, likewise."""

FIGURES: dict[str, tuple[str, ...]] = {
    "scores": (
        "wd_distribution", "wd_by_layer", "top_and_typical", "top_outputs", "wd_against_md",
    ),
    "ablation": tuple(f"ablation_{name}" for name in ABLATION_MEASURES),
    "comparison": ("comparison",),
    "decomposition": (*DECOMPOSED, *ONE_NEURON),
    "allocation": ("allocation",),
    "expansion": ("expansion",),
    "pruning": ("expansion",),
    "difference": ("difference",),
}  # fmt: skip
"""What is drawn of a result, by its kind."""

MAKERS: dict[str, str] = {
    "scores": "entangle score",
    "ablation": "entangle ablate",
    "comparison": "entangle compare",
    "decomposition": "entangle decompose",
    "allocation": "entangle allocate",
    "expansion": "entangle expand",
    "pruning": "entangle prune",
    "difference": "entangle diff",
}
"""Command that makes a result, by its kind."""

TOP_OUTPUTS = 6
"""Neurons whose outputs are drawn."""


class Style(TypedDict):
    """What all figures of a run are given."""

    column: Column
    digest: str


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn."""

    name: str
    """Of its files."""
    draw: Draw


@dataclass(frozen=True)
class Run:
    """One result on the disk."""

    path: Path
    kind: str
    digest: str
    """SHA-256 of its manifest."""
    manifest: Mapping[str, object]
    result: "Result" = field(repr=False)


def open_run(path: str) -> Run:
    """Recognise and load a result.

    Raises
    ------
    InvalidInput
        If it is none of ours.
    """
    from entangle.results import kind_of, load_result
    from entangle.runs.provenance import expand_user
    from entangle.runs.sealing import manifest_digest

    kind = kind_of(path)
    result = load_result(path)
    digest = manifest_digest(result.manifest)
    return Run(expand_user(path), kind, digest, result.manifest, result)


def drawings_of(one: Run, column: Column) -> Iterator[Drawing]:
    """Yield the figures of a result, if any, signed with the run's digest and seed."""
    makers: dict[str, Callable[[Any, Style], Iterator[tuple[str, Draw]]]] = {
        "scores": _of_scores,
        "ablation": _of_ablation,
        "comparison": _of_comparison,
        "decomposition": _of_decomposition,
        "allocation": lambda found, style: iter([("allocation", partial(found.plot, **style))]),
        "expansion": _of_expansion,
        "pruning": _of_expansion,
        "difference": lambda found, style: iter([("difference", partial(found.plot, **style))]),
    }
    for name, draw in makers[one.kind](one.result, Style(column=column, digest=one.digest)):
        yield Drawing(name, partial(_with_seed, draw, one.manifest))


def _with_seed(draw: Draw, manifest: Mapping[str, object]) -> "Figure":
    from entangle.plotting.save import add_seed
    from entangle.results.base import settings_of

    seed = settings_of(manifest).get("seed")
    return add_seed(draw(), seed) if isinstance(seed, int) else draw()


def _of_expansion(found: Any, style: Style) -> Iterator[tuple[str, Draw]]:
    yield "expansion", partial(found.plot, **style)


def _of_scores(scores: Any, style: Style) -> Iterator[tuple[str, Draw]]:
    from entangle import plotting
    from entangle.results.scores import few_layers, first_layer

    few, histogram = few_layers(scores.frame), scores.histogram
    yield "wd_distribution", partial(plotting.figure_wd_distribution, few, scores.layers, **style)
    yield "wd_by_layer", partial(_wd_by_layer, scores.frame, style)
    first = first_layer(few)
    yield "top_and_typical", partial(plotting.figure_top_and_typical, first, histogram, **style)
    yield "top_outputs", partial(_top_outputs, few, histogram, style)
    yield "wd_against_md", partial(plotting.figure_wd_against_md, few, **style)


def _wd_by_layer(frame: "pd.DataFrame", style: Style) -> "Figure":
    from entangle.plotting import figure_wd_by_layer

    if frame["layer"].nunique() < 2:
        raise InvalidInput("these scores hold one layer; `entangle score --layer all` scores all.")
    return figure_wd_by_layer(frame, **style)


def _top_outputs(
    frame: "pd.DataFrame", histogram_of: Callable[[str, int], "pd.DataFrame"], style: Style
) -> "Figure":
    from entangle.plotting import NeuronOutput, figure_output_distributions

    several = frame["layer"].nunique() > 1
    best = frame[frame["wd"].notna()].nlargest(TOP_OUTPUTS, "wd")
    items = [
        NeuronOutput.of(
            row,
            histogram_of(str(row["layer"]), int(row["neuron"])),
            label="" if several else f"neuron {row['neuron']}",
            role="top",
        )
        for _, row in best.iterrows()
    ]
    return figure_output_distributions(items, **style)


def _of_ablation(found: Any, style: Style) -> Iterator[tuple[str, Draw]]:
    for measure in ABLATION_MEASURES:
        yield f"ablation_{measure}", partial(_ablation, found, measure, style)


def _ablation(found: Any, measure: str, style: Style) -> "Figure":
    from entangle.plotting import figure_ablation

    if measure not in set(found.frame["measure"]):
        wanted = ABLATION_MEASURES[measure]
        raise InvalidInput(
            f"this ablation holds no {measure}; `entangle ablate --measure {wanted}` measures it."
        )
    text = text_of(found.manifest, pairs=measure == "accuracy")
    return figure_ablation(found.frame, measure=measure, text=text, **style)


def _of_comparison(found: Any, style: Style) -> Iterator[tuple[str, Draw]]:
    from entangle.plotting import figure_comparison

    text = text_of(found.manifest)
    yield "comparison", partial(figure_comparison, found.frame, text=text, **style)


def text_of(manifest: Mapping[str, object], *, pairs: bool = False) -> str | None:
    """Return what a result was evaluated on: a text and its windows, or minimal pairs."""
    said = manifest.get("evaluation")
    if isinstance(said, Mapping) and "n_windows" not in said:
        said = said.get("pairs" if pairs else "text")
    if not isinstance(said, Mapping):
        return None
    source = str(said.get("source"))
    source = Path(source).name if Path(source).is_absolute() else source
    if "n_pairs" in said:
        kinds = said.get("paradigms")
        n = len(kinds) if isinstance(kinds, Mapping) else 0
        return f"{source}, {said['n_pairs']:,} pairs of {n} paradigms"
    return f"{source}, {said.get('n_windows')} windows of {said.get('seq_len')} tokens"


def _of_decomposition(found: Any, style: Style) -> Iterator[tuple[str, Draw]]:
    layers = found.neurons["layer"].unique().tolist()
    for layer in layers:
        ending = f"_{quote(layer, safe='')}" if len(layers) > 1 else ""  # no "/" in names of files
        for name in FIGURES["decomposition"]:
            yield name + ending, partial(_of_layer, name, found, layer, style)


def _of_layer(name: str, found: Any, layer: str, style: Style) -> "Figure":
    """Draw a layer, or of it the neuron with the largest WD, whose outputs are needed too."""
    from entangle import plotting

    draw: Callable[..., Figure] = getattr(plotting, f"figure_{name}")
    if name not in ONE_NEURON:
        return draw(*_tables(found, DECOMPOSED[name], layer), layer=layer, **style)
    histogram, item = plotting.dense_output(found.outputs, found.neurons, layer=layer)
    frames = _tables(found, ONE_NEURON[name], layer)
    return draw(
        *frames, histogram, mean=item.mean, std=item.std, wd=item.wd, layer=layer,
        neuron=item.neuron, **style,
    )  # fmt: skip


def _tables(found: Any, names: Sequence[str], layer: str) -> "list[pd.DataFrame]":
    for name in names:
        if name in EMPTY and not (getattr(found, name)["layer"] == layer).any():
            raise InvalidInput(
                f"this decomposition holds no {name.replace('_', ' ')} of layer {layer!r}; "
                f"`entangle decompose {EMPTY[name]}` makes them."
            )
    return [getattr(found, name) for name in names]


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "figures",
        help="draw every figure that results hold",
        description="Recognise results of entangle score, ablate, compare, decompose, allocate "
        "and expand, and draw all figures that they hold, each with its CSV of what it shows. No "
        "model is needed.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="result folder, or file of entangle allocate"
    )
    parser.add_argument(
        "--out", default="figures", metavar="DIR", help="where to write (default: %(default)s)"
    )
    parser.add_argument(
        "--format", default="pdf,png", help="comma-separated: pdf, png (default: %(default)s)"
    )
    parser.add_argument(
        "--width", default="double", choices=("single", "double"),
        help="width: one column of a paper (3.3 inches) or two (6.9) (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace existing figures")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Open the results, draw what can be drawn, and say what cannot."""
    from entangle.plotting.save import check_formats

    formats = check_formats(arguments.format.split(","))
    found = [open_run(path) for path in arguments.runs]
    folders = _folders(Path(arguments.out), found)
    drawings = [
        (folders[number] / drawing.name, drawing, one)
        for number, one in enumerate(found)
        for drawing in drawings_of(one, arguments.width)
    ]
    if not arguments.force:
        _check_new([stem for stem, *_ in drawings], (*formats, "tex", "txt", "csv"))
    failed = list(_draw(drawings, formats, force=arguments.force))
    for line in (*failed, *missing_lines({one.kind for one in found})):
        say(f"Skipped: {line}")
    if len(failed) == len(drawings):
        raise InvalidInput(
            f"nothing could be drawn of {', '.join(map(repr, arguments.runs))}; name results of "
            f"{', '.join(MAKERS.values())}."
        )


def _draw(
    drawings: Sequence[tuple[Path, Drawing, Run]], formats: Sequence[str], *, force: bool
) -> Iterator[str]:
    """Draw and save what can be drawn; yield what cannot, and why.

    What is added to the folder of a result is listed in it, apart from what it was made with.
    """
    from entangle.plotting import save_figure
    from entangle.runs.sealing import list_added

    for stem, drawing, one in drawings:
        try:
            figure = drawing.draw()
        except InvalidInput as error:
            yield f"{drawing.name}: {error}"
            continue
        files = save_figure(figure, stem, formats=formats, force=force)
        say(f"Figure: {stem} ({', '.join(path.suffix[1:] for path in files)})")
        if one.path.is_dir() and one.path.resolve() in stem.resolve().parents:
            list_added(one.path.resolve(), [path.resolve() for path in files], one.digest)


def _folders(out: Path, runs: Sequence[Run]) -> list[Path]:
    """Return a folder a run: ``out``, or one of its own where several runs are of one kind."""
    kinds = [one.kind for one in runs]
    own = [one.path.resolve().name if kinds.count(one.kind) > 1 else "" for one in runs]
    named = [(one.kind, name) for one, name in zip(runs, own, strict=True)]
    for kind, name in named:
        if named.count((kind, name)) > 1:
            raise InvalidInput(
                f"results of one kind must have names of their own; got two {kind} called {name!r}."
            )
    return [out / name for name in own]


def _check_new(stems: Sequence[Path], endings: Sequence[str]) -> None:
    files = [stem.with_name(f"{stem.name}.{ending}") for stem in stems for ending in endings]
    existing = [str(path) for path in files if path.exists()]
    if existing:
        raise InvalidInput(
            f"the figure {existing[0]!r} exists; use --force to replace figures, or another --out."
        )


def missing_lines(kinds: set[str]) -> Iterator[str]:
    """Say which figures need a result that was not given, and what makes it."""
    drawn = {name for kind in kinds for name in FIGURES[kind]}
    for kind, names in FIGURES.items():
        if not drawn.issuperset(names):
            article = "" if kind == "scores" else "an " if kind[0] in "ae" else "a "
            yield f"{', '.join(names)}: name {article}{kind}, which `{MAKERS[kind]}` makes."
