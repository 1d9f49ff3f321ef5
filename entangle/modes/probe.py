"""A text of one's own through one neuron: output and mode of every token, as table and HTML."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from entangle.checks import named, whole
from entangle.errors import InvalidInput
from entangle.models.blocks import evaluates
from entangle.models.layers import Layer, LayerSpec
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.modes.modes import check_neurons, find_modes, layer_outputs, mode_of, one_layer
from entangle.plotting.style import NOMINAL
from entangle.results.scores import NeuronScores, load_scores
from entangle.runs.provenance import recorded
from entangle.runs.tables import described, escaped, number
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.special_tokens import DEFAULT_POLICY, affixes, check_policy
from entangle.texts.words import TokenText

Floats = NDArray[np.float64]

SCALE = 3.0
"""Outputs of so many σ have the full colour."""
_BROKEN, _LONGEST = re.compile(r"<0x[0-9A-F]{2}>"), 8
"""What `TokenText` writes for a byte that is no character, and tokens that share characters."""
_PAGE = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
    'content="width=device-width, initial-scale=1"><title>{title}</title><style>:root '
    "{{ color-scheme: light dark }} body {{ font: 16px/1.8 system-ui, sans-serif; margin: 0 auto; "
    "max-width: 50em; padding: 16px }}</style>{body}</html>"
)


@dataclass(frozen=True, eq=False)
class Probe:
    """What one neuron puts out on the tokens of a text."""

    layer: str
    """Full dotted name."""
    neuron: int
    """Its index in the layer."""
    frame: pd.DataFrame
    """One row a token: position, token_id, token (its text; what cannot be seen is spelled out),
    piece (the text shown: where characters are spread over several tokens, all of it stands at the
    first and nothing at the others), special (whether it was put around the text), output (in its
    own units), sigma ((output − mean) / std of the scores), percentile (share of the scores' tokens
    below it, in percent), mode (from 0). Without scores the last three are missing; so is the mode
    of an output that is not finite."""
    modes: pd.DataFrame = field(repr=False)
    """The modes, as `entangle.modes.find_modes`; empty without scores."""
    mean: float
    """Of the neuron's outputs in the scores, NaN without."""
    std: float
    """Likewise their standard deviation."""
    about: Mapping[str, object] = field(repr=False)
    """Model, text of the scores, special tokens, and where the modes are from."""
    sent: int | None = None
    """Tokens that are sent to the neuron's expert, which gives nothing on the others, whose output
    is NaN; None of a layer that sees all."""

    @property
    def strength(self) -> Floats:
        """How strongly each token is coloured, in [-1, 1], shape (tokens,).

        In units of 3 σ; without scores in units of the text's largest output.
        """
        values = self.frame["sigma"].to_numpy(np.float64) / SCALE
        if not np.isfinite(self.std):
            values = self.frame["output"].to_numpy(np.float64)
            size = np.abs(values[np.isfinite(values)]).max(initial=0.0)
            values = values / (size or 1.0)
        return np.clip(np.nan_to_num(values, nan=0.0, posinf=1.0, neginf=-1.0), -1.0, 1.0)

    @property
    def colors(self) -> list[str]:
        """Colour of every token's mode; with one mode or none that of the output's sign."""
        if len(self.modes) > 1:
            place = self.frame["mode"].fillna(0).astype(int)
            return [NOMINAL[mode % len(NOMINAL)] for mode in place]
        return [NOMINAL[0] if strength > 0 else NOMINAL[1] for strength in self.strength]

    @property
    def title(self) -> str:
        """Layer and neuron."""
        return f"{self.layer} · neuron {self.neuron}"

    def pieces(self) -> list[tuple[str, list[int]]]:
        """Return the pieces that the text is shown in, and the rows of the tokens of each."""
        found: list[tuple[str, list[int]]] = []
        for row, piece in enumerate(self.frame["piece"]):
            if piece or not found:
                found.append((piece, [row]))
            else:
                found[-1][1].append(row)
        return found

    def strongest(self, rows: list[int]) -> int:
        """Return the row of the token whose output is farthest out, among some."""
        return rows[int(np.abs(self.strength[rows]).argmax())]

    def legend(self) -> list[str]:
        """Return what the colours mean, a line each; and how many tokens an expert is sent."""
        if self.sent is None:
            return self._meanings()
        count = f"{self.sent} of {len(self.frame)} tokens are sent to this expert"
        return [*self._meanings(), f"{count}; it puts out nothing on the others"]

    def _meanings(self) -> list[str]:
        if not np.isfinite(self.std):
            return [
                "Outputs in their own units, coloured by sign; without scores there are no modes."
            ]
        moved = f"output {'+' if self.mean < 0 else '−'} {number(abs(self.mean), 3)}"
        lines = [f"σ: ({moved}) / {number(self.std, 3)}, of the scores' text"]
        for row in self.modes.to_dict("records") if len(self.modes) > 1 else ():
            left, right = ((float(row[end]) - self.mean) / self.std for end in ("left", "right"))
            ends = f"{number(left, 2)} to {number(right, 2)} σ"
            share = f"{100 * row['share']:.3g} % of the scores' tokens"
            lines.append(f"mode {row['mode']}: {ends}, {share}")
        return lines if len(self.modes) > 1 else [*lines, "one mode"]

    def html(self) -> str:
        """Return the text as a page of its own; nothing in it acts on the page."""
        return _PAGE.format(title=escaped(self.title), body=self._repr_html_())

    def _repr_html_(self) -> str:
        rows = self.frame.to_dict("records")
        colors, strength, tokens = self.colors, np.abs(self.strength), ""
        for piece, some in self.pieces():
            best = self.strongest(some)
            tokens += _span(piece, [rows[one] for one in some], colors[best], strength[best])
        keys = "<br>".join(
            f'<span style="border-left: 1em solid {NOMINAL[n - 1]}; padding-left: .4em">'
            f"{escaped(line)}</span>"
            if n
            else escaped(line)
            for n, line in enumerate(self.legend())
            if len(self.modes) > 1 or n == 0
        )
        return (
            f"<div><p><b>{escaped(self.title)}</b></p>"
            f'<p dir="auto" style="line-height: 1.9; overflow-wrap: anywhere">{tokens}</p>'
            f"<p><small>{keys}</small></p></div>"
        )


