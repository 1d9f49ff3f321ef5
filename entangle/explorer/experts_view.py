"""The view of a neuron's experts: how they recover its outputs, and what each of them holds."""

import pandas as pd

from entangle.errors import EntangleError, InvalidInput
from entangle.explorer.content import Content, picture
from entangle.explorer.evidence import ExpertFinder
from entangle.explorer.table import NeuronTable
from entangle.html_tables import escaped, html_table
from entangle.plotting import figure_experts, figure_recovery

ALSO = 8
"""Neurons of largest WD whose outputs are kept as well when a layer is decomposed."""
_NEEDS = (
    "<p>Experts need a decomposition, or the model and a text: "
    "<code>entangle.explore(scores, decomposition=decomposition)</code> or "
    "<code>entangle.explore(scores, text, model=model)</code>.</p>"
)
_COLUMNS = {
    "experts": "experts",
    "ri": "RI",
    "output_wd": "WD from dense",
    "wd": "WD",
    "weighted_wd": "WD in clusters",
    "md": "MD",
    "weighted_md": "MD in clusters",
    "smallest_cluster": "smallest cluster",
}
_LEGEND = (
    "RI: how many times smaller the error is than with one expert. WD in σ, MD as such: of all "
    "tokens, and the mean inside the clusters. Smallest cluster in tokens."
)


def experts_view(
    finder: ExpertFinder, table: NeuronTable, layer: str, neuron: int, *, asked: bool
) -> Content:
    """Show what is known of a neuron's experts; offer to fit them."""
    rows, outputs = finder.known(layer, neuron)
    if asked and outputs.empty and finder.subject is not None:
        top = table.sorted_by("wd", ascending=False).neurons(0)[:ALSO]
        try:
            finder.find(layer, list(dict.fromkeys([neuron, *top])))
        except EntangleError as error:
            return Content(html=f"<p>{escaped(error)}</p>")
        rows, outputs = finder.known(layer, neuron)
    offer = "" if finder.subject is None or not outputs.empty else _offer(finder)
    if rows.empty:
        return Content(html="" if finder.subject else _NEEDS, offer=offer)
    shown = rows[[name for name in _COLUMNS if name in rows.columns]].rename(columns=_COLUMNS)
    zeros = f"{100 * float(rows['sparsity'].iloc[0]):g} % of the weights are zero."
    html = f"{html_table(shown, rows=20)}<p><small>{zeros} {_LEGEND}</small></p>"
    if outputs.empty:
        return Content(html=html, offer=offer)
    try:
        return Content(_pictures(rows, outputs), html)
    except InvalidInput as error:
        return Content(html=f"<p>{escaped(error)}</p>{html}")


def _pictures(rows: pd.DataFrame, outputs: pd.DataFrame) -> tuple[bytes, bytes]:
    recovery = figure_recovery(outputs, rows, column="single")
    return picture(recovery), picture(figure_experts(outputs, rows, column="single"))


def _offer(finder: ExpertFinder) -> str:
    numbers = ", ".join(map(str, finder.experts))
    return f"Fit {numbers} experts with {100 * finder.sparsity:g} % zeros to this layer"
