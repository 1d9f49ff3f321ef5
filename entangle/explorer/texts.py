"""Views that look into texts: tokens searched for, pairs that are put apart, a text of one's own.

Which text a view is of: a warning where it is not that of the scores.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from entangle.errors import EntangleError
from entangle.explorer.evidence import Content, ModeFinder
from entangle.explorer.views import Unit, context_row
from entangle.modes.probe import probe
from entangle.results.scores import NeuronScores
from entangle.runs.tables import described, escaped, html_table, number
from entangle.texts.words import TokenText

EXAMPLES = 12
"""Contexts that a search shows: of the largest outputs, half of either sign."""
_SEARCH_NEEDS = (
    "<p>A search needs the model and a text, or a decomposition that holds modes: "
    "<code>entangle.explore(scores, text, model=model)</code>.</p>"
)
_PAIRS_NEED = (
    "<p>Pairs need a decomposition that holds them, or the model and a text: "
    "<code>entangle.explore(scores, text, model=model)</code>.</p>"
)
_PROBE_NEEDS = (
    "<p>A text of your own needs the model: "
    "<code>entangle.explore(scores, text, model=model)</code>.</p>"
)


@dataclass(frozen=True)
class SeenText:
    """A text that something was measured on."""

    digest: str
    """Of its tokens; ``?`` where unknown."""
    name: str
    """Its size and source."""

    @classmethod
    def of(cls, calibration: object) -> "SeenText":
        """Read what a manifest says under ``calibration``, or `CalibrationSet.describe`."""
        sizes = " × ".join(described(calibration, key) for key in ("n_seq", "seq_len"))
        name = f"{sizes} tokens of {described(calibration, 'source')}"
        seed = described(calibration, "settings", "seed", default="")
        name += f", seed {seed}" if seed else ""
        return cls(described(calibration, "digest"), name)


def other_text(scores: NeuronScores, seen: SeenText | None, *, wd: tuple[float, float]) -> str:
    """Return a warning as HTML where a view is of another text than the scores, else nothing.

    Parameters
    ----------
    scores
        Those that the explorer shows.
    seen
        The text of the view; None if it shows none.
    wd
        The neuron's WD in the scores, and on that text, NaN where the view shows none.
    """
    own = SeenText.of(scores.manifest.get("calibration"))
    if seen is None or seen.digest == own.digest:
        return ""
    ours, theirs = wd
    numbers = (
        f" The neuron's WD is {number(theirs)} on that text, {number(ours)} on that of the scores "
        "(in the heading)."
        if np.isfinite(theirs)
        else ""
    )
    return (
        '<p class="entangle-warning" role="note">This is of another text than the scores: '
        f"{escaped(seen.name)}; the scores are of {escaped(own.name)}.{numbers}</p>"
    )


def pairs_view(finder: ModeFinder, layer: str, neuron: int, *, asked: bool) -> Content:
    """Show tokens whose inputs are near and whose outputs are far apart; offer to find them."""
    try:
        rows = finder.known_pairs(layer, neuron)
        if rows is None and asked and finder.subject is not None:
            rows = finder.pairs(layer, neuron)
    except EntangleError as error:
        return Content(html=f"<p>{escaped(error)}</p>")
    if rows is None:
        if finder.subject is None:
            return Content(html=_PAIRS_NEED)
        size = finder.subject.size
        return Content(offer=f"Find pairs: run the model over {size}, up to this layer")
    if rows.empty:
        return Content(html="<p>No two tokens are near in the input and apart in the output.</p>")
    told = "".join(_pair(row) for row in rows.to_dict("records"))
    legend = (
        "Two tokens a box: their inputs are among the nearest of all pairs (distance of the "
        "inputs, cosine), their outputs lie so many σ apart."
    )
    return Content(html=f"{told}<p><small>{legend} {finder.sent(layer)}</small></p>")


def _pair(row: Mapping[Any, Any]) -> str:
    lines = "".join(
        context_row(
            number(row[f"output_{side}"], 3),
            *_cut(str(row[f"context_{side}"]), int(row[f"start_{side}"]), int(row[f"end_{side}"])),
        )
        for side in "ab"
    )
    title = (
        f"<b>{number(row['output_distance'], 3)} σ</b> apart; inputs "
        f"{number(row['input_distance'], 3)} apart, cosine {number(row['cosine'], 3)}"
    )
    table = f'<table class="entangle-contexts">{lines}</table>'
    return f'<div class="entangle-mode"><p>{title}</p>{table}</div>'


def _cut(text: str, start: int, end: int) -> tuple[str, str, str]:
    return text[:start], text[start:end], text[end:]


def search_view(finder: ModeFinder, layer: str, neuron: int, query: str, *, asked: bool) -> Content:
    """Show the outputs on all tokens that hold a text, and the modes of the layer that have it."""
    known = finder.has_modes(layer)
    if finder.subject is None and not known:
        return Content(html=_SEARCH_NEEDS)
    recorded = finder.is_recorded(layer)
    if not query or not (asked or recorded or finder.subject is None):
        return Content(offer="Search")
    html = _modes_with(finder.modes_of(layer), query) if known else ""
    try:
        if finder.subject is not None:
            html = _found_tokens(finder, layer, neuron, query) + html
    except EntangleError as error:
        html = f"<p>{escaped(error)}</p>"
    return Content(html=html, offer="Search")


def _found_tokens(finder: ModeFinder, layer: str, neuron: int, query: str) -> str:
    subject = finder.subject
    assert subject is not None  # noqa: S101
    text, words = subject.calibration, TokenText(subject.model.tokenizer)
    rows = text.rows
    ids = np.concatenate([rows.sequence(s).numpy() for s in range(text.n_seq)])
    known, place = np.unique(ids, return_inverse=True)
    names = [words.token(int(one)) for one in known]
    wanted = np.array([query.casefold() in name.casefold() for name in names])
    positions = np.flatnonzero(wanted[place])
    if len(positions) == 0:
        return f"<p>No token of the text holds {escaped(query)!r}: it may be cut in several.</p>"
    outputs = finder.outputs(layer, neuron)
    found = finder.find(layer, neuron)
    whole = len(positions)
    positions = positions[~np.isnan(outputs[positions])]
    if len(positions) == 0:
        return f"<p>This expert is sent none of {whole:,} tokens with {escaped(query)}.</p>"
    unit = Unit(found.mean, found.std)
    sigma = (outputs[positions] - found.mean) / (found.std or 1.0)
    frame = pd.DataFrame({"token": [names[i] for i in place[positions]], "sigma": sigma})
    table = frame.groupby("token", sort=False)["sigma"].agg(["size", "mean", "min", "max"])
    table = table.sort_values("size", ascending=False, kind="stable").reset_index()
    table.columns = pd.Index(["token", "count", "mean σ", "lowest σ", "highest σ"])
    order = np.argsort(sigma, kind="stable")
    half = EXAMPLES // 2
    chosen = list(dict.fromkeys([*order[:half].tolist(), *order[-half:].tolist()]))
    lines = ""
    for one in chosen:
        sequence, at = text.place(int(positions[one]))
        before, token, after = words.context(rows.sequence(sequence).tolist(), at, 12)
        lines += context_row(unit.text(float(outputs[positions[one]])), before, token, after)
    sent = "" if len(positions) == whole else f" ({len(positions):,} of them sent to this expert)"
    return (
        f"<p>{whole:,} of {len(ids):,} tokens hold <b>{escaped(query)}</b>{sent}; the lowest "
        f"and highest outputs among them, in σ of this text:</p>{html_table(table, rows=8)}"
        f'<table class="entangle-contexts">{lines}</table>'
    )


def _modes_with(modes: pd.DataFrame, query: str) -> str:
    """Return neurons of the layer with a mode among whose frequent tokens is one with the text."""
    rows = [
        (int(row["neuron"]), int(row["mode"]), str(token), int(count), float(share))
        for row in modes.to_dict("records")
        for token, count, share in json.loads(row["top_tokens"])
        if query.casefold() in str(token).casefold()
    ]
    if not rows:
        return "<p>No mode of the decomposition has it among its frequent tokens.</p>"
    table = pd.DataFrame(rows, columns=["neuron", "mode", "token", "count", "share of the mode"])
    table = table.sort_values("share of the mode", ascending=False, kind="stable")
    return f"<p>Modes with it among their frequent tokens:</p>{html_table(table, rows=20)}"


def probe_view(
    finder: ModeFinder, scores: NeuronScores, layer: str, neuron: int, text: str, *, asked: bool
) -> Content:
    """Show a text of one's own coloured by the neuron's outputs, in σ and modes of the scores."""
    subject = finder.subject
    if subject is None:
        return Content(html=_PROBE_NEEDS)
    if not (asked and text):
        return Content(offer="Run the model on this text")
    try:
        found = probe(subject.model, layer, neuron, text, scores=scores)
    except EntangleError as error:
        return Content(html=f"<p>{escaped(error)}</p>", offer="Run the model on this text")
    return Content(html=found._repr_html_(), offer="Run the model on this text")