def _span(piece: str, rows: Sequence[Mapping[Any, Any]], color: str, share: float) -> str:
    """Return a piece as HTML; a hint tells its numbers."""
    alpha = round(255 * 0.6 * share)
    edge = "; opacity: .6; font-style: italic" if rows[0]["special"] else ""
    style = f"background: {color}{alpha:02x}; border-radius: 3px; white-space: pre-wrap{edge}"
    told = escaped("; ".join(map(_hint, rows)))
    return f'<span tabindex="0" title="{told}" style="{style}">{escaped(piece)}</span>'


def _hint(row: Mapping[Any, Any]) -> str:
    told = f"output {number(row['output'], 4)}"
    if not np.isnan(row["sigma"]):
        told += f", {number(row['sigma'], 3)} σ, above {row['percentile']:.3g} % of the tokens"
    return told if pd.isna(row["mode"]) else f"{told}, mode {row['mode']}"


@evaluates
def probe(
    model: AnyModel,
    layer: LayerSpec,
    neuron: int,
    text: str,
    *,
    scores: NeuronScores | str | os.PathLike[str] | None = None,
    modes: pd.DataFrame | None = None,
    special_tokens: str | None = None,
) -> Probe:
    """Run a text of one's own through a model and look at what one neuron puts out.

    Parameters
    ----------
    model
        A name or path for `entangle.load_model`, or a `LanguageModel` with a tokenizer.
    layer
        Full dotted name of a layer, the `Layer` itself, or anything else that names it alone.
    neuron
        Index of a neuron.
    text
        At least one token, no longer than the model's context.
    scores
        Scores of this model, or their folder: outputs are put into σ of the text of the scores, and
        the modes are found in its histogram.
    modes
        Modes of this neuron from elsewhere, with the columns of `entangle.modes.find_modes`, such
        as `NeuronModes.modes` of one neuron; instead of those in the histogram.
    special_tokens
        ``model``, ``none`` or ``published``; by default as the text of the scores has them, and
        ``model`` without scores.

    Returns
    -------
    Probe
        Shown in a notebook as the text coloured by output and mode.

    Raises
    ------
    InvalidInput, UnknownName
        If the layer or neuron does not exist, the text has no token or too many, the model has no
        tokenizer, or the scores are of another model or lack the layer.
    """
    known = as_language_model(model)
    chosen, neuron = one_layer(known.module, layer), whole("neuron", neuron, least=0)
    check_neurons(chosen, [neuron])
    if isinstance(scores, str | os.PathLike):
        scores = load_scores(scores)
    histogram, mean, std = _reference(scores, known, chosen, neuron)
    policy = _policy(special_tokens, scores)
    tokens, special = _tokenised(known, named("text", text), policy)
    outputs, at = layer_outputs(
        known.module, tokens, chosen, [neuron], progress=False, may_be_silent=True
    )
    values = outputs[0]
    if at is not None:  # an expert gives nothing on the other tokens
        values = np.full(tokens.n_tokens, np.nan, np.float32)
        values[at] = outputs[0]
    if modes is None:
        modes = histogram_modes(histogram) if len(histogram) else pd.DataFrame()
    words, ids = TokenText(known.tokenizer), tokens.ids[0].tolist()
    frame = pd.DataFrame(
        {
            "position": np.arange(len(ids)),
            "token_id": ids,
            "token": pd.Series([words.token(one) for one in ids], dtype="str"),
            "piece": pd.Series(_shown(words, ids), dtype="str"),
            "special": special,
            "output": values.astype(np.float64),
        }
    )
    frame["sigma"] = (frame["output"] - mean) / std
    frame["percentile"] = _percentiles(histogram, frame["output"].to_numpy(np.float64))
    place = pd.array([pd.NA] * len(ids), dtype="Int64")
    if len(modes):
        finite = np.isfinite(values)
        place[finite] = modes["mode"].to_numpy()[mode_of(values[finite], modes)]
    frame["mode"] = place
    about: dict[str, object] = {"model": known.name, "special_tokens": policy}
    if scores is not None:
        about["scores_text"] = described(scores.manifest, "calibration", "source")
    sent = None if at is None else len(at)
    return Probe(chosen.name, neuron, frame, modes, mean, std, about, sent)


