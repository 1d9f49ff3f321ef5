import pytest
from matplotlib.figure import Figure

from entangle.errors import InvalidInput
from entangle.plotting import sign
from entangle.plotting.save import add_seed, panel_grid
from entangle.plotting.style import paper_style
from tests.plotting.layout import outside, overlapping, texts

DIGEST = "0123456789abcdef" * 4


def figure_with_label(label: str) -> Figure:
    with paper_style():
        figure, (ax,) = panel_grid(1, column="single")
        ax.set_xlabel("" if label == "sup" else "x" * 50)
        if label == "sup":
            figure.supxlabel("x" * 50)
    return figure


@pytest.mark.parametrize("label", ["axes", "sup"])
def test_the_digest_stands_below_all_else(label: str) -> None:
    figure = figure_with_label(label)
    height = figure.get_figheight()
    assert sign(figure, DIGEST) is figure
    assert figure.get_figheight() == pytest.approx(height + 0.11)
    assert "run 0123456789ab" in texts(figure)
    assert overlapping(figure) == []
    assert outside(figure) == []


def test_the_seed_follows_the_digest() -> None:
    figure = figure_with_label("axes")
    figure.text(0.1, 0.9, "another text")
    assert sign(figure, DIGEST, 7) is figure
    assert {"run 0123456789ab, seed 7", "another text"} <= set(texts(figure))
    assert overlapping(figure) == []
    assert outside(figure) == []


def test_a_seed_alone_is_not_written() -> None:
    assert not add_seed(figure_with_label("axes"), 7).texts
    assert not sign(figure_with_label("axes"), None, 7).texts


def test_no_digest_changes_nothing() -> None:
    figure = figure_with_label("axes")
    height = figure.get_figheight()
    assert sign(figure, None).get_figheight() == height
    assert not figure.texts


@pytest.mark.parametrize("digest", ["", "0123456789a", "0123456789xyz", "ABCDEF0123456789"])
def test_what_is_no_digest_is_refused(digest: str) -> None:
    with pytest.raises(InvalidInput, match=rf"`digest`.*{digest!r}"):
        sign(Figure(), digest)
