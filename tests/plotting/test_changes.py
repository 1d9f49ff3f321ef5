import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.patches import StepPatch

from entangle.errors import InvalidInput, UnknownName
from entangle.plotting import caption_of, figure_disentanglement, plot_change
from tests.plotting.decomposition_frames import LAYER, N_NEURONS, Decomposed


def legend(ax: Axes) -> list[str]:
    key = ax.get_legend()
    assert key is not None
    texts = [key.get_title().get_text(), *(text.get_text() for text in key.get_texts())]
    return [text.replace("\u00a0", " ").replace("\n", " ") for text in texts]


def table(change: list[float]) -> pd.DataFrame:
    """Neurons whose WD changes by so many %; the last has the largest."""
    n = len(change)
    frame = {"layer": "l", "neuron": range(n), "experts": 4, "sparsity": 0.9}
    wd = np.linspace(0.1, 0.5, n)
    return pd.DataFrame({**frame, "wd": wd, "weighted_wd": wd * (1 + np.array(change) / 100)})


def test_shares_and_medians_worked_out_by_hand() -> None:
    frame = table([-10.0, -20.0, -30.0, 10.0, -40.0, -50.0, -60.0, -90.0])
    title, *names = legend(plot_change(frame, top=0.1))
    assert title.startswith("l: 4 clusters against one")
    assert names == ["other neurons (n = 7)", "top 10 % by WD (n = 1)"]
    # Wilson: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n) with p = 6/7, n = 7, z = 1.96
    assert "other neurons (n = 7): falls for 85.7 % [48.7, 97.4], median −30 % [−60, +10]" in title
    assert "top 10 % by WD (n = 1): falls for 100 % [20.7, 100], median −90 %" in title
    assert "nan" not in title


def test_density_holds_every_neuron_of_a_group(decomposed: Decomposed) -> None:
    ax = plot_change(decomposed.neurons, experts=8, top=0.1)
    steps = {str(p.get_label()): p.get_data() for p in ax.patches if isinstance(p, StepPatch)}
    assert list(steps) == ["other neurons", "top 10 % by WD"]
    for values, edges, _ in steps.values():
        assert np.sum(values * np.diff(edges)) == pytest.approx(100.0)


def test_figure_draws_wd_and_md_at_the_largest_number_of_experts(decomposed: Decomposed) -> None:
    figure = figure_disentanglement(decomposed.neurons)
    assert [ax.get_xlabel() for ax in figure.axes] == [
        "change of weighted WD (%)",
        "change of weighted MD (%)",
    ]
    said = caption_of(figure).replace("\u00a0", " ")
    assert "(top)" in figure.axes[0].get_title(loc="left")
    assert f"{LAYER}: 16 clusters against one, the smallest of 250 tokens" in said
    only_wd = decomposed.neurons.drop(columns=["md", "weighted_md"])
    assert len(figure_disentanglement(only_wd).axes) == 1


def test_neurons_without_a_change_are_counted(decomposed: Decomposed) -> None:
    frame = decomposed.neurons[decomposed.neurons["experts"] == 4].copy()
    frame.loc[frame.index[:2], "weighted_wd"] = np.nan
    frame.loc[frame.index[2], "wd"] = 0.0
    assert "3 without a finite change left out" in legend(plot_change(frame))[0]
    with pytest.raises(InvalidInput, match=r"finite.*weighted_wd"):
        plot_change(frame.assign(weighted_wd=np.nan))


def test_neurons_far_out_are_in_the_end_bins_and_counted() -> None:
    title = legend(plot_change(table([900.0, *[-10.0] * 50])))[0]
    assert "1 beyond the axis are in its end bins" in title


@pytest.mark.parametrize("n", [1, N_NEURONS])
def test_equal_changes_and_a_single_neuron_are_drawn(n: int) -> None:
    assert "median −25 %" in " ".join(legend(plot_change(table([-25.0] * n))))


def test_bad_requests_are_one_clear_line(decomposed: Decomposed) -> None:
    frame = decomposed.neurons
    with pytest.raises(UnknownName, match="'ks'"):
        plot_change(frame, measure="ks", experts=4)
    with pytest.raises(InvalidInput, match=r"\b2\b.*\b1\b.*`entangle decompose --experts 1,4,16`"):
        figure_disentanglement(frame, experts=1)
    with pytest.raises(InvalidInput, match=r"`top`.*\b0\.0\b"):
        plot_change(frame, top=0.0, experts=4)
    with pytest.raises(InvalidInput, match=r"weighted_wd.*`entangle decompose`"):
        figure_disentanglement(frame.drop(columns="weighted_wd"))
