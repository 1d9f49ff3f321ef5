import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from scipy import stats

from entangle.errors import InvalidInput, UnknownName
from entangle.plotting import drawn, figure_predictors, plot_predictor
from entangle.plotting.predictors import PREDICTORS
from tests.plotting.decomposition_frames import N_NEURONS, Decomposed


def said(ax: Axes) -> str:
    key = ax.get_legend()
    texts = [text.get_text() for text in key.get_texts()] if key else []
    return "; ".join([*texts, ax.get_title(loc="left") + ax.get_title()]).replace("\u00a0", " ")


def labels(figure: Figure) -> list[str]:
    """Labels of the x axes, which may be broken to the panels' width."""
    return [ax.get_xlabel().replace("\n", " ") for ax in figure.axes]


def test_points_line_and_coefficients(decomposed: Decomposed) -> None:
    ax = plot_predictor(decomposed.neurons, predictor="md", experts=16, n_boot=50, top=0.05)
    rows = decomposed.neurons[decomposed.neurons["experts"] == 16]
    points = [c for c in ax.collections if isinstance(c, PathCollection)]
    assert [len(np.asarray(c.get_offsets())) for c in points] == [N_NEURONS - 3, 3]
    found = stats.linregress(rows["md"], rows["ri"])
    (line,) = ax.get_lines()
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    np.testing.assert_allclose(y, found.intercept + found.slope * x)
    text = said(ax)
    assert f"R² {found.rvalue**2:.2f} [" in text
    assert f"ρ {stats.spearmanr(rows['md'], rows['ri']).statistic:.2f} [" in text
    assert "95 % bootstrap, 50 resamples, seed 0" in text


def test_derived_predictors_are_made_from_their_columns(decomposed: Decomposed) -> None:
    rows = decomposed.neurons[decomposed.neurons["experts"] == 16]
    expected = {
        "abs_skewness": rows["skewness"].abs(),
        "abs_mean": rows["mean"].abs(),
        "variance": rows["std"] ** 2,
    }
    for name, values in expected.items():
        figure = plot_predictor(rows, predictor=name, n_boot=5).get_figure(root=True)
        assert figure is not None
        shown = drawn(figure).dropna(subset="neuron").sort_values("neuron")
        np.testing.assert_allclose(shown["x"], values)


def test_figure_has_a_panel_a_predictor_that_is_there(decomposed: Decomposed) -> None:
    counted = decomposed.neurons.assign(gmm_components=decomposed.neurons["neuron"] % 3 + 1.0)
    figure = figure_predictors(counted, n_boot=5)
    assert labels(figure) == [label for label, *_ in PREDICTORS.values()]
    fewer = decomposed.neurons.drop(columns=["md", "skewness"]).assign(ks=0.1, mean=np.nan)
    figure = figure_predictors(fewer, n_boot=5)
    assert labels(figure) == [
        PREDICTORS[name][0] for name in ("wd", "excess_kurtosis", "variance", "weight_norm")
    ]
    assert len({ax.get_ylim() for ax in figure.axes}) == 1


def test_what_is_not_finite_is_counted(decomposed: Decomposed) -> None:
    rows = decomposed.neurons[decomposed.neurons["experts"] == 16].copy()
    rows.loc[rows.index[:2], "ri"] = np.nan
    rows.loc[rows.index[2], "wd"] = np.inf
    assert "3 left out: not finite" in said(plot_predictor(rows, n_boot=5))


def test_panels_say_how_many_have_no_number(decomposed: Decomposed) -> None:
    rows = decomposed.neurons[decomposed.neurons["experts"] == 16]
    counted = rows.assign(gmm_components=np.where(np.arange(len(rows)) < 5, np.nan, rows["neuron"]))
    figure = figure_predictors(counted, n_boot=5)
    assert labels(figure)[-1] == "components of a mixture"
    assert said(figure.axes[-1]).endswith(f"\nn = {len(rows) - 5}\n5 not finite")


def test_too_little_is_refused_in_one_line(decomposed: Decomposed) -> None:
    rows = decomposed.neurons[decomposed.neurons["experts"] == 16]
    with pytest.raises(InvalidInput, match=r"\b3\b.*RI.*\b2\b.*\b2\b"):
        figure_predictors(rows.head(2))
    with pytest.raises(InvalidInput, match=r"\b3\b.*RI"):
        figure_predictors(rows.assign(ri=np.nan))
    with pytest.raises(InvalidInput, match=r"different.*\b1\b"):
        figure_predictors(rows.assign(ri=1.0))
    with pytest.raises(InvalidInput, match=r"\b2\b.*\b1\b.*`entangle decompose --experts 1,4,16`"):
        figure_predictors(decomposed.neurons, experts=1)
    with pytest.raises(UnknownName, match="'luck'"):
        plot_predictor(rows, predictor="luck")
    with pytest.raises(InvalidInput, match=r"`neurons`.*without.*`entangle decompose`"):
        figure_predictors(rows.drop(columns="ri"))
