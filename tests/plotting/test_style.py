import subprocess
import sys
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from entangle.errors import InvalidInput
from entangle.plotting import COLUMN_INCHES, PALETTE, paper_style
from entangle.plotting.page import panel_grid, shared_legend
from entangle.plotting.style import (
    METHOD_PALETTE,
    SPARE_COLORS,
    PaperFigure,
    add_legend,
    add_title,
    axes_or_new,
    column_width,
    join_clauses,
    legend_above,
    log_locator,
    make_room,
    plain_number,
    printable,
    wrap,
)


@pytest.mark.parametrize(("column", "width"), [("single", 3.3), ("double", 6.9)])
def test_style_is_scoped(column: str, width: float) -> None:
    before = dict(mpl.rcParams)
    with paper_style(column=column):  # type: ignore[arg-type]
        assert mpl.rcParams["figure.figsize"][0] == width == COLUMN_INCHES[column]
        assert mpl.rcParams["pdf.fonttype"] == 42
    assert dict(mpl.rcParams) == before


def test_style_is_undone_after_an_error() -> None:
    before = dict(mpl.rcParams)
    with pytest.raises(RuntimeError), paper_style():
        raise RuntimeError
    assert dict(mpl.rcParams) == before


def test_an_unknown_column_is_refused() -> None:
    with pytest.raises(InvalidInput, match="'wide'"):
        column_width("wide")


def dichromat(rgb: tuple[float, float, float]) -> np.ndarray:
    """What a deuteranope sees, after Viénot, Brettel and Mollon (1999), in linear light."""
    matrix = np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])
    return np.asarray((matrix @ np.array(rgb) ** 2.2).clip(0, 1) ** (1 / 2.2))


@pytest.mark.parametrize("palette", [PALETTE, METHOD_PALETTE])
def test_colours_stay_apart_for_colour_blind_readers(palette: Mapping[str, str]) -> None:
    seen = {name: dichromat(to_rgb(color)) for name, color in palette.items()}
    names = sorted(seen)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert np.linalg.norm(seen[one] - seen[other]) > 0.12, (one, other)


def test_the_palette_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PALETTE["top"] = "red"  # type: ignore[index]


def test_ticks_keep_the_style_they_were_made_in() -> None:
    with paper_style():
        ax = axes_or_new(None)
    ax.plot([0, 1000])
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    assert {tick.label1.get_fontsize() for tick in ax.xaxis.get_major_ticks()} == {6.5}


def test_jupyter_gets_a_picture() -> None:
    assert PaperFigure(figsize=(1, 1))._repr_png_().startswith(b"\x89PNG")


def test_titles_are_broken_to_the_panel_and_taken_literally() -> None:
    ax = Figure(figsize=(2, 2)).subplots()
    add_title(ax, "a title of $many$ words that is wider than its panel\nsecond line")
    lines = ax.get_title().split("\n")
    assert len(lines) > 2
    assert lines[-1] == "second line"
    assert "$many$" in ax.get_title()


def test_wrap_keeps_short_text() -> None:
    assert wrap(Figure().subplots(), "short\nlines", size=7.0) == "short\nlines"


@pytest.mark.parametrize("name", ["模型\x00.gate", "層🙂\u202e", "$x_1$ \x85\u2028"])
def test_names_from_elsewhere_are_spelled_out_where_no_font_has_them(name: str) -> None:
    with paper_style():
        figure, (ax, other) = panel_grid(2, column="single")
        add_title(ax, name)
        ax.plot([0, 1], [0, 1], label="line")
        add_title(other, wrap(other, name, size=7.0))  # what is spelled out stays as it is
        ax.lines[0].set_label(name)
        shared_legend(figure, [ax], inches=3.3)
        figure.draw_without_rendering()  # a missing glyph is a warning, which is an error
    assert ax.get_title(loc="left") == other.get_title(loc="left") == printable(name)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [printable(name)]


def test_names_without_end_take_four_lines() -> None:
    ax = axes_or_new(None)
    lines = wrap(ax, "word " * 3000, size=7.0).split("\n")
    assert len(lines) == 4
    assert lines[-1].endswith("…")
    clauses = join_clauses(["short", "x" * 9000], inches=3.3).split("\n")
    assert len(clauses) == 5
    assert clauses[0] == "short"


