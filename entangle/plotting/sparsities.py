"""A neuron's outputs as more and more of its weights become zero."""

import pandas as pd
from matplotlib.figure import Figure

from entangle.errors import InvalidInput
from entangle.plotting.choices import DECOMPOSE, choose, sparse_neuron, usual_neurons
from entangle.plotting.sparse_outputs import MOST_ACROSS, Panel, draw_panels, experts_text
from entangle.plotting.style import Column
from entangle.plotting.summaries import check_columns

MAX_SPARSITIES = 10


def figure_sparsities(
    outputs: pd.DataFrame,
    neurons: pd.DataFrame,
    *,
    layer: str | None = None,
    neuron: int | None = None,
    experts: int = 1,
    column: Column = "double",
    digest: str | None = None,
) -> Figure:
    """Draw what sparsity makes of one neuron's outputs, one panel a sparsity.

    Parameters
    ----------
    outputs, neurons
        As in `entangle.plotting.figure_recovery`: tables of several decompositions of one layer on
        one text, at several sparsities, joined by `pandas.concat`.
    layer
        Which; may be left out where the tables hold only one.
    neuron
        None takes the one with the largest WD.
    experts
        Number of experts.
    column
        Width: ``"single"`` or ``"double"``.
    digest
        Of the run, for the small print; see `entangle.plotting.signature.sign`.

    Returns
    -------
    matplotlib.figure.Figure
        Panels with common axes, from the lowest sparsity to the highest; each states W1 between the
        sparse and dense outputs, and RI where there are several experts.

    Raises
    ------
    InvalidInput, UnknownName
        What `entangle.plotting.plot_sparse_output` refuses, or too many sparsities.

    References
    ----------
    arXiv 2405.15756, figure A9.
    """
    rows = choose(outputs, name="outputs", layer=layer, experts=experts)
    check_columns(rows, ("layer", "neuron", "sparsity"), name="outputs", writer=DECOMPOSE)
    sparsities = sorted(map(float, rows["sparsity"].unique()))
    if len(sparsities) > MAX_SPARSITIES:
        raise InvalidInput(
            f"`outputs` must hold 1 to {MAX_SPARSITIES} sparsities for one figure; got "
            f"{len(sparsities)}; choose some of them."
        )
    name = str(rows["layer"].iloc[0])
    known = [int(number) for number in rows["neuron"].unique()]
    of_layer = choose(neurons, name="neurons", layer=name, sparsity=sparsities[0])
    usual = dict(usual_neurons(of_layer, known))
    wanted = next(iter(usual)) if neuron is None else neuron
    role = usual.get(wanted, "output")
    panels: list[Panel] = [
        (
            sparse_neuron(neurons, layer=name, neuron=wanted, sparsity=sparsity, role=role),
            experts,
            f"{100 * sparsity:.4g}\u00a0% zeros",
        )
        for sparsity in sparsities
    ]
    down = -(-len(panels) // MOST_ACROSS[column])
    across = -(-len(panels) // down)
    return draw_panels(
        outputs, panels, said=experts_text(experts), across=across, column=column, digest=digest
    )
