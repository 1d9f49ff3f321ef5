from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from entangle.errors import InvalidInput
from entangle.plotting import dense_output, drawn, figure_modes, plot_modes
from entangle.plotting.summaries import SparseNeuron
from tests.plotting.decomposition_frames import TOP, Decomposed
from tests.plotting.layout import outside, overlapping, texts


@pytest.fixture
def output(decomposed: Decomposed) -> tuple[pd.DataFrame, SparseNeuron]:
    """Histogram and numbers of the neuron whose modes are known."""
    return dense_output(decomposed.outputs, decomposed.neurons, neuron=TOP)


def draw(d: Decomposed, output: tuple[pd.DataFrame, SparseNeuron], **options: Any) -> Figure:
    histogram, item = output
    frames: dict[str, Any] = {"modes": d.modes, "contexts": d.contexts} | options
    modes, contexts = frames.pop("modes"), frames.pop("contexts")
    return figure_modes(
        modes, contexts, histogram, mean=item.mean, std=item.std, wd=item.wd, **frames
    )


def test_the_modes_share_the_density_out(
    decomposed: Decomposed, output: tuple[pd.DataFrame, SparseNeuron]
) -> None:
    histogram, item = output
    ax = plot_modes(decomposed.modes, histogram=histogram, mean=item.mean, std=item.std)
    steps = {str(p.get_label()): p.get_data() for p in ax.patches if isinstance(p, StepPatch)}
    assert list(steps) == ["mode 0", "mode 1"]
    border = (-2.5 - item.mean) / item.std
    assert steps["mode 0"][1][-1] == steps["mode 1"][1][0] == pytest.approx(border)
    mass = {name: np.sum(y * np.diff(edges)) for name, (y, edges, _) in steps.items()}
    assert sum(mass.values()) == pytest.approx(1.0)
    below = histogram.loc[histogram["right"] <= -2.5, "count"].sum() / histogram["count"].sum()
    assert mass["mode 0"] == pytest.approx(below, abs=0.01)


def test_texts_are_tokens_shares_and_contexts_in_sigma(
    decomposed: Decomposed, output: tuple[pd.DataFrame, SparseNeuron]
) -> None:
    figure = draw(decomposed, output, per_mode=2)
    written = texts(figure)
    assert "mode 0: 12 % of the tokens (n = 480), outputs in σ:" in written
    assert "most frequent: “ the” 88 %, “\\u56fd” 6.2 %, “\\n” 1 %" in [
        text.replace("\u00a0", " ") for text in written
    ]
    shown = drawn(figure).query("panel == 'contexts'")
    assert shown["series"].tolist() == ["mode 0"] * 2 + ["mode 1"] * 2
    _, item = output
    first = decomposed.contexts["output"].iloc[0]
    assert shown["x"].iloc[0] == pytest.approx((first - item.mean) / item.std)
    assert any(text.startswith(f"neuron {TOP}, WD = 0.450") for text in written)


def test_one_mode_without_contexts_is_a_figure(
    decomposed: Decomposed, output: tuple[pd.DataFrame, SparseNeuron]
) -> None:
    modes = decomposed.modes.head(1).assign(right=np.inf, share=1.0, tokens=4000)
    figure = draw(decomposed, output, modes=modes, per_mode=0)
    assert not overlapping(figure)
    assert not outside(figure)


def test_many_narrow_modes_keep_their_numbers_apart(
    decomposed: Decomposed, output: tuple[pd.DataFrame, SparseNeuron]
) -> None:
    borders = [-np.inf, -1.0, 0.0, 1.0, np.inf]
    modes = pd.concat([decomposed.modes.head(1)] * 4).assign(
        mode=range(4), left=borders[:-1], right=borders[1:]
    )
    for column in ("single", "double"):
        figure = draw(decomposed, output, modes=modes, per_mode=1, column=column)
        assert not overlapping(figure)
    assert not outside(figure)


def test_bad_tables_are_one_clear_line(
    decomposed: Decomposed, output: tuple[pd.DataFrame, SparseNeuron]
) -> None:
    modes = decomposed.modes
    with pytest.raises(InvalidInput, match=r"`modes`.*\binf\b"):
        draw(decomposed, output, modes=modes.assign(left=np.inf))
    with pytest.raises(InvalidInput, match=r"JSON.*'nonsense'"):
        draw(decomposed, output, modes=modes.assign(top_tokens="nonsense"))
    with pytest.raises(InvalidInput, match=r"JSON.*'\[3\]'"):
        draw(decomposed, output, modes=modes.assign(top_tokens="[3]"))
    with pytest.raises(InvalidInput, match=r"top_tokens.*without.*`entangle decompose`"):
        draw(decomposed, output, modes=modes.drop(columns="top_tokens"))
    with pytest.raises(InvalidInput, match=r"`contexts`.*without.*`entangle decompose`"):
        draw(decomposed, output, contexts=decomposed.contexts.drop(columns="before"))
    with pytest.raises(InvalidInput, match=r"`neuron`.*\b7\b.*\b8\b"):
        draw(decomposed, output, neuron=8)
