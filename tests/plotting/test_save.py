import gc
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from entangle.errors import InvalidInput, Unavailable, UnknownName
from entangle.plotting import drawn, figure_wd_distribution, plot_wd_distribution, save_figure, sign
from entangle.plotting import save as save_module
from entangle.plotting.page import panel_grid
from entangle.plotting.save import add_seed
from entangle.plotting.style import paper_style
from entangle.runs.provenance import scratch
from tests.plotting.layout import outside, overlapping, texts


@pytest.fixture
def figure(scores: pd.DataFrame) -> Figure:
    ax = plot_wd_distribution(scores, floor=(0.013, 0.019))
    found = ax.get_figure(root=True)
    assert found is not None
    return found


def test_three_files_are_written_and_the_table_reads_back(figure: Figure, tmp_path: Path) -> None:
    paths = save_figure(figure, tmp_path / "new" / "model.layers.1")
    assert [path.name for path in paths] == [f"model.layers.1.{e}" for e in ("pdf", "png", "csv")]
    assert set((tmp_path / "new").iterdir()) == set(paths)
    assert paths[0].read_bytes().startswith(b"%PDF")
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    table = pd.read_csv(paths[2], dtype={"neuron": "Int64"})
    pd.testing.assert_frame_equal(table, drawn(figure), check_dtype=False)


def test_captions_are_written_beside_the_picture(
    many_scores: pd.DataFrame, layers: pd.DataFrame, tmp_path: Path
) -> None:
    found = figure_wd_distribution(many_scores, layers, caption="50 % of x_1 & σ ≥ $2")
    paths = save_figure(found, tmp_path / "a", formats=["png"])
    assert [path.suffix for path in paths] == [".png", ".tex", ".txt", ".csv"]
    assert paths[1].read_text("utf-8") == "\\caption{50 \\% of x\\_1 \\& $\\sigma$ $\\ge$ \\$2}\n"
    assert paths[2].read_text("utf-8") == "50 % of x_1 & σ ≥ $2\n"


def test_neurons_are_whole_numbers_in_the_table(figure: Figure, tmp_path: Path) -> None:
    *_, path = save_figure(figure, tmp_path / "a", formats=["png"])
    table = pd.read_csv(path, dtype=str)
    assert table["neuron"].dropna().str.fullmatch(r"\d+").all()


def test_pdf_has_real_text_and_no_date_and_repeats_byte_for_byte(
    figure: Figure, tmp_path: Path
) -> None:
    first = [path.read_bytes() for path in save_figure(figure, tmp_path / "a")]
    second = [path.read_bytes() for path in save_figure(figure, tmp_path / "b")]
    assert first == second
    assert b"/FontFile2" in first[0]
    assert b"/Type3" not in first[0]
    assert b"CreationDate" not in first[0]


def test_the_size_is_the_figures_own_whatever_the_settings(figure: Figure, tmp_path: Path) -> None:
    plain = save_figure(figure, tmp_path / "a")[1].read_bytes()
    with mpl.rc_context({"savefig.bbox": "tight", "savefig.dpi": 50, "pdf.fonttype": 3}):
        other = save_figure(figure, tmp_path / "b")
    assert other[1].read_bytes() == plain
    assert b"/FontFile2" in other[0].read_bytes()


def test_saving_leaves_the_figure_as_it_was(
    figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, shown = figure.get_layout_engine(), drawn(figure)
    canvas, dpi = figure.canvas, figure.dpi
    assert engine is not None
    save_figure(figure, tmp_path / "a")
    assert figure.get_layout_engine() is engine
    assert (figure.canvas, figure.dpi) == (canvas, dpi)
    pd.testing.assert_frame_equal(drawn(figure), shown)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FigureCanvasAgg, "print_png", full)
    with pytest.raises(Unavailable):
        save_figure(figure, tmp_path / "b")
    assert figure.get_layout_engine() is engine
    assert (figure.canvas, figure.dpi) == (canvas, dpi)