def _shown(words: TokenText, ids: Sequence[int]) -> list[str]:
    """Return what is shown at every token; tokens that share characters are joined."""
    found, start = [], 0
    while start < len(ids):
        end, text = start + 1, words.token(ids[start])
        while _BROKEN.search(text) and end < min(start + _LONGEST, len(ids)):
            end += 1
            text = words.run(ids[start:end])
        if _BROKEN.search(text):  # no tokens that follow complete it
            end, text = start + 1, words.token(ids[start])
        found += [text, *[""] * (end - start - 1)]
        start = end
    return found


def _reference(
    scores: NeuronScores | None, model: LanguageModel, layer: Layer, neuron: int
) -> tuple[pd.DataFrame, float, float]:
    """Return a neuron's histogram, mean and deviation in the scores; nothing and NaN without."""
    if scores is None:
        return pd.DataFrame(), np.nan, np.nan
    one = scores.layer(layer.name)
    digest = described(scores.manifest, "model", "digest")
    if digest != model.digest:
        raise InvalidInput(
            f"`scores` must be of the model {model.name!r} with digest {model.digest[:12]}…; got "
            f"those of {digest[:12]}…; name the model that was scored, or score this one."
        )
    row = one.frame.iloc[neuron]
    std = float(row["std"])
    histogram = one.histogram(layer.name, neuron)
    if not (np.isfinite(std) and std > 0.0):
        raise InvalidInput(
            f"neuron {neuron} of {layer.name!r} must have outputs that vary to be put into σ; in "
            f"the scores it is {row['flag'] or 'constant'}: probe it without them."
        )
    return histogram, float(row["mean"]), std


def _policy(asked: str | None, scores: NeuronScores | None) -> str:
    if asked is not None:
        return check_policy(named("special_tokens", asked))
    calibration = None if scores is None else scores.manifest.get("calibration")
    settings = calibration.get("settings") if isinstance(calibration, Mapping) else None
    known = recorded(settings) if isinstance(settings, Mapping) else None
    return str(known["policy"]) if known is not None else str(DEFAULT_POLICY)


def _tokenised(
    model: LanguageModel, text: str, policy: str
) -> tuple[CalibrationSet, NDArray[np.bool_]]:
    """Return the tokens of a text as one sequence, and which are special ones around it."""
    if model.tokenizer is None:
        raise InvalidInput(
            f"`text` needs a tokenizer, which {model.name!r} has not; give a model with one."
        )
    around = affixes(model.tokenizer, policy)
    ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise InvalidInput(f"`text` must have at least one token; got {text!r}.")
    together = [*around.before, *ids, *around.after]
    limit = model.context_length
    if limit is not None and len(together) > limit:
        raise InvalidInput(
            f"`text` must have at most {limit:,} tokens, which the model's context holds; got "
            f"{len(together):,}: shorten it."
        )
    special = np.ones(len(together), dtype=np.bool_)
    special[len(around.before) : len(around.before) + len(ids)] = False
    return CalibrationSet(torch.tensor([together], dtype=torch.int64), "own text", {}), special


def histogram_modes(histogram: pd.DataFrame) -> pd.DataFrame:
    """Return the modes of outputs of which only a histogram is known.

    The tokens of a bin are spread evenly over it; borders are those of all outputs up to a fraction
    of a bin.

    Parameters
    ----------
    histogram
        ``left``, ``right`` and ``count``, as `NeuronScores.histogram`.

    Returns
    -------
    pandas.DataFrame
        As `entangle.modes.find_modes`.
    """
    left, right = (histogram[side].to_numpy(np.float64) for side in ("left", "right"))
    counts = histogram["count"].to_numpy(np.int64)
    bins = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(bins)) - np.repeat(np.cumsum(counts) - counts, counts)
    return find_modes(left[bins] + (right - left)[bins] * (within + 0.5) / counts[bins])


def _percentiles(histogram: pd.DataFrame, outputs: Floats) -> Floats:
    """Return the share of a histogram's tokens below each output, in percent."""
    if not len(histogram):
        return np.full(len(outputs), np.nan)
    counts = histogram["count"].to_numpy(np.float64)
    edges = np.append(histogram["left"].to_numpy(np.float64), float(histogram["right"].iloc[-1]))
    below = np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum()
    found: Floats = 100.0 * np.interp(outputs, edges, below)
    return found
