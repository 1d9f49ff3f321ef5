"""The explorer where nothing can be clicked: a table and a figure as HTML."""

from entangle.errors import InvalidInput
from entangle.explorer.content import image, picture
from entangle.html_tables import escaped
from entangle.plotting import figure_top_and_typical
from entangle.scoring.scores import NeuronScores

_NO_CLICKS = (
    "Nothing can be clicked here: in JupyterLab or a classic notebook with a running kernel and "
    "ipywidgets, run the cell again."
)


def static_html(scores: NeuronScores, layer: str) -> str:
    """Return the top neurons of a layer, and the distributions of the top and a typical one."""
    one = scores.layer(layer)
    try:
        shown = image(picture(figure_top_and_typical(one.frame, one.histogram)))
    except InvalidInput as error:
        shown = f"<p>{escaped(error)}</p>"
    return f"{one._repr_html_()}{shown}<p><small>{escaped(_NO_CLICKS)}</small></p>"
