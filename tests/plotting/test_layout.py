"""Every figure at both widths: nothing covers anything, and the small print is there."""

from collections.abc import Callable

import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from entangle import plotting
from entangle.errors import is_unseen
from entangle.plotting.style import Column
from tests.plotting.ablation_frames import ablation_frame
from tests.plotting.decomposition_frames import TOP, Decomposed
from tests.plotting.layout import outside, overlapping, smallest_text, texts

Draw = Callable[..., Figure]
"""Called with the column, the digest and, if need be, what changes the frames."""
DIGEST = "0123456789abcdef"


def allocated() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Layers and rows of an allocation, with experts."""
    layers = [
        {"layer": f"{block}.{name}", "block": block, "projection": name, "rows": 40,
         "in_features": 10, "zeros": 4 * (50 + 3 * block), "sparsity": 0.5 + 0.03 * block,
         "experts": 1 + block}
        for block in range(12)
        for name in ("gate_proj", "down_proj")
    ]  # fmt: skip
    return pd.DataFrame(layers), pd.DataFrame({"sparsity": [0.1, *[0.5] * 40, *[0.7] * 3000]})


@pytest.fixture(
    params=[
        "sparse_outputs", "experts", "distances", "disentanglement", "recovery", "predictors",
        "components", "router_map", "separated_pairs", "modes", "wd_by_layer", "wd_distribution",
        "top_and_typical", "wd_against_md", "ablation", "comparison", "allocation", "sparsities",
    ]
)  # fmt: skip
def draw(
    request: pytest.FixtureRequest,
    decomposed: Decomposed,
    many_scores: pd.DataFrame,
    layers: pd.DataFrame,
    histogram: pd.DataFrame,
    comparison: pd.DataFrame,
) -> Draw:
    """Draw one of the figures."""
    d = decomposed
    own, item = plotting.dense_output(d.outputs, d.neurons, neuron=TOP)
    frames: dict[str, tuple[object, ...]] = {
        "sparse_outputs": (d.outputs, d.neurons),
        "experts": (d.outputs, d.neurons),
        "distances": (d.pairs, d.neurons),
        "disentanglement": (d.neurons,),
        "recovery": (d.outputs, d.neurons),
        "predictors": (d.neurons,),
        "components": (d.components,),
        "router_map": (d.router_map,),
        "separated_pairs": (d.separated, own),
        "modes": (d.modes, d.contexts, own),
        "wd_by_layer": (many_scores,),
        "wd_distribution": (many_scores, layers),
        "top_and_typical": (
            many_scores[many_scores["block"] == 1], lambda _layer, _neuron: histogram,
        ),
        "wd_against_md": (many_scores,),
        "ablation": (ablation_frame(),),
        "comparison": (comparison,),
        "allocation": allocated(),
        "sparsities": tuple(
            pd.concat([table.assign(sparsity=s) for s in (0.5, 0.9, 0.99)])
            for table in (d.outputs, d.neurons)
        ),
    }  # fmt: skip
    name: str = request.param
    function: Callable[..., Figure] = getattr(plotting, f"figure_{name}")
    options: dict[str, float] = {"n_boot": 20} if name in ("predictors", "wd_against_md") else {}
    if name in ("separated_pairs", "modes"):
        options = {"mean": item.mean, "std": item.std, "wd": item.wd}

    def draw(
        column: Column,
        digest: str,
        change: Callable[[pd.DataFrame], pd.DataFrame] = lambda frame: frame,
    ) -> Figure:
        changed = [change(one) if isinstance(one, pd.DataFrame) else one for one in frames[name]]
        return function(*changed, column=column, digest=digest, **options)

    return draw


@pytest.mark.parametrize("column", ["single", "double"])
def test_nothing_covers_anything_or_leaves_the_paper(draw: Draw, column: Column) -> None:
    figure = draw(column, DIGEST)
    assert figure.get_figwidth() == plotting.COLUMN_INCHES[column]
    assert overlapping(figure) == []
    assert outside(figure) == []
    assert texts(figure).count("run 0123456789ab") == 1
    assert smallest_text(figure) >= 6.0
    assert len(plotting.drawn(figure)) > 0


ODD = "$a_{\\foo $\x1b[31m\n\u202e<b>"
NAMES = {
    "layer", "layers", "projection", "model", "method", "selection", "intervention", "by",
    "token_a", "token_b", "token", "before", "after",
}  # fmt: skip


def oddly_named(frame: pd.DataFrame) -> pd.DataFrame:
    """Put what acts on a terminal, and what TeX cannot read, into every name in a table."""
    return frame.assign(**{name: ODD + frame[name].astype(str) for name in NAMES & {*frame}})


def test_names_are_shown_as_they_are(draw: Draw) -> None:
    figure = draw("double", DIGEST, oddly_named)
    figure.draw_without_rendering()
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        assert not any(map(is_unseen, text.get_text().replace("\n", "")))
        assert "$" not in text.get_text() or not text.get_parse_math()


def test_the_helpers_see_what_is_wrong() -> None:
    figure = plotting.style.PaperFigure(figsize=(2.0, 1.0))
    for x, y, text in ((0.1, 0.5, "one one"), (0.2, 0.5, "two two"), (0.95, 0.9, "long text")):
        figure.text(x, y, text)
    assert overlapping(figure) == [("one one", "two two")]
    assert outside(figure) == ["long text"]
