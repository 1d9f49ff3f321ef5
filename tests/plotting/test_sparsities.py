import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.patches import StepPatch
from numpy.typing import NDArray

from entangle.errors import InvalidInput, UnknownName
from entangle.plotting import caption_of, figure_sparsities
from entangle.plotting.sparse_outputs import MAX_SPARSITIES
from tests.plotting.decomposition_frames import LAYER, TOP, TYPICAL, Decomposed

Tables = tuple[pd.DataFrame, pd.DataFrame]


def at(decomposed: Decomposed, *sparsities: float) -> Tables:
    """Return tables of several sparsities, as of several runs joined; W1 grows with sparsity."""
    outputs = [decomposed.outputs.assign(sparsity=s) for s in sparsities]
    neurons = [
        decomposed.neurons.assign(sparsity=s, output_wd=decomposed.neurons["output_wd"] + s)
        for s in sparsities
    ]
    return pd.concat(outputs), pd.concat(neurons)


def titles(tables: Tables, **options: int) -> list[str]:
    axes = figure_sparsities(*tables, **options).axes  # type: ignore[arg-type]
    return [ax.get_title(loc="left").replace("\u00a0", " ") for ax in axes]


def shares(ax: Axes) -> dict[str, NDArray[np.float64]]:
    """Return the share of the tokens in every bin, by kind."""
    steps = {str(p.get_label()): p.get_data() for p in ax.patches if isinstance(p, StepPatch)}
    return {kind: np.asarray(data[0]) * np.diff(data[1]) for kind, data in steps.items()}


def test_a_panel_a_sparsity_from_the_lowest(decomposed: Decomposed) -> None:
    outputs, neurons = at(decomposed, 0.95, 0.5)
    figure = figure_sparsities(outputs, neurons)
    row = decomposed.neurons.query(f"neuron == {TOP} and experts == 1").iloc[0]
    assert titles((outputs, neurons)) == [
        f"{percent} % zeros\nW₁ to dense {row['output_wd'] + percent / 100:.3f} σ"
        for percent in (50, 95)
    ]
    said = caption_of(figure).replace("\u00a0", " ")
    assert f"{LAYER}, 1 expert, n = 4,000 tokens" in said
    assert f"top neuron {TOP}: WD = 0.450 σ" in said
    assert said.count(": WD") == 1
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in figure.axes}) == 1


def test_each_panel_has_the_outputs_of_its_sparsity(decomposed: Decomposed) -> None:
    outputs, neurons = at(decomposed, 0.5, 0.95)
    changed = outputs["kind"].eq("sparse") & outputs["sparsity"].eq(0.95)
    outputs.loc[changed, "count"] = np.where(outputs.loc[changed, "cluster"] == -1, 7, 0)
    dense, sparse = (
        [shares(ax)[kind] for ax in figure_sparsities(outputs, neurons, experts=4).axes]
        for kind in ("dense", "sparse")
    )
    np.testing.assert_allclose(dense[0], dense[1])
    assert np.ptp(sparse[0]) > 0.01
    np.testing.assert_allclose(sparse[1], 1 / len(sparse[1]))


def test_another_neuron_and_number_of_experts(decomposed: Decomposed) -> None:
    tables = at(decomposed, 0.5)
    row = decomposed.neurons.query(f"neuron == {TYPICAL} and experts == 8").iloc[0]
    (title,) = titles(tables, neuron=TYPICAL, experts=8)
    assert title == f"50 % zeros\nW₁ to dense {row['output_wd'] + 0.5:.3f} σ, RI {row['ri']:.2f}"


def test_bad_requests_are_one_clear_line(decomposed: Decomposed) -> None:
    outputs, neurons = at(decomposed, 0.5, 0.95)
    with pytest.raises(InvalidInput, match=r"`experts`.*\b1\b.*\b2\b.*\b4\b.*\b8\b.*\b16\b.*\b3\b"):
        figure_sparsities(outputs, neurons, experts=3)
    with pytest.raises(UnknownName, match="'model'"):
        figure_sparsities(outputs, neurons, layer="model")
    with pytest.raises(InvalidInput, match=r"`outputs`.*without.*`entangle decompose`"):
        figure_sparsities(outputs.drop(columns="sparsity"), neurons)
    many = at(decomposed, *(n / 100 for n in range(MAX_SPARSITIES + 1)))
    with pytest.raises(InvalidInput, match=r"`outputs`.*\b1\b.*\b10\b.*\b11\b"):
        figure_sparsities(*many)
