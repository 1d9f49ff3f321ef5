"""Which figures are drawn of each kind of result, and how."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from entangle.errors import InvalidInput

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Draw = Callable[[], "Figure"]
"""Raises `InvalidInput` where the result lacks something."""
Style = Mapping[str, Any]
"""Options that all figures are given, as `entangle.plotting.FigureOptions` says."""

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
        "routing",
    ),
    "ablation": tuple(f"ablation_{name}" for name in ABLATION_MEASURES),
    "comparison": ("comparison", "density"),
    "decomposition": (*DECOMPOSED, *ONE_NEURON),
    "allocation": ("allocation",),
    "expansion": ("expansion",),
    "pruning": ("expansion",),
    "difference": ("difference",),
    "study": ("verdicts", "evidence"),
    "trace": ("trace",),
    "anchor": ("anchor",),
}  # fmt: skip
"""What is drawn of a result, by its kind."""

TOP_OUTPUTS = 6
"""Neurons whose outputs are drawn."""


def drawings(result: Any, style: Style) -> Iterator[tuple[str, Draw]]:
    """Yield the figures of a result, if any: the name of its files, and what draws it.

    They are signed with the digest and the seed of the result's manifest.
    """
    from entangle.results.base import settings_of
    from entangle.runs.sealing import manifest_digest

    seed = settings_of(result.manifest).get("seed")
    signed = {"digest": manifest_digest(result.manifest)}
    style = signed | ({"run_seed": seed} if isinstance(seed, int) else {}) | {**style}
    makers: dict[str, Callable[[Any, Style], Iterator[tuple[str, Draw]]]] = {
        "scores": _of_scores,
        "ablation": _of_ablation,
        "comparison": _of_comparison,
        "decomposition": _of_decomposition,
        "allocation": lambda found, style: iter([("allocation", partial(found.plot, **style))]),
        "expansion": _of_expansion,
        "pruning": _of_expansion,
        "difference": lambda found, style: iter([("difference", partial(found.plot, **style))]),
        "study": _of_study,
        "trace": lambda found, style: iter([("trace", partial(found.plot, **style))]),
        "anchor": lambda found, style: iter([("anchor", partial(found.plot, **style))]),
    }
    return makers[str(result.KIND)](result, style)


def attempts(
    drawn: Iterable[tuple[str, Draw]], style: Style
) -> "Iterator[tuple[str, Figure | InvalidInput]]":
    """Draw figures, or say why a result cannot be drawn so.

    Names in options, such as those of a subset, must be known to one of the figures: all are drawn
    before the first is yielded, and a figure that has no such part is not.

    Raises
    ------
    InvalidInput
        An option that no figure could follow, or a name that none of them knows.
    """
    from entangle.plotting.options import NAMED, Wishes, shared_names

    Wishes({**style}, panel=False)  # type: ignore[typeddict-item]
    each = ((name, _attempt(draw)) for name, draw in drawn)
    if not any(style.get(option) for option in NAMED):
        yield from each
        return
    with shared_names():
        made = list(each)
    yield from made


def _attempt(draw: Draw) -> "Figure | InvalidInput":
    try:
        return draw()
    except InvalidInput as error:
        return error


def _of_expansion(found: Any, style: Style) -> Iterator[tuple[str, Draw]]:
    yield "expansion", partial(found.plot, **style)


def _of_scores(scores: Any, style: Style) -> Iterator[tuple[str, Draw]]:
    from entangle import plotting
    from entangle.results.scores import few_layers, first_layer

    few, histogram = few_layers(scores.frame, style.get("subset")), scores.histogram
    yield "wd_distribution", partial(plotting.figure_wd_distribution, few, scores.layers, **style)
    yield "wd_by_layer", partial(_wd_by_layer, scores.frame, style)
    first = first_layer(few)
    yield "top_and_typical", partial(plotting.figure_top_and_typical, first, histogram, **style)
    yield "top_outputs", partial(_top_outputs, few, histogram, style)
    yield "wd_against_md", partial(plotting.figure_wd_against_md, few, **style)
    yield "routing", partial(_routing, scores, style)


def _routing(scores: Any, style: Style) -> "Figure":
    from entangle.plotting import figure_routing

    return figure_routing(scores.frame, scores.routing(), **style)


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
    yield "density", partial(_density, found, style)


def _density(found: Any, style: Style) -> "Figure":
    from entangle.plotting import figure_density

    if not found.masks:
        raise InvalidInput(
            "this comparison masks no activations; `entangle compare --methods teal` measures "
            "densities."
        )
    return figure_density(found.frame, text=text_of(found.manifest), **style)


def _of_study(found: Any, style: Style) -> Iterator[tuple[str, Draw]]:
    from entangle.plotting import figure_evidence

    yield "verdicts", partial(found.plot, **style)
    yield "evidence", partial(figure_evidence, found.numbers, **style)


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
