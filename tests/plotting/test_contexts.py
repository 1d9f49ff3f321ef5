import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from entangle.errors import InvalidInput
from entangle.plotting import drawn, modes, plot_contexts
from entangle.plotting.modes import HeadLine, signed, write_lines
from entangle.plotting.style import PaperFigure
from tests.plotting.layout import outside, overlapping, texts


def frame(*rows: tuple[str, str, str, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["before", "token", "after", "output"])


def figure_of(table: pd.DataFrame, *, inches: float = 6.9) -> Figure:
    figure = PaperFigure(figsize=(inches, 2.0))
    plot_contexts(table, ax=figure.add_axes((0.0, 0.0, 1.0, 1.0)))
    return figure


def test_a_line_is_output_and_text_around_the_token() -> None:
    figure = figure_of(frame(("The ri", "ver", " rose", -1.234), ("a", " b", "", 2.0)))
    assert texts(figure) == ["−1.23", "The ri", "ver", " rose", "+2.00", "a", " b"]
    assert drawn(figure)[["before", "token", "after", "x"]].to_numpy().tolist() == [
        ["The ri", "ver", " rose", -1.234],
        ["a", " b", "", 2.0],
    ]
    tokens = [text for text in figure.axes[0].texts if text.get_bbox_patch() is not None]
    assert [text.get_text() for text in tokens] == ["ver", " b"]
    assert len({text.get_window_extent().x0 for text in tokens}) == 1


@pytest.mark.parametrize("inches", [3.3, 6.9])
def test_long_and_strange_texts_fit(inches: float) -> None:
    strange = "中国 \x1b[0m\u200b$x_1$ 🙂 Привет שלום\n"
    figure = figure_of(
        frame(
            *[(strange * 9, strange * 2, strange * 9, 1e9), ("x" * 300, "y" * 300, "z" * 300, 0)]
        ),
        inches=inches,
    )
    assert outside(figure) == []
    assert overlapping(figure) == []
    assert "\n" not in "".join(texts(figure))
    assert "…" in "".join(texts(figure))
    assert r"\u4e2d\u56fd" in drawn(figure)["token"][0]


def test_headlines_are_cut_and_marked() -> None:
    figure = PaperFigure(figsize=(3.3, 1.0))
    ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    write_lines(ax, [HeadLine("word " * 50, color="red"), HeadLine("plain")])
    mark, long, plain = texts(figure)
    assert (mark, plain) == ("■", "plain")
    assert long.endswith("…")
    assert outside(figure) == []


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "+0.00"), (-3.14159, "−3.14"), (-123456.0, "−1e+05")]
)
def test_outputs_have_a_sign_and_fit(value: float, text: str) -> None:
    assert signed(value) == text


def test_other_tables_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"`contexts`.*without.*`entangle decompose`"):
        plot_contexts(frame(("a", "b", "c", 0.0)).drop(columns="after"))
    with pytest.raises(InvalidInput, match=r"`contexts`.*row.*`entangle decompose`"):
        plot_contexts(frame())


def test_no_more_is_measured_of_a_text_than_a_line_can_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Laying out thousands of characters to cut all but a hundred of them takes minutes."""
    measured: list[str] = []
    measure = modes._width

    def counted(text: Annotation) -> float:
        measured.append(text.get_text())
        return measure(text)

    monkeypatch.setattr(modes, "_width", counted)
    figure = figure_of(
        frame(("x" * 20_000 + " tail", " to" + "z" * 20_000, " head " + "y" * 20_000, 0.5)),
        inches=3.3,
    )
    assert max(map(len, measured)) <= 500
    assert len(drawn(figure)["before"][0]) == 20_005
    assert outside(figure) == []
    _, before, token, after = texts(figure)
    assert before.endswith("xxx tail")
    assert token.startswith(" tozzz")
    assert after.startswith(" head yyy")