def test_legend_raises_the_limit_only_where_it_would_cover_data() -> None:
    entry = [(Line2D([], []), "one entry")]
    tops = []
    for x in (0.02, 0.98):
        ax = Figure(figsize=(3, 2)).subplots()
        ax.set_xlim(0, 1)
        add_legend(ax, entry, side="left", skyline=(np.array([x]), np.array([1.0])))
        tops.append(ax.get_ylim()[1])
    assert tops[0] > tops[1] == pytest.approx(1.05)


def test_a_shared_legend_names_every_label_once() -> None:
    figure = PaperFigure(layout="constrained", figsize=(6.9, 2))
    axes = list(figure.subplots(1, 2))
    for ax, labels in zip(axes, (("a", "b"), ("b", "c")), strict=True):
        for label in labels:
            ax.plot([0, 1], label=label)
    shared_legend(figure, axes, inches=6.9, extra="n")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c", "n"]


def test_spare_colours_are_no_method_s() -> None:
    assert not set(SPARE_COLORS) & set(METHOD_PALETTE.values())


def test_clauses_share_a_line_while_they_fit() -> None:
    inches = 16 / 19.0  # sixteen characters of 7 points
    assert join_clauses(["one two", "three", "four five six", "x"], inches=inches) == (
        "one two; three\nfour five six; x"
    )
    assert join_clauses(["one two", "three"], inches=inches, size=9.0) == "one two\nthree"
    assert join_clauses(["far too long a clause"], inches=inches) == "far too long a\nclause"
    assert join_clauses([], inches=inches) == ""


def test_a_legend_above_lies_on_top_of_the_panel_and_gets_room() -> None:
    ax = axes_or_new(None)
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    height, panel = figure.get_figheight(), ax.get_window_extent().height
    entries = [(ax.plot([0, 1])[0], name) for name in "abc"]
    legend = legend_above(ax, entries, clauses=["$a$ b", "c d"])
    make_room(legend)
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert figure.get_figheight() == pytest.approx(height + box.height / figure.dpi)
    assert ax.get_window_extent().height == pytest.approx(panel, rel=0.05)
    assert box.y0 >= ax.get_window_extent().y1
    assert box.y1 <= figure.bbox.y1
    assert legend.get_title().get_text() == "$a$ b; c d"


def test_the_room_imports_no_model_library_and_chooses_no_backend() -> None:
    code = (
        "import sys; import entangle.plotting;"
        "light = 'matplotlib' not in sys.modules;"
        "all(getattr(entangle.plotting, name) for name in entangle.plotting.__all__);"
        "bad = {'torch', 'transformers', 'jaxtyping', 'seaborn'} & set(sys.modules);"
        "chosen = {'matplotlib.pyplot'} & set(sys.modules);"
        "sys.exit(str(bad | chosen) if bad | chosen else 0 if light else 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, "0.1"),
        (20.0, "20"),
        (10_000.0, "10,000"),
        (200_000.0, "200,000"),
        (2e6, "2e6"),
        (1e10, "1e10"),
        (1e-4, "0.0001"),
        (2e-5, "2e−5"),
        (-3.0, "−3"),
    ],
)
def test_numbers_are_on_one_line(value: float, text: str) -> None:
    assert plain_number(value) == text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.05, 1.45, [1.1, 1.2, 1.3, 1.4]),
        (0.9, 12.0, [1, 2, 5, 10]),
        (0.9, 120.0, [1, 3, 10, 30, 100]),
        (0.9, 1100.0, [1, 10, 100, 1000]),
    ],
)
def test_ticks_are_sparser_the_longer_the_axis(
    low: float, high: float, expected: list[float]
) -> None:
    ax = PaperFigure(figsize=(3.3, 3.0)).subplots()
    ax.set(yscale="log", ylim=(low, high))
    ax.yaxis.set_major_locator(log_locator(high / low))
    found = [tick for tick in ax.get_yticks() if low <= tick <= high]
    np.testing.assert_allclose(found, expected)