def test_a_figure_is_drawn_once_for_each_format(
    figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws, draw = list[object](), Figure.draw

    def counted(self: Figure, renderer: RendererBase) -> None:
        draws.append(renderer)
        draw(self, renderer)

    monkeypatch.setattr(Figure, "draw", counted)
    save_figure(figure, tmp_path / "a")
    assert len(draws) == 2


def test_embedded_fonts_hold_no_tables_that_place_letters(
    figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, subset, before = list[str](), Subsetter.subset, Options().drop_tables

    def noted(self: Subsetter, font: TTFont) -> None:
        subset(self, font)
        kept.extend(font.keys())

    monkeypatch.setattr(Subsetter, "subset", noted)
    save_figure(figure, tmp_path / "a", formats="pdf")
    assert "glyf" in kept
    assert not {"GDEF", "GPOS", "GSUB"} & set(kept)
    assert Options().drop_tables == before


@pytest.mark.parametrize("formats", [("pdf", "png"), ("png", "pdf"), ("png",)])
def test_a_picture_is_the_same_whatever_else_is_written(
    scores: pd.DataFrame, tmp_path: Path, formats: tuple[str, ...]
) -> None:
    pictures = []
    for name, wanted in (("alone", ("png",)), ("both", formats)):
        found = plot_wd_distribution(scores).get_figure(root=True)
        assert found is not None
        paths = save_figure(found, tmp_path / name, formats=wanted)
        pictures += [path.read_bytes() for path in paths if path.suffix == ".png"]
    assert pictures[0] == pictures[1]


def test_existing_files_are_kept_unless_forced(figure: Figure, tmp_path: Path) -> None:
    old = tmp_path / "a.csv"
    old.write_text("precious")
    with pytest.raises(InvalidInput, match=r"a\.csv.*force=True"):
        save_figure(figure, tmp_path / "a")
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_text() == "precious"
    save_figure(figure, tmp_path / "a", force=True)
    assert old.read_text().startswith("panel,series,x,y")


def test_a_full_disk_leaves_nothing_behind(
    figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(Unavailable, match=r"a'.*device"):
        save_figure(figure, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_figure(
    figure: Figure, tmp_path: Path
) -> None:
    left = scratch(tmp_path / "a")
    left.mkdir()
    (left / "a.pdf").touch()
    paths = save_figure(figure, tmp_path / "a", formats=["png"])
    assert set(tmp_path.iterdir()) == set(paths)


def test_an_old_table_is_never_beside_a_new_picture(
    figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_figure(figure, tmp_path / "a")
    replace = Path.replace

    def stop(source: Path, target: Path) -> Path:
        if target.suffix == ".png":
            raise KeyboardInterrupt
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_figure(figure, tmp_path / "a", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdf", "a.png"]


def test_a_file_in_the_place_of_a_folder_is_one_clear_line(figure: Figure, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="a'"):
        save_figure(figure, tmp_path / "file" / "a")


def test_formats_are_checked(figure: Figure, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="'jpeg'"):
        save_figure(figure, tmp_path / "a", formats=["jpeg"])
    with pytest.raises(InvalidInput, match=r"`formats`.*\[\]"):
        save_figure(figure, tmp_path / "a", formats=[])
    assert list(tmp_path.iterdir()) == []
    for number, formats in enumerate(("pdf", {"pdf"}, (one for one in ["pdf"]))):
        files = save_figure(figure, tmp_path / f"{number}", formats=formats)
        assert [path.suffix for path in files] == [".pdf", ".csv"]


def test_a_figure_without_our_artists_is_refused(tmp_path: Path) -> None:
    plain = Figure()
    plain.subplots().plot([1, 2])
    with pytest.raises(InvalidInput, match=r"`figure`.*\b1\b"):
        save_figure(plain, tmp_path / "a")


def test_the_table_follows_the_artists(figure: Figure) -> None:
    before = drawn(figure)
    figure.axes[0].get_lines()[0].remove()  # the rug
    assert len(before) - len(drawn(figure)) == 6
    figure.axes[0].clear()
    with pytest.raises(InvalidInput):
        drawn(figure)


def test_records_die_with_their_figure(scores: pd.DataFrame) -> None:
    gc.collect()
    before = len(save_module._DRAWN)
    ax = plot_wd_distribution(scores)
    assert len(save_module._DRAWN) > before
    del ax
    gc.collect()
    assert len(save_module._DRAWN) == before


def test_record_takes_scalars_and_arrays_of_one_length() -> None:
    ax = Figure().subplots()
    (line,) = ax.plot([0, 1], [2, 3])
    save_module.record(line, panel="p", series="s", x=np.arange(2), y=5.0)
    root = ax.get_figure(root=True)
    assert root is not None
    assert drawn(root).to_numpy().tolist() == [["p", "s", 0, 5.0], ["p", "s", 1, 5.0]]


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
