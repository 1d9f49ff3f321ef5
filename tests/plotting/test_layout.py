"""Every figure at both widths: nothing covers anything, and the small print is there."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from entangle import plotting
from entangle.errors import UnknownName, is_unseen
from entangle.plotting.options import Column
from tests.plotting.ablation_frames import ablation_frame
from tests.plotting.conftest import allocated, expanded
from tests.plotting.decomposition_frames import TOP, Decomposed
from tests.plotting.layout import outside, overlapping, smallest_text, texts

Draw = Callable[..., Figure]
"""Called with the column, the digest and, if need be, what changes the frames."""
DIGEST = "0123456789abcdef"


@pytest.fixture(
    params=[
        "sparse_outputs", "experts", "distances", "disentanglement", "recovery", "predictors",
        "components", "router_map", "separated_pairs", "modes", "wd_by_layer", "wd_distribution",
        "top_and_typical", "wd_against_md", "ablation", "comparison", "allocation", "expansion",
        "sparsities",
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
        "expansion": expanded(),
        "sparsities": tuple(
            pd.concat([table.assign(sparsity=s) for s in (0.5, 0.9, 0.99)])
            for table in (d.outputs, d.neurons)
        ),
    }  # fmt: skip
    name: str = request.param
    function: Callable[..., Figure] = getattr(plotting, f"figure_{name}")
    options: dict[str, Any] = {"n_boot": 20} if name in ("predictors", "wd_against_md") else {}
    if name in ("separated_pairs", "modes"):
        options = {"mean": item.mean, "std": item.std, "wd": item.wd}

    def draw(
        column: Column,
        digest: str,
        change: Callable[[pd.DataFrame], pd.DataFrame] = lambda frame: frame,
        **wanted: Any,
    ) -> Figure:
        changed = [change(one) if isinstance(one, pd.DataFrame) else one for one in frames[name]]
        return function(*changed, column=column, digest=digest, **options, **wanted)

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


def test_every_figure_takes_the_options(draw: Draw) -> None:
    plain = draw("double", DIGEST)
    assert plotting.caption_of(plain).endswith(".")
    letters = [text for text in plain.findobj(Text) if text.get_gid() == "letter"]
    panels = [ax for ax in plain.axes if ax.get_label() != "<colorbar>"]
    assert len(letters) == (len(panels) if len(panels) > 1 else 0)
    figure = draw(
        "double", DIGEST, width=5.0, height=4.0, title="My $title", caption="Mine", legend=False,
        run_seed=3,
    )  # fmt: skip
    assert (figure.get_figwidth(), figure.get_figheight()) == pytest.approx((5.0, 4.0))
    assert {"My $title", "run 0123456789ab, seed 3"} <= set(texts(figure))
    assert plotting.caption_of(figure) == "Mine"
    assert not figure.legends
    pd.testing.assert_frame_equal(plotting.drawn(figure), plotting.drawn(plain), rtol=1.0)
    with pytest.raises(TypeError, match="colour"):
        draw("double", DIGEST, colour="red")
    for wrong in ({"palette": {"nobody": "red"}}, {"labels": {"nowhere": "x"}}):
        with pytest.raises(UnknownName, match=r"no(body|where)"):
            draw("double", DIGEST, **wrong)


def test_colours_and_words_are_parameters(many_scores: pd.DataFrame, layers: pd.DataFrame) -> None:
    figure = plotting.figure_wd_distribution(
        many_scores, layers, palette={"top": "#ff00ff"}, labels={"neurons per bin": "count"}
    )
    assert figure.get_supylabel() == "count"
    assert "#ff00ff" in {to_hex(p.get_facecolor()) for p in figure.axes[0].patches}
    again = plotting.figure_wd_distribution(many_scores, layers)
    assert "#ff00ff" not in {to_hex(p.get_facecolor()) for p in again.axes[0].patches}


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
